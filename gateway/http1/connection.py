"""One caller's connection: finds the requests in its bytes, has them answered one after the other.

llhttp (strict by default) itself refuses obs-fold, bytes that are no header, bare CR or LF, a repeated Content-Length,
Content-Length beside Transfer-Encoding, and chunk sizes that are no plain hexadecimal number. It lets through, and this
module refuses: versions other than 1.0 and 1.1, any Transfer-Encoding but one `chunked`, no Host or several, heads,
chunk extensions and trailers without bound, and changes of protocol (which are ignored, as RFC 9110, 7.8 allows).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final, cast

import httptools

from core.errors import AppError
from gateway.errors import (
    ClientGone,
    FramingUnsupported,
    GatewayFull,
    HeadTooLarge,
    MethodNotAllowed,
    RequestMalformed,
    RequestTimedOut,
    body_of,
    headers_of,
    status_of,
)
from gateway.http1.request import HttpRequest, Wire, header_lines, whole_answer
from gateway.http1.state import ServerState

HEAD_BYTES_MAX: Final = 64 * 1024
HEADERS_MAX: Final = 100
# Of a body that nobody has asked for yet; more than that stays in the network.
_UNASKED_BYTES_MAX: Final = 64 * 1024
# Bodies up to this size are always taken in: they are what most calls have.
_SMALL_BODY_BYTES: Final = 64 * 1024
# What a body may spend on chunk sizes, extensions and trailers; 16 bytes per byte allow for chunks of one byte.
_FRAMING_BYTES_FREE: Final = 64 * 1024
_FRAMING_BYTES_PER_BODY_BYTE: Final = 16
# Longer than the 60 s after which load balancers close, so that it is they who do: then no request meets a closed door.
_IDLE_SECONDS_MAX: Final = 75.0
_BODY_SECONDS_MAX: Final = 60.0
# How long the rest of a refused body is read, so that the caller reads the answer instead of a reset.
_LINGER_SECONDS_MAX: Final = 10.0
_LINGER_BYTES_MAX: Final = 32 * 1024 * 1024
# As much is parsed before bounds are looked at.
_SLICE_BYTES: Final = 16 * 1024
# How long an answer that is complete may wait for a caller who does not read.
_FLUSH_SECONDS_MAX: Final = 60.0
_VERSIONS: Final = frozenset({"1.0", "1.1"})
_ONCE_ONLY: Final = frozenset({b"host", b"transfer-encoding", b"content-length", b"expect"})


class ServerConnection(asyncio.Protocol, Wire):
    """An asyncio Protocol. It has no timer of its own: the server calls `check` twice a second."""

    __slots__ = (
        "_current",
        "_drain_waiter",
        "_framing_bytes",
        "_head_bytes",
        "_headers",
        "_is_in_head",
        "_is_lingering",
        "_is_lost",
        "_is_over",
        "_is_reading_paused",
        "_loop",
        "_parser",
        "_queue",
        "_receiving",
        "_server",
        "_since",
        "_tail_error",
        "_target",
        "_transport",
        "_was_used",
        "is_blocked",
        "peer_address",
    )

    def __init__(self, server: ServerState, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._headers: list[tuple[bytes, bytes]] = []
        self._target = b""
        self._head_bytes = 0
        self._framing_bytes = 0
        self._is_in_head = False
        self._is_lingering = False
        self._is_lost = False
        self._is_over = False
        """Whether nothing more is taken from this connection: what still comes is thrown away."""
        self._is_reading_paused = False
        self._was_used = False
        self._current: HttpRequest | None = None
        """The request that is being answered."""
        self._receiving: HttpRequest | None = None
        """The request whose body is arriving."""
        self._queue: deque[HttpRequest] = deque()
        """Requests that came before the one before them was answered."""
        self._tail_error: AppError | None = None
        self._drain_waiter: asyncio.Future[None] | None = None
        self._since = server.now
        """When the present state began: opened, idle, a head begun, lingering, blocked. On the server's clock."""
        self.is_blocked = False
        self.peer_address = ""

    @property
    def date_line(self) -> bytes:
        """The `Date` header of this moment."""
        return self._server.date_line

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered, or an answer is still on its way out."""
        return self._current is not None or self.is_blocked

    def must_close(self) -> bool:
        """Tell whether the server is on its way out."""
        return self._server.is_draining

    def check(self, now: float) -> None:
        """Close what has taken too long. *now* is on the server's clock."""
        age_seconds = now - self._since
        current = self._current
        if current is not None:
            # Whoever answers has clocks of its own; how long a body may take is the same for all.
            if current is self._receiving and not current.is_started and age_seconds > _BODY_SECONDS_MAX:
                self._refuse(RequestTimedOut())
        elif self._is_lingering:
            if age_seconds > _LINGER_SECONDS_MAX:
                self.abort()
        elif self.is_blocked or self._transport.is_closing():
            if age_seconds > _FLUSH_SECONDS_MAX:
                self.abort()
        elif self._is_in_head:
            if age_seconds > self._server.head_seconds_max:
                self._refuse(RequestTimedOut())
        elif age_seconds > (_IDLE_SECONDS_MAX if self._was_used else self._server.head_seconds_max):
            self._transport.close()

    def close_if_idle(self) -> None:
        """Close unless a request is here, or a part of one."""
        if not self.is_busy and not self._is_in_head and not self._is_lingering:
            self._transport.close()

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
        self._server.bodies_bytes -= request.body_bytes
        request.drop_body()
        self._current = None
        self._was_used = True
        self._since = self._server.now
        if request.closes:
            self._end(is_body_complete=request.is_body_complete)
        elif not self.is_blocked:
            self._next()

    def abort(self) -> None:
        """Close at once, without sending what is left."""
        self._is_over = True
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
            self._refuse(GatewayFull())

    def data_received(self, data: bytes) -> None:
        """Parse what arrived. Nothing behind a malformed byte is ever read as a request."""
        if self._is_over:
            self._throw_away(len(data))
        elif len(data) <= _SLICE_BYTES:
            self._feed(data)
        else:
            # In slices, so that bounds hold inside what arrived at once as well.
            view = memoryview(data)
            for at in range(0, len(data), _SLICE_BYTES):
                if not self._is_over:
                    self._feed(view[at : at + _SLICE_BYTES])

    def eof_received(self) -> None:
        """Close: a caller who has stopped sending is gone, as it is for nginx and for Go's server."""
        receiving = self._receiving
        if receiving is not None and not receiving.is_ended:
            self._refuse(RequestMalformed("The request body broke off."), told=ClientGone())
        if self._current is not None:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - gone is gone
        """Tell all whose request came this way."""
        self._is_lost = True
        self._is_over = True
        self._parser = None  # it refers back to this object: without it, no garbage collection is needed
        self._server.connections.discard(self)
        current, self._current, self._receiving = self._current, None, None
        if current is not None:
            self._server.bodies_bytes -= current.body_bytes
            current.lose()
        for waiting in self._queue:
            self._server.bodies_bytes -= waiting.body_bytes
            waiting.drop_body()
        self._queue.clear()
        self._wake_drained()

    def pause_writing(self) -> None:
        """Note that the caller reads more slowly than it is sent to."""
        self.is_blocked = True
        self._since = self._server.now

    def resume_writing(self) -> None:
        """Go on where the caller had stopped."""
        self.is_blocked = False
        self._wake_drained()
        if self._current is None and not self._is_lingering and not self._transport.is_closing():
            self._next()

    # The parser calls the following.

    def on_message_begin(self) -> None:
        """Begin a head."""
        self._is_in_head = True
        self._head_bytes = 0
        self._headers = []
        self._target = b""
        if self._current is None:
            self._since = self._server.now

    def on_url(self, piece: bytes) -> None:
        """Keep a piece of the target."""
        self._target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header. Trailers are read over: nothing behind a body says who calls."""
        if self._is_in_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Make a request of the head and have it answered, or refuse it."""
        self._is_in_head = False
        if self._is_over:
            return
        headers = self._headers
        parser = self._parser
        version = parser.get_http_version()
        request = HttpRequest(self, parser.get_method(), self._target, headers)
        request.is_http10 = version == "1.0"
        request.closes = not parser.should_keep_alive() or parser.should_upgrade()
        error = _framing(request, headers, version)
        if error is not None:
            self._receiving = None
            self._refuse(error)
            return
        self._receiving = request
        self._framing_bytes = 0
        if self._current is None:
            self._start(request)
        else:
            self._queue.append(request)
            self._pace_reading()

    def on_body(self, piece: bytes) -> None:
        """Hand a piece of the body to its request, as long as all bodies together fit in memory."""
        request = self._receiving
        if request is None or self._is_over:
            return
        before = request.body_bytes
        request.add(piece)
        server = self._server
        server.bodies_bytes += request.body_bytes - before
        if server.bodies_bytes > server.bodies_bytes_max and request.body_bytes > _SMALL_BODY_BYTES:
            server.bodies_bytes -= request.body_bytes
            request.refuse_body(GatewayFull())

    def on_message_complete(self) -> None:
        """Note the end of a body."""
        request = self._receiving
        if request is None or self._is_over:
            return
        self._receiving = None
        request.complete_body()
        if self._is_lingering:
            self._is_over = True
            self._transport.close()
        elif request.closes:
            self._is_over = True  # the caller said that it sends no more

    # What follows is ours alone.

    def _feed(self, data: bytes | memoryview) -> None:
        receiving = self._receiving
        body_bytes_before = receiving.body_bytes if receiving is not None else 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._is_over = True  # we stay with HTTP/1.1; what follows is in a protocol that we did not agree to
        except httptools.HttpParserError:
            self._refuse(RequestMalformed())
        if self._is_over:
            return
        if self._is_lingering:
            self._throw_away(len(data))
        elif self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse(HeadTooLarge())
        elif receiving is not None and receiving is self._receiving and receiving.takes_body:
            self._bound_body(receiving, len(data), body_bytes_before)

    def _throw_away(self, size_bytes: int) -> None:
        """Read over what nobody wants, up to a bound."""
        self._framing_bytes += size_bytes
        if self._framing_bytes > _LINGER_BYTES_MAX:
            self.abort()

    def _start(self, request: HttpRequest) -> None:
        self._current = request
        self._since = self._server.now
        request.task = self._loop.create_task(self._server.dispatch(request))

    def _next(self) -> None:
        """Answer the next request, if it is here already."""
        if self._queue:
            self._start(self._queue.popleft())
        elif self._tail_error is not None:
            error, self._tail_error = self._tail_error, None
            self._write_error(error)
            self._end(is_body_complete=False)
        if self._is_reading_paused:
            self._pace_reading()

    def _end(self, *, is_body_complete: bool) -> None:
        """Close when all is sent; keep on reading a body that still comes, or its end would reset our answer."""
        self._queue.clear()
        if is_body_complete or self._transport.is_closing():
            self._is_over = True
            self._transport.close()
            return
        self._is_lingering = True
        self._framing_bytes = 0
        self._since = self._server.now
        self._transport.write_eof()
        self._pace_reading()

    def _refuse(self, error: AppError, *, told: AppError | None = None) -> None:
        """Answer with *error* behind what is being answered, and close. Nothing more is read as a request.

        Whoever waits for the body gets *told*, or else *error*.
        """
        if self._is_over:
            return
        self._is_over = True
        self._server.refused += 1
        current = self._current
        if self._is_lingering:
            self._transport.close()
        elif current is None:
            self._write_error(error)
            self._end(is_body_complete=False)
        elif current is not self._receiving:
            if self._receiving is not None:
                self._queue.remove(self._receiving)  # the one that is broken; those before it are whole
            self._tail_error = error
        elif current.is_started:
            self.abort()
        else:
            self._write_error(error)
            self._current = None
            self._server.bodies_bytes -= current.body_bytes
            current.refuse_body(told or error)
            current.lose()
            self._end(is_body_complete=False)

    def _write_error(self, error: AppError) -> None:
        lines = self._server.refusal_lines() + header_lines(headers_of(error))
        self._transport.write(whole_answer(status_of(error), self.date_line + lines, body_of(error), closes=True))

    def _bound_body(self, request: HttpRequest, received_bytes: int, body_bytes_before: int) -> None:
        if request.length is None:
            self._framing_bytes += received_bytes - max(0, request.body_bytes - body_bytes_before)
            if self._framing_bytes > _FRAMING_BYTES_FREE + _FRAMING_BYTES_PER_BODY_BYTE * request.body_bytes:
                self._refuse(RequestMalformed("The request's chunk extensions or trailers are too large."))
                return
        if not request.is_body_wanted:
            self._pace_reading()

    def _pace_reading(self) -> None:
        """Read, unless what was read already waits for somebody to ask for it."""
        receiving = self._receiving
        is_ahead = bool(self._queue) or (
            receiving is not None and not receiving.is_body_wanted and receiving.body_bytes > _UNASKED_BYTES_MAX
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


def _framing(request: HttpRequest, headers: list[tuple[bytes, bytes]], version: str) -> AppError | None:
    """Read what concerns this hop. Return why the request is not taken, if it is not."""
    found = dict(headers)
    error: AppError | None = None
    if len(headers) > HEADERS_MAX:
        error = HeadTooLarge()
    elif request.method == b"CONNECT":
        error = MethodNotAllowed("POST")
    elif version not in _VERSIONS:
        error = RequestMalformed("Unsupported HTTP version.")
    elif len(found) != len(headers) and _is_any_repeated(headers):
        error = RequestMalformed()
    elif b"host" not in found and not request.is_http10:
        error = RequestMalformed("A request needs a Host header.")
    request.expects_continue = not request.is_http10 and found.get(b"expect", b"").lower() == b"100-continue"
    encoding = found.get(b"transfer-encoding")
    length = found.get(b"content-length")
    if encoding is not None and (encoding.lower() != b"chunked" or request.is_http10):
        # llhttp would take other spellings; a proxy in front may have read the body's end elsewhere.
        error = error or FramingUnsupported()
    if length is not None:
        request.length = int(length)
    return error


def _is_any_repeated(headers: list[tuple[bytes, bytes]]) -> bool:
    names = [name for name, _ in headers if name in _ONCE_ONLY]
    return len(names) != len(set(names))
