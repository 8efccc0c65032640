"""`/metrics` for Prometheus. Not for everybody: a bearer token, or, while trying out, this machine only."""

from __future__ import annotations

import hmac
from typing import Any

from litestar import Request, Response, get
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from core.settings import EdgeSettings
from gateway.errors import RouteNotFound
from gateway.runtime import Runtime

_LOOPBACK = ("127.", "::1")
_FORWARDED = ("x-forwarded-for", "forwarded", "x-real-ip")


@get("/metrics", summary="Metrics in Prometheus's text form", operation_id="metrics", media_type="text/plain")
async def metrics(request: Request[Any, Any, Any], runtime: Runtime) -> Response[bytes]:
    """Return the sums over all API processes of this machine. Errors: RouteNotFound for who may not see them."""
    if not _may_see(request, runtime.settings.edge):
        raise RouteNotFound("GET", "/metrics")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(runtime.metrics)
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


def _may_see(request: Request[Any, Any, Any], settings: EdgeSettings) -> bool:
    if settings.metrics_token is not None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), settings.metrics_token.encode())
    if settings.metrics_access == "token":
        return False
    # Behind a proxy on this machine everybody seems to come from it: its headers, if it sends any, give that away.
    client = request.client.host if request.client else ""
    return client.startswith(_LOOPBACK) and not any(name in request.headers for name in _FORWARDED)


ROUTES = (metrics,)
