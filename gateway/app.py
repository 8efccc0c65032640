"""The application: hot routes first, Litestar for the rest, one error form and one request id for both."""

from __future__ import annotations

import re
import time
from collections.abc import Coroutine
from typing import Any, Final, cast

import structlog
from litestar import Litestar, Request, Response
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException, ValidationException
from litestar.openapi.config import OpenAPIConfig
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import AppError, Invalid
from core.ids import new_id
from core.version import VERSION
from gateway.errors import (
    BodyTooLarge,
    ErrorBody,
    MethodNotAllowed,
    RouteNotFound,
    error_body,
    headers_of,
    status_of,
)
from gateway.http1.asgi import serve_asgi
from gateway.http1.request import HttpRequest
from gateway.routes import (
    billing,
    business_metrics,
    health,
    ledger,
    metrics,
    models,
    stripe_webhook,
    usage,
    webhooks,
)
from gateway.routes.dependencies import provide_principal, provide_runtime
from gateway.routes.openapi import WholeDocument
from gateway.runtime import Runtime
from keys.secrets import redact

_FIXED_HEADERS: Final = ((b"openai-version", b"2020-10-01"), (b"x-content-type-options", b"nosniff"))
_BODY_BYTES_MAX: Final = 1024 * 1024
_FIELD: Final = re.compile(r"field `(\w{1,64})`")
_log = structlog.get_logger(__name__)


class Application:
    """The whole application of an API process: who answers what."""

    def __init__(self, runtime: Runtime) -> None:
        self._hot = runtime.hot
        self._endpoints = runtime.hot.endpoints
        self._site = _governed(create_site(runtime))

    def dispatch(self, request: HttpRequest) -> Coroutine[Any, Any, None]:
        """Return the coroutine that answers *request*."""
        endpoint = self._endpoints.get(request.path)
        if endpoint is not None:
            return self._hot.serve(endpoint, request)
        return serve_asgi(self._site, request, _BODY_BYTES_MAX)


def create_site(runtime: Runtime) -> Litestar:
    """Return the routes that are not hot."""
    hot = {path.decode(): endpoint for path, endpoint in runtime.hot.endpoints.items()}
    routes = [*models.ROUTES, *usage.ROUTES, *ledger.ROUTES, *billing.ROUTES, *business_metrics.ROUTES]
    routes += [*webhooks.ROUTES, *health.ROUTES, *metrics.ROUTES]
    # Without a signing secret anybody could tell us anything: there is no such route then.
    inbound = stripe_webhook.ROUTES if runtime.settings.stripe.webhook_secrets else ()
    return Litestar(
        route_handlers=[*routes, *inbound],
        state=State({"runtime": runtime}),
        dependencies={
            "runtime": Provide(provide_runtime, sync_to_thread=False),
            "principal": Provide(provide_principal),
        },
        exception_handlers={Exception: _answer_error},
        openapi_config=OpenAPIConfig(
            title="AI Agent Platform gateway",
            version=VERSION,
            path="/openapi.json",
            render_plugins=[WholeDocument(hot)],
        ),
        # Litestar's own would send what libraries log around our scrubbing (core/telemetry.py).
        logging_config=None,
        request_max_body_size=_BODY_BYTES_MAX,
        debug=False,
    )


def _governed(site: ASGIApp) -> ASGIApp:
    """Give every answer of *site* its id and OpenAI's headers, and every call of the API its line in the log."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        started_at = time.perf_counter()
        request_id = new_id("req")
        scope["state"]["request_id"] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed_ms = (time.perf_counter() - started_at) * 1000
                own = [(b"x-request-id", request_id.encode()), (b"openai-processing-ms", b"%d" % elapsed_ms)]
                message["headers"] = [*message["headers"], *own, *_FIXED_HEADERS]
            await send(message)

        await site(scope, receive, send_with_headers)
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            duration_ms = round((time.perf_counter() - started_at) * 1000, 3)
            route = redact(scope["path"])[:200]
            _log.info(
                "request.ended",
                request_id=request_id,
                method=scope["method"],
                path=route,
                status=status,
                duration_ms=duration_ms,
            )

    return application


def _answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    """Answer every failure in OpenAI's form, Litestar's own among them; tell nothing of what broke in here."""
    known = _known(request, error)
    if not isinstance(known, AppError):
        _log.error("request.broke", request_id=request.scope["state"].get("request_id"), exc_info=error)
    headers = {name.decode(): value.decode() for name, value in headers_of(known)}
    return Response(error_body(known), status_code=status_of(known), headers=headers, media_type="application/json")


def _known(request: Request[Any, Any, Any], error: Exception) -> Exception:
    if isinstance(error, NotFoundException):
        return RouteNotFound(request.method, request.url.path)
    if isinstance(error, MethodNotAllowedException):
        return MethodNotAllowed((error.headers or {}).get("allow", "GET"))
    if isinstance(error, HTTPException) and error.status_code == 413:
        return BodyTooLarge(_BODY_BYTES_MAX)
    if isinstance(error, ValidationException):
        return _unfit(error)
    if isinstance(error, HTTPException) and error.status_code < 500:
        return Invalid("Invalid request.")
    return error


def _unfit(error: ValidationException) -> Invalid:
    """Name what is wrong with a body, as msgspec has it: the field, and what was expected of it."""
    found = cast("list[dict[str, Any]]", error.extra) if isinstance(error.extra, list) else []
    for fault in found:
        message = redact(str(fault.get("message", "")))[:300]
        key = str(fault.get("key", ""))
        # Of a field that is missing or unknown, msgspec tells the object and names the field in the message.
        named = _FIELD.search(message) if key in {"", "data"} else None
        field = named[1] if named else redact(key)[:64] or None
        return Invalid(f"Invalid '{field}': {message}." if field else f"Invalid body: {message}.", param=field)
    return Invalid("Invalid request.")
