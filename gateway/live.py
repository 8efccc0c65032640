"""The calls that run in this process, and one clock for all: time-outs, keep-alive comments, leases, interruption.

One timer for the process instead of several per call: a call costs two set operations here.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final, Literal

import structlog

from core.errors import AppError
from core.settings import EdgeSettings
from gateway.answers import answer_headers, denial_headers
from gateway.errors import Headers, RequestTimedOut, body_of, headers_of, status_of
from inference.errors import BodyInvalid, StreamInterrupted
from inference.exchange import Exchange
from keys.errors import RateLimitReached
from keys.limits import LEASE_SECONDS
from keys.quota import Quota

_TICK_SECONDS: Final = 0.25
_BODY_SECONDS_MAX: Final = 60.0
# A client that takes nothing for this long is treated as gone; what it holds up is bounded memory and a connection.
_WRITE_SECONDS_MAX: Final = 60.0
_EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"
_JSON: Final = b"application/json"
_KEEP_ALIVE: Final = b": keep-alive\n\n"
_EVENT_ENDS: Final = (b"\n\n", b"\r\r", b"\r\n\r\n")
_CLIENT_CLOSED: Final = 499

Phase = Literal["reading", "waiting", "writing", "running"]
_log = structlog.get_logger(__name__)


class ClientGone(AppError):
    """The caller hung up: nobody will read an answer."""

    code = "client_gone"


class Run:
    """One call on its way to its caller. Its sends are in order, and it is answered once."""

    __slots__ = (
        "_has_given_up",
        "_last",
        "_pinging",
        "_send",
        "exchange",
        "interruption",
        "is_committed",
        "is_gone",
        "phase",
        "renewed_at",
        "since",
        "task",
    )

    def __init__(self, exchange: Exchange, send: Any, task: asyncio.Task[Any] | None, now: float) -> None:
        self.exchange = exchange
        self.task = task
        self.phase: Phase = "reading"
        self.since = now
        self.renewed_at = now
        self.is_committed = False
        self.is_gone = False
        self.interruption: AppError | None = None
        self._send = send
        self._has_given_up = False
        self._last = _KEEP_ALIVE
        self._pinging: asyncio.Task[None] | None = None

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer; as an event where a keep-alive has already begun a stream."""
        self.phase = "running"
        if self._pinging is not None:
            await self._pinging
            if self.is_committed:
                event = b"data: " + body.strip().replace(b"\n", b"\ndata: ") + b"\n\n"
                await self._send({"type": "http.response.body", "body": event})
                return
        self.exchange.status = status
        self.is_committed = True
        headers.append((b"content-length", b"%d" % len(body)))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, status: int, content_type: bytes, more: Headers) -> None:
        """Send the head of a stream, unless a keep-alive has sent it already."""
        self.phase = "running"
        if self._pinging is not None:
            await self._pinging
        if not self.is_committed:
            await self._commit(status, content_type, more)

    async def write(self, data: bytes, now: float) -> None:
        """Send a part of a stream. Waits while the caller is slow; does nothing once it is gone."""
        if self.is_gone:
            return
        self.phase, self.since = "writing", now
        self._last = data
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        except asyncio.CancelledError:
            if not self._has_given_up or self.interruption is not None or self.task is None:
                raise
            # Only the write was given up: the answer is read to its end, which says what it cost.
            self._has_given_up = False
            self.task.uncancel()
        self.phase = "running"

    async def end(self) -> None:
        """End a stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: Exception) -> None:
        """Answer with *error*: as a plain answer if nothing was sent, else as the stream's last event."""
        exchange = self.exchange
        exchange.error_code = error.code if isinstance(error, AppError) else "internal_error"
        if self._pinging is not None:
            await self._pinging
        if self.is_gone or isinstance(error, ClientGone):
            exchange.status = exchange.status or _CLIENT_CLOSED
            if self.phase == "reading":
                await self._answer_broken_body()
            return
        if self.is_committed and not exchange.is_stream:
            # The head promised so many bytes of another body: only the connection's end can say that they won't come.
            return
        if self.is_committed:
            # Never a `[DONE]` behind an error: it would say that the answer is whole.
            # A large event goes on in pieces: what broke off inside one must not swallow the error.
            gap = b"" if self._last.endswith(_EVENT_ENDS) else b"\n\n"
            await self._send({"type": "http.response.body", "body": b"%bdata: %b\n\n" % (gap, body_of(error))})
            return
        headers = answer_headers(exchange, _JSON) + headers_of(error)
        if isinstance(error, RateLimitReached):
            denial_headers(headers, error)
        await self.whole(status_of(error), headers, body_of(error))

    async def _answer_broken_body(self) -> None:
        """Answer a call whose body broke off: the server says the same of one whose framing was malformed."""
        status = self.exchange.status
        broken = BodyInvalid("The request body broke off or was malformed.")
        with contextlib.suppress(Exception):
            await self.whole(status_of(broken), answer_headers(self.exchange, _JSON), body_of(broken))
        self.exchange.status = status

    def interrupt(self, error: AppError) -> None:
        """End the call from outside: its task is cancelled and answers with *error*."""
        if self.interruption is None and self.task is not None:
            self.interruption = error
            self.task.cancel()

    def give_up_writing(self) -> None:
        """Treat the caller as gone while a write to it is stuck; what then happens is the organization's policy."""
        self.is_gone = True
        principal = self.exchange.principal
        if principal is not None and principal.disconnect_policy == "abort":
            self.interrupt(ClientGone("The caller stopped reading."))
        elif self.task is not None:
            self._has_given_up = True
            self.task.cancel()

    def ping(self) -> None:
        """Send a comment, so that nothing between the caller and us takes a slow first token for a dead connection."""
        if self._pinging is None or self._pinging.done():
            self._pinging = asyncio.create_task(self._keep_alive())

    async def _keep_alive(self) -> None:
        with contextlib.suppress(Exception):
            if not self.is_committed:
                await self._commit(200, _EVENT_STREAM, [])
            await self._send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})

    async def _commit(self, status: int, content_type: bytes, more: Headers) -> None:
        self.is_committed = True
        self.exchange.status = status
        headers = [*answer_headers(self.exchange, content_type), (b"cache-control", b"no-cache"), *more]
        # nginx and others hold streams back unless told not to.
        headers.append((b"x-accel-buffering", b"no"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


class LiveRuns:
    """All running calls of this process."""

    def __init__(self, settings: EdgeSettings, quota: Quota) -> None:
        self._keepalive_seconds = settings.keepalive_seconds
        self._quota = quota
        self._runs: set[Run] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.lag_seconds = 0.0

    def __len__(self) -> int:
        """How many calls run."""
        return len(self._runs)

    @property
    def streams(self) -> int:
        """How many of them are streams."""
        return sum(1 for run in self._runs if run.exchange.is_stream)

    def start(self) -> None:
        """Start the clock."""
        self._ticker = self._loop.create_task(self._tick_forever())

    async def close(self) -> None:
        """Stop the clock."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)

    def add(self, run: Run) -> None:
        """Watch over *run*."""
        self._runs.add(run)

    def discard(self, run: Run) -> None:
        """Stop watching over *run*."""
        self._runs.discard(run)

    def interrupt_all(self) -> None:
        """End every call: streams with an error event, others with a plain error."""
        for run in list(self._runs):
            run.interrupt(
                StreamInterrupted("The gateway is restarting. The answer is incomplete.", retry_after_seconds=1)
            )

    async def _tick_forever(self) -> None:
        due = self._loop.time()
        while True:
            due = max(due + _TICK_SECONDS, self._loop.time())
            await asyncio.sleep(due - self._loop.time())
            self.lag_seconds = self._loop.time() - due
            try:
                self._tick(self._loop.time())
            except Exception:  # noqa: BLE001 - the clock of all calls must not stop for one
                _log.exception("live_runs.tick_failed")

    def _tick(self, now: float) -> None:
        due: list[Run] = []
        for run in list(self._runs):
            age_seconds = now - run.since
            if run.phase == "reading" and age_seconds > _BODY_SECONDS_MAX:
                run.interrupt(RequestTimedOut())
            elif run.phase == "writing" and age_seconds > _WRITE_SECONDS_MAX:
                run.give_up_writing()
            elif run.phase == "waiting" and run.exchange.is_stream and age_seconds > self._keepalive_seconds > 0:
                run.since = now
                run.ping()
            if now - run.renewed_at > LEASE_SECONDS / 3:
                run.renewed_at = now
                due.append(run)
        self._quota.renew([run.exchange.reservation for run in due if run.exchange.reservation is not None])
