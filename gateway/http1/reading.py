"""The requests in the bytes of one connection: llhttp finds them, this module bounds them."""

from __future__ import annotations

import abc
from typing import Any, Final

import httptools

from core.errors import AppError
from gateway.errors import GatewayFull, HeadTooLarge, RequestMalformed
from gateway.http1.framing import read_framing
from gateway.http1.request import HttpRequest, Wire
from gateway.http1.state import ServerState

HEAD_BYTES_MAX: Final = 64 * 1024
# Bodies up to this size are always taken in: they are what most calls have.
_SMALL_BODY_BYTES: Final = 64 * 1024
# What a body may spend on chunk sizes, extensions and trailers; 16 bytes per byte allow for chunks of one byte.
_FRAMING_BYTES_FREE: Final = 64 * 1024
_FRAMING_BYTES_PER_BODY_BYTE: Final = 16
# As much is parsed before bounds are looked at: of heads less, since 4 kB may hold a hundred pipelined requests.
_HEAD_SLICE_BYTES: Final = 4 * 1024
_BODY_SLICE_BYTES: Final = 16 * 1024
_THROWN_AWAY_BYTES_MAX: Final = 32 * 1024 * 1024


class Receiver(Wire):
    """The connection, as far as reading it needs it."""

    __slots__ = ()

    @abc.abstractmethod
    def head_begun(self) -> None:
        """Note the first byte of a request."""

    @abc.abstractmethod
    def take(self, request: HttpRequest) -> None:
        """Have *request* answered. Its body may still be arriving."""

    @abc.abstractmethod
    def body_ended(self, request: HttpRequest) -> None:
        """Note that all of *request* is here."""

    @abc.abstractmethod
    def is_full(self) -> bool:
        """Tell whether enough requests wait to be answered."""

    @abc.abstractmethod
    def refuse(self, error: AppError, *, told: AppError | None = None) -> None:
        """Answer with *error* and close. Who waits for the body gets *told*, or else *error*."""


class RequestReader:
    """Reads one connection. Once it `is_over` it throws away what still comes; nothing of that is ever a request."""

    __slots__ = (
        "_framing_bytes",
        "_head_bytes",
        "_headers",
        "_is_staying",
        "_parser",
        "_receiver",
        "_rest",
        "_server",
        "_target",
        "_thrown_away_bytes",
        "is_in_head",
        "is_over",
        "receiving",
    )

    def __init__(self, receiver: Receiver, server: ServerState) -> None:
        self._receiver: Any = receiver
        self._rest = b""
        """What arrived and is not parsed yet, because enough requests wait."""
        self._is_staying = False
        """Whether a new protocol was offered, and the body is read in this one."""
        self._server = server
        self._parser: Any = httptools.HttpRequestParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._target = b""
        self._head_bytes = 0
        self._framing_bytes = 0
        self._thrown_away_bytes = 0
        self.is_in_head = False
        self.is_over = False
        self.receiving: HttpRequest | None = None
        """The request whose body is arriving."""

    @property
    def has_rest(self) -> bool:
        """Whether something has arrived that was not looked at yet."""
        return bool(self._rest)

    def feed(self, data: bytes) -> None:
        """Take what arrived, and parse it as far as there is room for requests."""
        if not self._rest and len(data) <= _HEAD_SLICE_BYTES and not self._receiver.is_full():
            self._feed(data)
        else:
            self._rest += data
            self.go_on()

    def go_on(self) -> None:
        """Parse what is here: in slices, so that bounds hold inside what arrived at once as well."""
        view, at = memoryview(self._rest), 0
        while at < len(view) and (self.is_over or not self._receiver.is_full()):
            size = _HEAD_SLICE_BYTES if self.receiving is None else _BODY_SLICE_BYTES
            self._feed(view[at : at + size])
            at += size
        self._rest = bytes(view[at:])

    def close(self) -> None:
        """Cut the ties to parser and connection, which refer back to this object."""
        self.is_over = True
        self._rest = b""
        self._parser = self._receiver = self.receiving = None

    def _feed(self, data: bytes | memoryview) -> None:
        if self.is_over:
            self._throw_away(len(data))
            return
        receiving = self.receiving
        body_bytes_before = receiving.body_bytes if receiving is not None else 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._receiver.refuse(RequestMalformed())
        if self.is_over:
            return
        if self.is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._receiver.refuse(HeadTooLarge())
        elif receiving is not None and receiving is self.receiving:
            if not receiving.takes_body:
                self._throw_away(len(data))
            elif receiving.length is None:
                self._bound_framing(receiving, len(data), body_bytes_before)

    def _stay(self, rest: bytes | memoryview) -> None:
        """Go on in HTTP/1.1 when another protocol was offered, as a server may (RFC 9110, 7.8).

        llhttp takes what follows for the new protocol, a body too: another parser, told only of its framing, reads it.
        """
        request = self.receiving
        if request is None:
            self.is_over = True
            return
        self._is_staying = True
        self._parser = httptools.HttpRequestParser(self)
        framing = b"transfer-encoding: chunked" if request.length is None else b"content-length: %d" % request.length
        self._parser.feed_data(b"POST / HTTP/1.1\r\nhost: x\r\n%b\r\n\r\n" % framing)
        self._feed(rest)

    def _is_head_too_large(self) -> bool:
        """Tell whether a head that came in several slices was larger than its bound after its last one."""
        if not self._head_bytes:
            return False
        return len(self._target) + sum(len(name) + len(value) + 4 for name, value in self._headers) > HEAD_BYTES_MAX

    def _throw_away(self, size_bytes: int) -> None:
        """Read over what nobody wants, up to a bound."""
        self._thrown_away_bytes += size_bytes
        if self._thrown_away_bytes > _THROWN_AWAY_BYTES_MAX:
            self._receiver.abort()

    def _bound_framing(self, request: HttpRequest, received_bytes: int, body_bytes_before: int) -> None:
        """Refuse a body that is nearly all framing."""
        self._framing_bytes += received_bytes - max(0, request.body_bytes - body_bytes_before)
        if self._framing_bytes > _FRAMING_BYTES_FREE + _FRAMING_BYTES_PER_BODY_BYTE * request.body_bytes:
            self._receiver.refuse(RequestMalformed("The request's chunk extensions or trailers are too large."))

    # The parser calls the following.

    def on_message_begin(self) -> None:
        """Begin a head."""
        if self._is_staying:
            return
        self.is_in_head = True
        self._head_bytes = 0
        self._headers = []
        self._target = b""
        self._receiver.head_begun()

    def on_url(self, piece: bytes) -> None:
        """Keep a piece of the target."""
        if self.is_in_head:
            self._target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header. Trailers are read over: nothing behind a body says who calls."""
        if self.is_in_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Make a request of the head, or refuse it."""
        if self.is_over or not self.is_in_head:
            self.is_in_head = False
            return
        self.is_in_head = False
        parser = self._parser
        version = parser.get_http_version()
        request = HttpRequest(self._receiver, parser.get_method(), self._target, self._headers)
        request.is_http10 = version == "1.0"
        request.closes = not parser.should_keep_alive() or parser.should_upgrade()
        error = HeadTooLarge() if self._is_head_too_large() else read_framing(request, version)
        if error is not None:
            self.receiving = None
            self._receiver.refuse(error)
            return
        self._headers = []
        self.receiving = request
        self._framing_bytes = self._thrown_away_bytes = 0
        self._receiver.take(request)

    def on_body(self, piece: bytes) -> None:
        """Hand a piece of the body to its request, as long as all bodies together fit in memory."""
        request = self.receiving
        if request is None or self.is_over:
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
        request = self.receiving
        if request is None or self.is_over:
            return
        if request.has_body and not self._is_staying and self._parser.should_upgrade():
            return
        self.receiving = None
        self._receiver.body_ended(request)
