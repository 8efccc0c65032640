"""The calls that run in this process, and one clock for all: keep-alive comments and leases; how calls are broken off.

One timer for the process instead of several per call: a call costs two set operations here.
"""

from __future__ import annotations

import asyncio
from typing import Final, Literal

import structlog

from core.errors import AppError
from core.settings import EdgeSettings
from gateway.answers import answer_lines, limit_lines
from gateway.errors import ClientGone, body_of, headers_of, status_of
from gateway.http1.request import HttpRequest, header_lines
from gateway.recording import Recording
from inference.errors import StreamInterrupted
from inference.exchange import Exchange
from keys.errors import RateLimitReached
from keys.limits import LEASE_SECONDS
from keys.quota import Quota

_TICK_SECONDS: Final = 0.25
_EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"
_JSON: Final = b"application/json"
# nginx and others hold streams back unless told not to.
_STREAMED: Final = b"cache-control: no-cache\r\nx-accel-buffering: no\r\n"
_KEEP_ALIVE: Final = b": keep-alive\n\n"
_EVENT_ENDS: Final = (b"\n\n", b"\r\r", b"\r\n\r\n")

Phase = Literal["reading", "waiting", "running"]
_log = structlog.get_logger(__name__)


class Run:
    """One call on its way to its caller. It is answered once."""

    __slots__ = (
        "_last",
        "_request",
        "exchange",
        "interruption",
        "is_gone",
        "is_guest",
        "phase",
        "recording",
        "renewed_at",
        "since",
        "task",
    )

    def __init__(self, exchange: Exchange, request: HttpRequest, now: float) -> None:
        self.exchange = exchange
        self.task = request.task
        self.phase: Phase = "reading"
        self.since = now
        self.renewed_at = now
        self.is_gone = False
        self.interruption: AppError | None = None
        self.is_guest = False
        """Whether the answer is another call's, or may be: nothing is lost when its caller leaves."""
        self.recording: Recording | None = None
        """What others join who ask for the same; set for requests with an Idempotency-Key."""
        self._request = request
        self._last = _KEEP_ALIVE

    def whole(self, status: int, lines: bytes, body: bytes) -> bool:
        """Send a whole answer; as an event where a keep-alive has already begun a stream. As `write`."""
        request = self._request
        if request.is_started:
            request.end(b"data: " + body.strip().replace(b"\n", b"\ndata: ") + b"\n\n")
        else:
            self.exchange.status = status
            request.respond(status, lines, body)
        return request.is_blocked

    def begin(self, status: int, content_type: bytes, more: bytes, first: bytes) -> bool:
        """Send the head of a stream, unless a keep-alive has sent it already, and its *first* events. As `write`."""
        if not self._request.is_started:
            self._commit(status, content_type, more, first)
        else:
            return self.write(first)
        return self._request.is_blocked

    def write(self, data: bytes) -> bool:
        """Send a part of a stream; tell whether to await `drained` before the next one."""
        self._last = data
        return self._request.write(data)

    async def drained(self) -> None:
        """Return when the caller has taken most of what was sent, or is gone, or when others wait for what comes next.

        In that case what the caller does not take piles up, to the bound of what is recorded.
        """
        recording = self.recording
        if recording is None:
            await self._request.drained()
        elif not recording.is_awaited:
            waits = [asyncio.ensure_future(wait) for wait in (self._request.drained(), recording.awaited())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    def end(self) -> None:
        """End a stream."""
        self._request.end()

    def fail(self, error: Exception) -> None:
        """Answer with *error*: as a plain answer if nothing was sent, else as the stream's last event."""
        exchange, request = self.exchange, self._request
        exchange.error_code = error.code if isinstance(error, AppError) else "internal_error"
        if self.is_gone or request.is_gone or isinstance(error, ClientGone):
            exchange.status = exchange.status or status_of(error)
        elif not request.is_started:
            exchange.status = status_of(error)
            lines = answer_lines(exchange, _JSON) + header_lines(headers_of(error))
            if isinstance(error, RateLimitReached):
                lines += limit_lines(error.shown)
            request.respond(exchange.status, lines, body_of(error))
        elif exchange.is_stream:
            # Never a `[DONE]` behind an error: it would say that the answer is whole.
            # A large event goes on in pieces: what broke off inside one must not swallow the error.
            gap = b"" if self._last.endswith(_EVENT_ENDS) else b"\n\n"
            request.end(b"%bdata: %b\n\n" % (gap, body_of(error)))

    def close(self) -> None:
        """Leave the connection in a known state: an answer that has no end is cut off, so that nobody takes it for one.

        Also breaks the circle between this object and the request, which the garbage collector would have to find.
        """
        self._request.abort()
        self.task = None
        if self.recording is not None:
            self.recording.when_deserted = None
            self.recording = None

    def interrupt(self, error: AppError) -> None:
        """End the call from outside: its task is cancelled and answers with *error*."""
        if self.interruption is None and self.task is not None:
            self.interruption = error
            self.task.cancel()

    def hang_up(self) -> None:
        """Note that the caller is gone; under the policy `abort`, end the call if nobody else wants its answer."""
        self.is_gone = True
        principal, recording = self.exchange.principal, self.recording
        if recording is not None and recording.followers:
            recording.when_deserted = self.hang_up
        elif self.is_guest or (principal is not None and principal.disconnect_policy == "abort"):
            if recording is not None:
                recording.abandon()  # now: nobody is to join in the moment that it takes
            self.interrupt(ClientGone())

    def ping(self) -> None:
        """Send a comment, so that nothing between the caller and us takes a slow first token for a dead connection."""
        if self._request.is_started:
            self._request.write(_KEEP_ALIVE)
        else:
            self._commit(200, _EVENT_STREAM, b"", _KEEP_ALIVE)

    def _commit(self, status: int, content_type: bytes, more: bytes, first: bytes) -> None:
        self.exchange.status = status
        lines = answer_lines(self.exchange, content_type) + _STREAMED + more
        self._request.begin(status, lines, first)


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

    def observed(self) -> tuple[list[str], list[int]]:
        """Return the calls that a provider may be working on, and how many tokens of each have come out."""
        running = [run.exchange for run in self._runs if run.exchange.intent is not None]
        return [one.request_id for one in running], [one.observed_output_tokens for one in running]

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
            if run.phase == "waiting" and run.exchange.is_stream and age_seconds > self._keepalive_seconds > 0:
                run.since = now
                run.ping()
            if now - run.renewed_at > LEASE_SECONDS / 3:
                run.renewed_at = now
                due.append(run)
        self._quota.renew([run.exchange.reservation for run in due if run.exchange.reservation is not None])
