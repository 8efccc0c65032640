"""One line a call: encoded at once, written in batches, so that logging is a few microseconds of a call."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime
from typing import Final

import msgspec

from inference.exchange import Exchange

_FLUSH_SECONDS: Final = 0.1
_LINES_MAX: Final = 10_000
_encode: Final = msgspec.json.Encoder().encode


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """No body, no header, no key: ids, names of the catalog, and numbers."""

    timestamp: str
    level: str
    event: str
    request_id: str
    status: int
    outcome: str
    operation: str
    duration_ms: float
    organization_id: str | None = None
    project_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    deployment: str | None = None
    stream: bool = False
    attempts: int = 1
    first_byte_ms: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    tokens_estimated: bool = False
    quota_mode: str = "redis"
    error_code: str | None = None


class RequestLog:
    """Writes to a file descriptor. When nobody reads it fast enough, lines are dropped and counted: calls go on."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._lines: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._second = 0
        self._stamp = ""
        self.dropped = 0

    def write(self, exchange: Exchange, duration_seconds: float) -> None:
        """Add a call's line to the current batch."""
        if not self._lines:
            self._loop.call_later(_FLUSH_SECONDS, self.flush)
        elif len(self._lines) >= _LINES_MAX:
            self.dropped += 1
            return
        principal, deployment, reservation = exchange.principal, exchange.deployment, exchange.reservation
        first_byte = exchange.first_byte_at
        self._lines.append(
            _encode(
                _Line(
                    self._timestamp(),
                    "info",
                    "call.ended",
                    exchange.request_id,
                    exchange.status,
                    exchange.outcome,
                    exchange.endpoint.operation,
                    round(duration_seconds * 1000, 3),
                    principal.organization_id if principal else None,
                    principal.project_id if principal else None,
                    principal.key_id if principal else None,
                    exchange.model or None,
                    deployment.id if deployment else None,
                    exchange.is_stream,
                    exchange.attempts,
                    round((first_byte - exchange.started_at) * 1000, 3) if first_byte else None,
                    exchange.input_tokens if exchange.attempts else 0,
                    exchange.output_tokens,
                    exchange.is_estimated,
                    "local" if reservation is not None and reservation.is_local else "redis",
                    exchange.error_code,
                )
            )
        )

    def flush(self) -> None:
        """Write the batch in one call."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        try:
            os.write(self._descriptor, b"\n".join(lines) + b"\n")
        except OSError:
            self.dropped += len(lines)

    def _timestamp(self) -> str:
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._stamp = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._stamp}.{int((now - second) * 1000):03d}Z"
