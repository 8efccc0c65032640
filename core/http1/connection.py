"""One connection to an upstream: its transport, its deadline, and the exchange that runs on it now."""

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import msgspec

from core.http1.errors import (
    ConnectionLost,
    FirstByteTimedOut,
    IdleTimedOut,
    ProtocolViolated,
    TotalTimedOut,
    UpstreamError,
)
from core.http1.framing import ResponseFraming
from core.http1.messages import Deadlines
from core.http1.response import Http1Response, ResponseSource

# A body up to this size leaves in one write with its head; a larger one in slices, as the network takes them.
WRITE_SLICE_BYTES = 131_072
# The event loop's clock ticks in milliseconds (uvloop): a timer may come this much early.
CLOCK_STEP_SECONDS = 0.001
NEVER = math.inf


class ConnectionCounters:
    """What a client's connections add up to. Plain ints, so that reading and counting cost nothing."""

    __slots__ = ("_all_closed", "connections_idle", "connections_open", "requests_retried_stale", "requests_reused")

    def __init__(self) -> None:
        self.connections_open = 0
        self.connections_idle = 0
        self.requests_reused = 0
        self.requests_retried_stale = 0
        self._all_closed = asyncio.Event()

    def note_closed(self) -> None:
        """Count a connection out."""
        self.connections_open -= 1
        if not self.connections_open:
            self._all_closed.set()

    async def wait_until_all_closed(self) -> None:
        """Return when no connection is open."""
        while self.connections_open:
            self._all_closed.clear()
            await self._all_closed.wait()


class ConnectionOwner(msgspec.Struct, frozen=True):
    """What a connection asks of the pool it belongs to."""

    name: str
    """The upstream's host and port, for messages."""
    buffered_bytes_max: int
    counters: ConnectionCounters
    on_idle: Callable[["Http1Connection"], None]
    """Called when the connection can take another request."""
    on_gone: Callable[["Http1Connection"], None]
    """Called once, when it can take none any more."""


class Exchange(NamedTuple):
    """A request as bytes, and how long its answer may take. *total_at* is on the loop's clock."""

    head: bytes
    body: bytes
    is_head_only: bool
    deadlines: Deadlines
    total_at: float


class Http1Connection(asyncio.Protocol, ResponseSource):
    """An asyncio Protocol that sends one request at a time and hands out one response at a time.

    No task, no stream reader: the parser runs in `data_received`, and a waiting caller is woken by a future. One timer
    serves all deadlines: a new deadline is only stored, and the timer moves itself on when it fires too early, so that
    a request on a warm connection arms nothing.
    """

    __slots__ = (
        "_deadline_at",
        "_deadlines",
        "_framing",
        "_head_waiter",
        "_is_busy",
        "_is_closed",
        "_is_counted",
        "_is_write_paused",
        "_loop",
        "_owner",
        "_response",
        "_timer",
        "_timer_at",
        "_total_at",
        "_transport",
        "_unsent",
        "exchanges_count",
        "idle_since",
        "is_reading_paused",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, owner: ConnectionOwner) -> None:
        self._loop = loop
        self._owner = owner
        self._framing = ResponseFraming(self)
        self._transport: asyncio.Transport | None = None
        self._head_waiter: asyncio.Future[Http1Response] | None = None
        self._response: Http1Response | None = None
        self._unsent: memoryview | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER
        self._deadline_at = NEVER
        self._is_busy = False
        self._is_closed = False
        self._is_counted = False
        self._is_write_paused = False
        self.is_reading_paused = False
        self.exchanges_count = 0
        self.idle_since = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether it can take no request any more."""
        return self._is_closed

    def count_in(self) -> None:
        """Count the connection as open.

        Not done in `connection_made`: if the dialling task is cancelled just then, no loop promises a `connection_lost`
        to count it out again.
        """
        self._is_counted = True
        self._owner.counters.connections_open += 1

    def start(self, exchange: Exchange, permit: asyncio.Future[None] | None) -> asyncio.Future[Http1Response]:
        """Send a request once *permit* is done; the future gets the response when its head is there.

        It fails with an `UpstreamError`, or with what *permit* fails with. Whoever stops waiting calls `withdraw`.
        """
        waiter: asyncio.Future[Http1Response] = self._loop.create_future()
        if permit is None or permit.done():
            self._start_permitted(waiter, exchange, permit)
        else:
            # A callback, not a wait: waking the caller's task only to send would cost several times as much.
            permit.add_done_callback(partial(self._start_permitted, waiter, exchange))
        return waiter

    def _start_permitted(
        self, waiter: asyncio.Future[Http1Response], exchange: Exchange, permit: asyncio.Future[None] | None
    ) -> None:
        if waiter.done() or (permit is not None and permit.cancelled()):
            # Nobody waits any more, and nothing was sent.
            waiter.cancel()
            self.abort()
            return
        refusal = None if permit is None else permit.exception()
        transport = self._transport
        if refusal is not None:
            waiter.set_exception(refusal)
            self.abort()
            return
        if self._is_closed or transport is None:
            waiter.set_exception(self._lost(response_started=False))
            return
        head, body, is_head_only, deadlines, total_at = exchange
        self._head_waiter = waiter
        self._is_busy = True
        self._deadlines = deadlines
        self._total_at = total_at
        self.exchanges_count += 1
        self._framing.begin(is_head_only=is_head_only)
        if len(body) <= WRITE_SLICE_BYTES:
            transport.write(head + body if body else head)
        else:
            transport.write(head)
            self._unsent = memoryview(body)
            self._write_more(transport)
        self._set_deadline(self._loop.time() + deadlines.first_byte_seconds)

    def withdraw(self, waiter: asyncio.Future[Http1Response]) -> None:
        """Close the connection if the exchange behind *waiter* still runs on it; the caller was cancelled.

        The pool may have given the connection to somebody else in the meantime, who must not notice.
        """
        if self._head_waiter is waiter:
            self.abort()
        elif not waiter.cancelled() and waiter.exception() is None:
            waiter.result().abort()

    def abort(self) -> None:
        """Close at once, without flushing. A running exchange ends in ConnectionLost. Idempotent."""
        self._fail(ConnectionLost("The exchange was aborted on our side.", response_started=self._response is not None))

    def resume_reading(self) -> None:
        """Read on after back-pressure; the idle deadline starts anew, since the silence was ours."""
        transport = self._transport
        if self.is_reading_paused and transport is not None and not self._is_closed:
            self.is_reading_paused = False
            transport.resume_reading()
            if self._is_busy:
                self._set_deadline(self._loop.time() + self._deadlines.idle_seconds)

    # The event loop calls the following.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        if self._is_closed:  # dialling was given up a moment ago
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what arrived and wake whoever waits for it. Bytes nobody asked for close the connection."""
        if not self._is_busy:
            self._close()
            return
        framing = self._framing
        try:
            framing.feed(data)
        except ProtocolViolated as error:
            self._deliver_head()
            self._fail(error)
            return
        response = self._response
        if response is None:
            response = self._deliver_head()
            if response is None:
                return  # the deadline stands: a head that comes in drips does not move it
        if framing.is_complete:
            self._finish()
            return
        if framing.body_bytes - response.taken_bytes > self._owner.buffered_bytes_max:
            self._pause_reading()
        else:
            self._set_deadline(self._loop.time() + self._deadlines.idle_seconds)
        response.wake()

    def eof_received(self) -> None:
        """End a body that lasts until the close; anything else that still runs is lost."""
        self._end_of_connection(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what still runs, and let go of everything that refers back to this object."""
        self._end_of_connection(exc)
        self._transport = None
        self._framing.close()
        if self._is_counted:
            self._is_counted = False
            self._owner.counters.note_closed()

    def pause_writing(self) -> None:
        """Stop sending slices: the network does not take them."""
        self._is_write_paused = True

    def resume_writing(self) -> None:
        """Send on. Each slice the network takes moves the first-byte deadline, so a stuck upload ends as well."""
        self._is_write_paused = False
        transport = self._transport
        if self._unsent is not None and self._is_busy and transport is not None:
            self._write_more(transport)
            if self._response is None:
                self._set_deadline(self._loop.time() + self._deadlines.first_byte_seconds)

    # Inside.

    def _deliver_head(self) -> Http1Response | None:
        """Give the response to the caller of `start` as soon as there is one."""
        response = self._framing.response
        waiter = self._head_waiter
        if response is not None and waiter is not None:
            self._head_waiter = None
            self._response = response
            if waiter.done():  # cancelled a moment ago; its task has not run yet
                self.abort()
                return None
            waiter.set_result(response)
        return response

    def _write_more(self, transport: asyncio.Transport) -> None:
        unsent = self._unsent
        while unsent is not None and not self._is_write_paused:
            transport.write(unsent[:WRITE_SLICE_BYTES])
            unsent = unsent[WRITE_SLICE_BYTES:] if len(unsent) > WRITE_SLICE_BYTES else None
        self._unsent = unsent

    def _pause_reading(self) -> None:
        """Stop reading: the caller is slower than the upstream. Only the total deadline still runs."""
        transport = self._transport
        if not self.is_reading_paused and transport is not None:
            self.is_reading_paused = True
            transport.pause_reading()
            self._set_deadline(NEVER)

    def _finish(self) -> None:
        """End the exchange cleanly; keep the connection if it is in a known state."""
        response = self._response
        self._is_busy = False
        self._response = None
        self._deadline_at = NEVER
        if response is not None:
            response.end(None)
        if self._unsent is not None or not self._framing.is_reusable:
            self._close()
            return
        if self.is_reading_paused:
            self.resume_reading()
        self._owner.on_idle(self)

    def _fail(self, error: UpstreamError) -> None:
        """End the exchange, if one runs, with *error*, and close."""
        if self._is_busy:
            self._is_busy = False
            waiter, response = self._head_waiter, self._response
            self._head_waiter = self._response = None
            if waiter is not None and not waiter.done():
                waiter.set_exception(error)
            if response is not None:
                response.end(error)
        self._close()

    def _close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._unsent = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
        self._owner.on_gone(self)

    def _end_of_connection(self, error: Exception | None) -> None:
        framing = self._framing
        if self._is_busy and self._response is not None and framing.ends_at_eof and error is None:
            self._finish()
        elif self._is_busy:
            self._fail(self._lost(response_started=framing.has_started))
        else:
            self._close()

    def _lost(self, *, response_started: bool) -> ConnectionLost:
        when = "during" if response_started else "before"
        return ConnectionLost(
            f"{self._owner.name} closed the connection {when} its response.", response_started=response_started
        )

    def _set_deadline(self, phase_at: float) -> None:
        """Let the exchange fail at *phase_at* or at its total deadline, whichever is first."""
        deadline_at = min(phase_at, self._total_at)
        self._deadline_at = deadline_at
        if deadline_at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline_at
            self._timer = self._loop.call_at(deadline_at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._timer_at = NEVER
        deadline_at = self._deadline_at
        if not self._is_busy or deadline_at == NEVER:
            return
        if self._loop.time() + CLOCK_STEP_SECONDS < deadline_at:
            self._timer_at = deadline_at
            self._timer = self._loop.call_at(deadline_at, self._on_timer)
        else:
            self._fail(self._timed_out(deadline_at))

    def _timed_out(self, deadline_at: float) -> UpstreamError:
        name = self._owner.name
        if deadline_at >= self._total_at:
            return TotalTimedOut(f"The exchange with {name} took longer than {self._seconds_text('total')}.")
        if self._response is None:
            return FirstByteTimedOut(f"{name} did not answer within {self._seconds_text('first_byte')}.")
        return IdleTimedOut(f"{name} sent nothing for {self._seconds_text('idle')}.")

    def _seconds_text(self, phase: str) -> str:
        seconds: float = getattr(self._deadlines, f"{phase}_seconds")
        return f"{seconds:g} s"
