"""The hot routes' part of `/openapi.json`: Litestar does not know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Request
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import (
    OpenAPI,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    Parameter,
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
    "409": "A request with the same Idempotency-Key still runs, or its answer was too large to be kept",
    "413": "The body is too large",
    "415": "The body is of another kind",
    "422": "The Idempotency-Key was used with another request",
    "429": "A limit is reached",
    "500": "A fault of the gateway",
    "502": "A fault of the provider",
    "503": "Not just now",
    "504": "The provider took too long",
}
_IDEMPOTENCY_KEY = Parameter(
    name="Idempotency-Key",
    param_in="header",
    required=False,
    description="Requests of one API key that have the same one are answered once. Printable ASCII; one to a request.",
    schema=Schema(type=OpenAPIType.STRING, min_length=1, max_length=255, pattern="^[ -~]+$"),
)
_ANSWER_HEADERS = {
    "Idempotent-Replayed": OpenAPIHeader(
        schema=Schema(type=OpenAPIType.STRING, enum=["true"]),
        description="The answer was given before, and costs nothing. Absent otherwise.",
    ),
    "Original-Request": OpenAPIHeader(
        schema=Schema(type=OpenAPIType.STRING),
        description="Of a replayed answer: the id of the request that was billed.",
    ),
    "x-request-cost-usd": OpenAPIHeader(
        schema=Schema(type=OpenAPIType.STRING, pattern=r"^-?\d+(\.\d+)?$"),
        description="What a whole answer is charged, in US dollars. Absent on streams, replays, and without a price.",
    ),
}


class WholeDocument(JsonRenderPlugin):
    """Renders what Litestar knows of the routes, and the hot ones beside it.

    Once, and when somebody asks: it takes a tenth of a second, for which no start should wait.
    """

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        super().__init__(path="/")
        self._endpoints = endpoints
        self._rendered = b""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002 - Litestar's half of it
        """Return the document as JSON."""
        if not self._rendered:
            document = request.app.openapi_schema
            describe_hot_routes(document, self._endpoints)
            self._rendered = msgspec.json.encode(document.to_schema())
        return self._rendered


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
        "200": OpenAPIResponse(
            "As the provider answered",
            content={"application/json": OpenAPIMediaType(anything)},
            headers=dict(_ANSWER_HEADERS),
        )
    }
    responses |= {status: OpenAPIResponse(description) for status, description in _ERRORS.items()}
    return Operation(
        operation_id=f"create{endpoint.operation.title().replace('_', '')}",
        summary=f"OpenAI's POST {path}",
        description=f"Body and answer are OpenAI's. Needs the scope `{endpoint.scope}`.",
        parameters=[_IDEMPOTENCY_KEY],
        request_body=RequestBody(content={media_type: OpenAPIMediaType(model)}, required=True),
        responses=dict(responses),
        security=[{"bearer": []}],
    )
