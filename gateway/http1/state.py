"""What all connections of one server share."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from typing import Any

import structlog

from core.errors import AppError
from core.ids import new_id
from core.settings import EdgeSettings
from gateway.http1.request import HttpRequest, Wire

_log = structlog.get_logger(__name__)


class ServerState:
    """Bounds, counters, and one coarse clock: connections read it instead of asking the kernel.

    *dispatch* returns the coroutine that answers a request; it must answer, or abort, whatever happens.
    """

    __slots__ = (
        "bodies_bytes",
        "bodies_bytes_max",
        "connections",
        "connections_max",
        "date_line",
        "dispatch",
        "head_seconds_max",
        "is_draining",
        "now",
        "refused",
    )

    def __init__(self, dispatch: Callable[[HttpRequest], Coroutine[Any, Any, None]], settings: EdgeSettings) -> None:
        self.dispatch = dispatch
        self.head_seconds_max = settings.header_seconds_max
        # Admission has the last word on how much runs; this only must not be lower.
        self.connections_max = settings.connections_max
        self.bodies_bytes_max = settings.bodies_bytes_max
        self.connections: set[Wire] = set()
        self.bodies_bytes = 0
        """Request bodies in memory, of all calls together."""
        self.refused = 0
        """Requests that were no HTTP we take."""
        self.is_draining = False
        self.tick()

    def tick(self) -> None:
        """Set the clock."""
        self.now = time.monotonic()
        self.date_line = b"date: %b\r\n" % formatdate(usegmt=True).encode()

    def refusal_lines(self, error: AppError) -> bytes:
        """Return the headers of the answer to what is no request, ahead of those that *error* has; count and log it."""
        self.refused += 1
        request_id = new_id("req")
        _log.info("request.refused", request_id=request_id, code=error.code)
        return b"content-type: application/json\r\nx-request-id: %b\r\n" % request_id.encode()

    def forget_body(self, request: HttpRequest) -> None:
        """Give the memory of a request's body back."""
        self.bodies_bytes -= request.body_bytes
        request.drop_body()
