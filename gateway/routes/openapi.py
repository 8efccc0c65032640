"""The hot routes' part of `/openapi.json`: Litestar does not know them."""

from __future__ import annotations

from collections.abc import Mapping

from litestar.openapi.spec import (
    OpenAPI,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    PathItem,
    RequestBody,
    Schema,
    SecurityScheme,
)
from litestar.openapi.spec.components import Components
from litestar.openapi.spec.enums import OpenAPIType

from inference.endpoints import Endpoint

_ERRORS = {
    "400": "The request cannot be understood",
    "401": "No valid API key",
    "403": "The key may not do this",
    "404": "No such model",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is of another kind",
    "429": "A limit is reached",
    "500": "A fault of the gateway",
    "502": "A fault of the provider",
    "503": "Not just now",
    "504": "The provider took too long",
}


def describe_hot_routes(document: OpenAPI, endpoints: Mapping[str, Endpoint]) -> None:
    """Add the hot routes to *document*. Their bodies are OpenAI's, which the document refers to in words."""
    document.paths = document.paths or {}
    for path, endpoint in endpoints.items():
        document.paths[path] = PathItem(post=_operation(path, endpoint))
    document.components = document.components or Components()
    document.components.security_schemes = {
        **(document.components.security_schemes or {}),
        "bearer": SecurityScheme(type="http", scheme="bearer"),
    }


def _operation(path: str, endpoint: Endpoint) -> Operation:
    media_type = "multipart/form-data" if endpoint.body == "form" else "application/json"
    anything = Schema(type=OpenAPIType.OBJECT)
    model = Schema(type=OpenAPIType.OBJECT, properties={"model": Schema(type=OpenAPIType.STRING)}, required=["model"])
    responses = {
        "200": OpenAPIResponse("As the provider answered", content={"application/json": OpenAPIMediaType(anything)})
    }
    responses |= {status: OpenAPIResponse(description) for status, description in _ERRORS.items()}
    return Operation(
        operation_id=f"create{endpoint.operation.title().replace('_', '')}",
        summary=f"OpenAI's POST {path}",
        description=f"Body and answer are OpenAI's. Needs the scope `{endpoint.scope}`.",
        request_body=RequestBody(content={media_type: OpenAPIMediaType(model)}, required=True),
        responses=dict(responses),
        security=[{"bearer": []}],
    )
