"""One caller's connection: finds the requests in its bytes, has them answered one after the other."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, cast

from core.errors import AppError
from gateway.errors import (
    ClientGone,
    GatewayFull,
    RequestMalformed,
    RequestTimedOut,
    body_of,
    headers_of,
    status_of,
)
from gateway.http1.reading import Receiver, RequestReader
from gateway.http1.request import HttpRequest, header_lines, whole_answer
from gateway.http1.state import ServerState

# Of a body that nobody has asked for yet; more than that stays in the network.
_UNASKED_BYTES_MAX: Final = 64 * 1024
# Longer than the 60 s after which load balancers close, so that it is they who do: then no request meets a closed door.
_IDLE_SECONDS_MAX: Final = 75.0
_BODY_SECONDS_MAX: Final = 60.0
# Requests of one caller that wait while another of its own is answered; what comes behind them is not parsed yet.
_QUEUED_MAX: Final = 16
# How long the rest of a refused body is read, so that the caller reads the answer instead of a reset.
_LINGER_SECONDS_MAX: Final = 10.0
# How long what was sent may wait for a caller who does not read.
_FLUSH_SECONDS_MAX: Final = 60.0


class ServerConnection(asyncio.Protocol, Receiver):
    """An asyncio Protocol. It has no timer of its own: the server calls `check` twice a second."""

    __slots__ = (
        "_blocked_since",
        "_current",
        "_drain_waiter",
        "_is_lingering",
        "_is_lost",
        "_is_reading_paused",
        "_loop",
        "_queue",
        "_reader",
        "_server",
        "_since",
        "_tail_error",
        "_task",
        "_transport",
        "_turn",
        "_was_used",
        "is_blocked",
        "peer_address",
    )

    def __init__(self, server: ServerState, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._reader = RequestReader(self, server)
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._is_lingering = False
        self._is_lost = False
        self._is_reading_paused = False
        self._was_used = False
        self._current: HttpRequest | None = None
        """The request that is being answered."""
        self._queue: deque[HttpRequest] = deque()
        """Requests that came before the one before them was answered."""
        self._tail_error: AppError | None = None
        self._drain_waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._turn: asyncio.Future[None] | None = None
        """What the task waits for while there is no request."""
        self._since = server.now
        """When this began: to be open, to be idle, a head, a request, to linger. On the server's clock."""
        self._blocked_since = 0.0
        self.is_blocked = False
        self.peer_address = ""

    @property
    def date_line(self) -> bytes:
        """The `Date` header of this moment."""
        return self._server.date_line

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered, or an answer is still on its way out."""
        return self._current is not None or self._transport.get_write_buffer_size() > 0

    def must_close(self) -> bool:
        """Tell whether the server is on its way out."""
        return self._server.is_draining

    def check(self, now: float) -> None:
        """Close what has taken too long. *now* is on the server's clock."""
        age_seconds = now - self._since
        current = self._current
        if (self.is_blocked or self._transport.is_closing()) and now - self._blocked_since > _FLUSH_SECONDS_MAX:
            self.abort()  # to whoever answers, the caller has hung up
        elif current is not None:
            # Whoever answers has clocks of its own; how long a body may take is the same for all.
            if current is self._reader.receiving and not current.is_started and age_seconds > _BODY_SECONDS_MAX:
                self.refuse(RequestTimedOut())
        elif self._is_lingering:
            if age_seconds > _LINGER_SECONDS_MAX:
                self.abort()
        elif self._reader.is_in_head:
            if age_seconds > self._server.head_seconds_max:
                self.refuse(RequestTimedOut())
        elif age_seconds > (_IDLE_SECONDS_MAX if self._was_used else self._server.head_seconds_max):
            self._close()

    def close_if_idle(self) -> None:
        """Close unless a request is here, or a part of one."""
        if not self.is_busy and not self._reader.is_in_head and not self._is_lingering:
            self._close()

    # A request calls the following.

    def send(self, data: bytes) -> None:
        """Write *data*, or keep it until the caller takes it."""
        self._transport.write(data)

    async def drained(self) -> None:
        """Return when the caller has taken most of what was sent, or is gone."""
        while self.is_blocked and not self._is_lost:
            waiter = self._drain_waiter = self._loop.create_future()
            await waiter

    def read_on(self) -> None:
        """Read the rest of the body."""
        self._pace_reading()

    def finish(self, request: HttpRequest) -> None:
        """Go on behind *request*, which is answered."""
        self._server.forget_body(request)
        self._current = None
        self._was_used = True
        self._since = self._server.now
        if request.closes:
            self._end(is_body_complete=request.is_body_complete)
        elif not self.is_blocked:
            self._next()

    def abort(self) -> None:
        """Close at once, without sending what is left."""
        self._reader.is_over = True
        self._transport.abort()

    # The event loop calls the following.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection in, or turn it away if there are too many."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        peer = transport.get_extra_info("peername")
        self.peer_address = str(peer[0]) if peer and not isinstance(peer, str) else ""
        connections = self._server.connections
        connections.add(self)
        if len(connections) > self._server.connections_max:
            self._write_error(GatewayFull())
            self._close()

    def data_received(self, data: bytes) -> None:
        """Parse what arrived. Nothing behind a malformed byte is ever read as a request."""
        self._reader.feed(data)
        if self._queue or self._reader.receiving is not None or self._reader.has_rest:
            self._pace_reading()

    def eof_received(self) -> None:
        """Close: a caller who has stopped sending is gone, as it is for nginx and for Go's server."""
        receiving = self._reader.receiving
        if receiving is not None and not receiving.is_ended:
            self.refuse(RequestMalformed("The request body broke off."), told=ClientGone())
        if self._current is not None:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - gone is gone
        """Tell all whose request came this way."""
        self._is_lost = True
        self._reader.close()
        self._server.connections.discard(self)
        current, self._current = self._current, None
        if current is not None:
            self._server.forget_body(current)
            current.lose()
        self._forget_queue()
        self._wake_drained()
        self._give_turn()

    def pause_writing(self) -> None:
        """Note that the caller reads more slowly than it is sent to."""
        self.is_blocked = True
        self._blocked_since = self._server.now

    def resume_writing(self) -> None:
        """Go on where the caller had stopped."""
        self.is_blocked = False
        self._wake_drained()
        if self._current is None and not self._is_lingering and not self._transport.is_closing():
            self._next()

    # What reads the requests calls the following.

    def head_begun(self) -> None:
        """Note when a request began."""
        if self._current is None:
            self._since = self._server.now

    def take(self, request: HttpRequest) -> None:
        """Answer *request* now, or behind those that came before it and once its caller reads."""
        if self._current is None and not self.is_blocked:
            self._start(request)
        else:
            self._queue.append(request)

    def is_full(self) -> bool:
        """Tell whether enough requests wait to be answered."""
        return len(self._queue) >= _QUEUED_MAX

    def body_ended(self, request: HttpRequest) -> None:
        """Note that all of *request* is here."""
        request.complete_body()
        if self._is_lingering:
            self._close()
        elif request.closes:
            self._reader.is_over = True  # the caller said that it sends no more

    def refuse(self, error: AppError, *, told: AppError | None = None) -> None:
        """Answer with *error* behind what is being answered, and close. Nothing more is read as a request.

        Whoever waits for the body gets *told*, or else *error*.
        """
        reader = self._reader
        if reader.is_over:
            return
        reader.is_over = True
        current = self._current
        if self._is_lingering:
            self._close()
        elif current is None:
            self._write_error(error)
            self._end(is_body_complete=False)
        elif current is not reader.receiving:
            if reader.receiving is not None:
                # The one that is broken; those before it are whole.
                self._queue.remove(reader.receiving)
                self._server.forget_body(reader.receiving)
            self._tail_error = error
        elif current.is_started:
            self.abort()
        else:
            self._write_error(error)
            self._current = None
            self._server.forget_body(current)
            current.refuse_body(told or error)
            current.lose()
            self._end(is_body_complete=False)

    # What follows is ours alone.

    def _start(self, request: HttpRequest) -> None:
        self._current = request
        self._since = self._server.now
        if self._task is None:
            self._task = self._loop.create_task(self._serve())
        request.task = self._task
        self._give_turn()

    async def _serve(self) -> None:
        """Answer one request after the other. One task for the connection's life: one per request costs more."""
        try:
            while not self._is_lost:
                request = self._current
                if request is None:
                    self._turn = self._loop.create_future()
                    await self._turn
                    self._turn = None
                    continue
                await self._server.dispatch(request)
                if self._current is request:  # it broke its promise to answer, or to abort
                    return
                if self._current is not None:
                    # The next of a pipeline is here already: other connections come first.
                    await asyncio.sleep(0)
        finally:
            if not self._is_lost:
                self.abort()

    def _give_turn(self) -> None:
        turn = self._turn
        if turn is not None and not turn.done():
            turn.set_result(None)

    def _next(self) -> None:
        """Answer the next request, if it is here already."""
        if self._queue:
            self._start(self._queue.popleft())
        if self._reader.has_rest and not self.is_full():
            self._reader.go_on()
        if self._current is None and self._tail_error is not None:
            error, self._tail_error = self._tail_error, None
            self._write_error(error)
            self._end(is_body_complete=False)
        if self._is_reading_paused:
            self._pace_reading()

    def _end(self, *, is_body_complete: bool) -> None:
        """Close when all is sent; keep on reading a body that still comes, or its end would reset our answer."""
        self._forget_queue()
        if is_body_complete or self._transport.is_closing():
            self._close()
            return
        self._is_lingering = True
        self._since = self._server.now
        self._transport.write_eof()
        self._pace_reading()

    def _close(self) -> None:
        """Close when all is sent."""
        self._reader.is_over = True
        self._blocked_since = self._server.now
        self._transport.close()

    def _forget_queue(self) -> None:
        for request in self._queue:
            self._server.forget_body(request)
        self._queue.clear()

    def _write_error(self, error: AppError) -> None:
        lines = self._server.refusal_lines(error) + header_lines(headers_of(error))
        self._transport.write(whole_answer(status_of(error), self.date_line + lines, body_of(error), closes=True))

    def _pace_reading(self) -> None:
        """Read, unless what was read already waits for somebody to ask for it."""
        receiving = self._reader.receiving
        is_ahead = (
            bool(self._queue)
            or self._reader.has_rest
            or (receiving is not None and not receiving.is_body_wanted and receiving.body_bytes > _UNASKED_BYTES_MAX)
        )
        if is_ahead == self._is_reading_paused or self._is_lost:
            return
        self._is_reading_paused = is_ahead
        if is_ahead:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _wake_drained(self) -> None:
        waiter, self._drain_waiter = self._drain_waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
