"""One line a call: encoded at once, written in batches, so that logging is a few microseconds of a call."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Final

import msgspec

from core.log_writer import LogWriter
from inference.exchange import Exchange

_FLUSH_SECONDS: Final = 0.1
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
    """Collects lines for a tenth of a second, then hands them over. The writer drops what nobody takes."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._lines: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._second = 0
        self._stamp = ""

    def write(self, exchange: Exchange, duration_seconds: float) -> None:
        """Add a call's line to the current batch."""
        if not self._lines:
            self._loop.call_later(_FLUSH_SECONDS, self.flush)
        principal, deployment, reservation = exchange.principal, exchange.deployment, exchange.reservation
        first_byte = exchange.first_byte_at
        input_tokens, output_tokens = exchange.tokens()
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
                    input_tokens if exchange.attempts else 0,
                    output_tokens,
                    exchange.is_estimated,
                    "local" if reservation is not None and reservation.is_local else "redis",
                    exchange.error_code,
                )
            )
        )

    def flush(self) -> None:
        """Hand the batch to the writer."""
        lines, self._lines = self._lines, []
        if lines:
            self._writer.write(b"\n".join(lines) + b"\n")

    def _timestamp(self) -> str:
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._stamp = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._stamp}.{int((now - second) * 1000):03d}Z"
