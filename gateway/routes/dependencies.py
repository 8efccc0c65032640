"""What handlers ask for by name."""

from __future__ import annotations

from typing import Any

from litestar import Request
from litestar.datastructures import State

from gateway.authentication import credential_in
from gateway.client_address import client_address
from gateway.runtime import Runtime
from keys.principal import Principal


def provide_runtime(state: State) -> Runtime:
    """Return the parts of this process."""
    return state["runtime"]


async def provide_principal(request: Request[Any, Any, Any], runtime: Runtime) -> Principal:
    """Return who calls. Errors: those of `Authenticator.authenticate`."""
    trusted = runtime.settings.edge.trusted_proxies
    headers = request.scope["headers"]
    peer = request.client.host if request.client else ""
    return await runtime.authenticator.authenticate(
        credential_in(headers), lambda: client_address(peer, headers, trusted)
    )
