"""One HTTP request and the answer to it, as a handler sees them."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Final

import httptools

from core.errors import AppError
from gateway.errors import BodyTooLarge, ClientGone, Headers

_PHRASES: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
# Also of the codes that only some providers and proxies use (498, 525, 530 …): they are passed on.
_STATUS_LINES: Final = {code: b"HTTP/1.1 %d %b\r\n" % (code, _PHRASES.get(code, b"")) for code in range(200, 600)}
# Statuses that have no body, and no length of one either (RFC 9110, 8.6).
_BODILESS: Final = frozenset({204, 304})
_CLOSE: Final = b"connection: close\r\n"
_CHUNKED: Final = b"transfer-encoding: chunked\r\n"
_END: Final = b"\r\n"
_CLOSE_END: Final = _CLOSE + _END


class Wire(abc.ABC):
    """The connection, as far as a request needs it; a base class because the two modules cannot import each other."""

    __slots__ = ()

    is_blocked: bool
    """Whether the caller takes less than it is sent."""
    peer_address: str

    @property
    @abc.abstractmethod
    def date_line(self) -> bytes:
        """The `Date` header of this moment."""

    @abc.abstractmethod
    def send(self, data: bytes) -> None:
        """Write *data*, or keep it until the caller takes it."""

    @abc.abstractmethod
    async def drained(self) -> None:
        """Return when the caller has taken most of what was sent, or is gone."""

    @abc.abstractmethod
    def read_on(self) -> None:
        """Read the rest of the body."""

    @abc.abstractmethod
    def finish(self, request: HttpRequest) -> None:
        """Go on behind *request*, which is answered."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Close at once."""

    @abc.abstractmethod
    def must_close(self) -> bool:
        """Tell whether the server is on its way out."""


class HttpRequest:
    """A request whose head has arrived. Exactly one task reads its body and answers it, once.

    An answer is `respond`, or `begin`, any number of `write`, and `end`. What is sent once the caller `is_gone` goes
    nowhere. Writing never waits; who writes more than a little awaits `drained` while it `is_blocked`.
    """

    __slots__ = (
        "_body",
        "_body_error",
        "_body_waiter",
        "_bytes_max",
        "_wire",
        "body_bytes",
        "closes",
        "expects_continue",
        "found",
        "headers",
        "is_body_complete",
        "is_body_wanted",
        "is_ended",
        "is_gone",
        "is_http10",
        "is_started",
        "length",
        "method",
        "on_hang_up",
        "path",
        "query",
        "task",
    )

    def __init__(self, wire: Wire, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.method = method
        self.path, _, self.query = (target if target.startswith(b"/") else _origin_form(target)).partition(b"?")
        self.headers = headers
        """Names in lower case, in the order and with the repetitions of the wire."""
        self.found: dict[bytes, bytes] = {}
        """The same by name. Of a repeated header it holds the last; those that matter here are never repeated."""
        self.length: int | None = None
        """What Content-Length says; None for chunks or no body."""
        self.body_bytes = 0
        """How much of the body is held in memory."""
        self.is_body_complete = False
        self.is_body_wanted = False
        self.is_started = False
        self.is_ended = False
        self.is_gone = False
        self.is_http10 = False
        self.closes = False
        """Whether the connection ends with this answer."""
        self.expects_continue = False
        self.on_hang_up: Callable[[], None] | None = None
        """Called once if the caller goes before the answer has ended."""
        self.task: asyncio.Task[Any] | None = None
        self._wire = wire
        self._body: bytes | bytearray = b""
        self._body_error: AppError | None = None
        self._body_waiter: asyncio.Future[None] | None = None
        self._bytes_max = 0

    @property
    def peer_address(self) -> str:
        """The address at the other end of the connection; "" where it has none."""
        return self._wire.peer_address

    @property
    def is_blocked(self) -> bool:
        """Whether the caller takes less than it is sent."""
        return self._wire.is_blocked

    @property
    def has_body(self) -> bool:
        """Whether the head announces a body."""
        return bool(self.length) or b"transfer-encoding" in self.found

    @property
    def takes_body(self) -> bool:
        """Whether anybody may still want the body."""
        return self._body_error is None and not self.is_ended

    def read_body_nowait(self, bytes_max: int) -> bytes | None:
        """Return the body if all of it is here and not larger than *bytes_max*: then `read_body` need not be asked."""
        if self.is_body_complete and self.body_bytes <= bytes_max and self._body_error is None and not self.is_gone:
            return bytes(self._body)
        return None

    async def read_body(self, bytes_max: int) -> bytes:
        """Return the body.

        Errors: BodyTooLarge before more than *bytes_max* bytes are in memory; GatewayFull when the bodies of all
        callers together are too large; RequestTimedOut; RequestMalformed; ClientGone.
        """
        if (self.length or 0) > bytes_max or self.body_bytes > bytes_max:
            self._body_error = BodyTooLarge(bytes_max)
        if not self.is_body_complete and self._body_error is None and not self.is_gone:
            self._bytes_max = bytes_max
            self.is_body_wanted = True
            if self.expects_continue and not self.body_bytes:
                self._wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._wire.read_on()
            self._body_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._body_waiter
            finally:
                self._body_waiter = None
        if self._body_error is not None:
            raise self._body_error
        if not self.is_body_complete or self.is_gone:
            raise ClientGone
        return bytes(self._body)

    def respond(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a whole answer. *lines* are header lines, each with its line end."""
        if self.is_gone or self.is_started:
            return
        self._close_if_due()
        lines = self._wire.date_line + lines
        answer = whole_answer(status, lines, body, closes=self.closes, is_head=self.method == b"HEAD")
        self.is_started = True
        self._wire.send(answer)
        self._end()

    def begin(self, status: int, lines: bytes, first: bytes) -> None:
        """Send the head of an answer whose length is unknown, together with its *first* bytes."""
        if self.is_gone or self.is_started:
            return
        # HTTP/1.0 knows no chunks: there the connection's end is the body's.
        self._close_if_due()
        head = b"%b%b%b%b\r\n%b" % (
            _STATUS_LINES[status],
            self._wire.date_line,
            lines,
            _CLOSE if self.is_http10 else (_CHUNKED + _CLOSE if self.closes else _CHUNKED),
            self._framed(first) if first else b"",
        )
        self.is_started = True
        self._wire.send(head)

    def write(self, data: bytes) -> bool:
        """Send the next bytes of an answer that has begun; tell whether the caller takes less than it is sent."""
        wire = self._wire
        if not self.is_gone and data:
            wire.send(self._framed(data))
        return wire.is_blocked

    def end(self, last: bytes = b"") -> None:
        """Send the *last* bytes of an answer that has begun."""
        if self.is_gone or self.is_ended:
            return
        tail = self._framed(last) if last else b""
        self._wire.send(tail if self.is_http10 else tail + b"0\r\n\r\n")
        self._end()

    async def drained(self) -> None:
        """Return when the caller has taken most of what was sent, or is gone."""
        await self._wire.drained()

    def abort(self) -> None:
        """Close the connection: what was sent is all that the caller gets. Does nothing after the end or a hang-up."""
        if not self.is_ended:
            self.is_ended = True
            if not self.is_gone:
                self._wire.abort()

    # The connection calls the following.

    def add(self, piece: bytes) -> None:
        """Keep a piece of the body, unless nobody wants it."""
        if not self.takes_body:
            return
        if not self.body_bytes:
            self._body = piece
        elif isinstance(self._body, bytearray):
            self._body += piece
        else:
            self._body = bytearray(self._body) + piece
        self.body_bytes += len(piece)
        if self.is_body_wanted and self.body_bytes > self._bytes_max:
            self.refuse_body(BodyTooLarge(self._bytes_max))

    def refuse_body(self, error: AppError) -> None:
        """Let who reads the body have *error*; what comes of it is thrown away."""
        self._body_error = error
        self.drop_body()
        self._wake()

    def drop_body(self) -> None:
        """Free the memory of the body."""
        self._body = b""
        self.body_bytes = 0

    def complete_body(self) -> None:
        """Note that the body has arrived."""
        self.is_body_complete = True
        self._wake()

    def lose(self) -> None:
        """Note that the caller is gone."""
        self.is_gone = True
        self._wake()
        on_hang_up = self.on_hang_up
        if on_hang_up is not None and not self.is_ended:
            self.on_hang_up = None
            on_hang_up()

    def _wake(self) -> None:
        """Let who waits for the body look again."""
        waiter = self._body_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _close_if_due(self) -> None:
        if self.is_http10 or not self.is_body_complete or self._wire.must_close():
            self.closes = True

    def _framed(self, data: bytes) -> bytes:
        return data if self.is_http10 else b"".join((f"{len(data):x}\r\n".encode(), data, _END))

    def _end(self) -> None:
        self.is_ended = True
        self.on_hang_up = None
        self._wire.finish(self)


def whole_answer(status: int, lines: bytes, body: bytes, *, closes: bool, is_head: bool = False) -> bytes:
    """Return an answer as bytes; *is_head* leaves the body out, whose length is still told."""
    if status in _BODILESS:
        return b"%b%b%b\r\n" % (_STATUS_LINES[status], lines, _CLOSE if closes else b"")
    length = f"content-length: {len(body)}\r\n".encode()
    end = _CLOSE_END if closes else _END
    return b"".join((_STATUS_LINES[status], lines, length, end, b"" if is_head else body))


def header_lines(headers: Sequence[tuple[bytes, bytes]] | Headers) -> bytes:
    """Return *headers* as they stand in a head."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def _origin_form(target: bytes) -> bytes:
    """Return path and query of a target in absolute form; what is no URL stays as it is, and is found nowhere."""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        return target
    path = url.path or b"/"
    return path + b"?" + url.query if url.query else path
