"""The listening socket: takes connections in, keeps their time, and lets them end in order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

import structlog

from core.settings import EdgeSettings
from gateway.http1.connection import ServerConnection
from gateway.http1.request import HttpRequest
from gateway.http1.state import ServerState

_TICK_SECONDS: Final = 0.5
_BACKLOG: Final = 2048
_log = structlog.get_logger(__name__)


class Listener:
    """Listens on one address. Several processes may share it (SO_REUSEPORT): the kernel spreads connections."""

    def __init__(self, dispatch: Callable[[HttpRequest], Coroutine[Any, Any, None]], settings: EdgeSettings) -> None:
        self._settings = settings
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self.state = ServerState(dispatch, settings)

    async def start(self) -> None:
        """Open the port. Errors: OSError."""
        loop = asyncio.get_running_loop()
        settings = self._settings
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.create_server(
            (settings.host, settings.port),
            family=family,
            backlog=_BACKLOG,
            reuse_port=True,
            dualstack_ipv6=settings.host == "::",
        )
        listening.setblocking(False)
        state = self.state
        self._server = await loop.create_server(lambda: ServerConnection(state, loop), sock=listening, backlog=_BACKLOG)
        self._ticker = loop.create_task(self._tick_forever())

    def stop_accepting(self) -> None:
        """Close the port and every connection that is idle; the others close behind their present answer."""
        self.state.is_draining = True
        if self._server is not None:
            self._server.close()
        for connection in self._connections():
            connection.close_if_idle()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Return once no request is here; tell whether that was so within *timeout_seconds*."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while any(connection.is_busy for connection in self._connections()):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def close(self) -> None:
        """Close everything, finished or not."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        for connection in self._connections():
            connection.abort()

    def _connections(self) -> list[ServerConnection]:
        return cast("list[ServerConnection]", list(self.state.connections))

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self.state.tick()
            for connection in self._connections():
                try:
                    connection.check(self.state.now)
                except Exception:  # noqa: BLE001 - the clock of all connections must not stop for one
                    _log.exception("connection.check_failed")
