"""Where a response begins and ends in the bytes of a connection: httptools finds it, this module bounds it.

llhttp (strict by default) itself refuses obs-fold, bytes that are no header, bare CR or LF, a repeated Content-Length
(equal ones too), Content-Length beside Transfer-Encoding, and chunk sizes that are no plain hexadecimal number. It
lets through, and this module refuses: other protocols' names, HTTP/0.9 and /2.0, any Transfer-Encoding but one
`chunked`, heads, chunk extensions and trailers without bound, 101, and a second message after the one we asked for.
"""

import httptools

from core.http1.errors import ProtocolViolated
from core.http1.response import Http1Response, ResponseSource

HEAD_BYTES_MAX = 65_536
HEADERS_MAX = 200
INTERIM_RESPONSES_MAX = 8
# Chunk sizes, extensions and trailers: what one response may spend on framing beside its body. 16 bytes per body byte
# lets an upstream send single characters as chunks (6 bytes each); the constant allows for trailers and extensions.
FRAMING_BYTES_FREE = 65_536
FRAMING_BYTES_PER_BODY_BYTE = 16
START = b"HTTP/1."


class ResponseFraming:
    """Finds one response after another on one connection. After `close` it is of no further use."""

    __slots__ = (
        "_headers",
        "_interim_count",
        "_is_chunked",
        "_is_head_only",
        "_is_in_step",
        "_is_version_known",
        "_keeps_alive",
        "_parser",
        "_pieces",
        "_received_bytes",
        "_source",
        "_trailing_bytes",
        "body_bytes",
        "ends_at_eof",
        "has_surplus",
        "is_complete",
        "response",
    )

    def __init__(self, source: ResponseSource) -> None:
        self._source = source
        self._parser: httptools.HttpResponseParser | None = None
        self._is_in_step = False

    def begin(self, *, is_head_only: bool) -> None:
        """Get ready for the next response; *is_head_only* for the answer to HEAD, whose length is void."""
        if not self._is_in_step:  # the first response, or the parser still waits for a body that never comes
            self._parser = httptools.HttpResponseParser(self)
        self._is_in_step = False
        self._is_head_only = is_head_only
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._received_bytes = 0
        self._trailing_bytes = 0
        self._interim_count = 0
        self._is_chunked = False
        self._keeps_alive = False
        self.body_bytes = 0
        self.ends_at_eof = True
        """Whether the body has no other end than the connection's. Means something once there is a response."""
        self.is_complete = False
        self.has_surplus = False
        self.response: Http1Response | None = None

    @property
    def has_started(self) -> bool:
        """Whether a byte of the response has arrived."""
        return self._received_bytes > 0

    @property
    def is_reusable(self) -> bool:
        """Whether another request may follow on this connection."""
        return self.is_complete and self._keeps_alive and not self.has_surplus

    def feed(self, received: bytes) -> None:
        """Parse what arrived. Errors: ProtocolViolated; what came before the violation stays readable."""
        if not self._received_bytes:
            self._is_version_known = received.startswith(START)
            if not self._is_version_known and not START.startswith(received):
                raise ProtocolViolated("The upstream did not answer with an HTTP/1.x response.")
        self._received_bytes += len(received)
        body_bytes_before = self.body_bytes
        parser = self._parser
        assert parser is not None, "begin() comes first"
        try:
            parser.feed_data(received)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.is_complete:
                raise as_violation(error) from None
            self.has_surplus = True
        if self.is_complete:
            if not self.has_surplus and ends_in_stray_lines(received, self._pieces, is_chunked=self._is_chunked):
                self.has_surplus = True
        elif self.response is None:
            if self._received_bytes > HEAD_BYTES_MAX or len(self._headers) > HEADERS_MAX:
                raise head_too_large()
        elif self._is_chunked:
            self._bound_framing(len(received), self.body_bytes - body_bytes_before)

    def close(self) -> None:
        """Drop the parser, which refers back to this object: without it, no garbage collection is needed."""
        self._parser = None

    def _bound_framing(self, received_bytes: int, delivered_bytes: int) -> None:
        """Refuse a body that is nearly all framing, and a long run of framing without a body byte (a trailer, say)."""
        framing_bytes = self._received_bytes - self.body_bytes
        if framing_bytes > 2 * FRAMING_BYTES_FREE + FRAMING_BYTES_PER_BODY_BYTE * self.body_bytes:
            raise ProtocolViolated("The upstream's chunk extensions or trailers are too large.")
        if delivered_bytes:
            self._trailing_bytes = 0
            return
        self._trailing_bytes += received_bytes
        if self._trailing_bytes > FRAMING_BYTES_FREE:
            raise ProtocolViolated("The upstream's chunk extensions or trailers are too large.")

    # httptools calls the following.

    def on_message_begin(self) -> None:
        """Notice that something follows the response we asked for."""
        if self.is_complete:
            self.has_surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header; trailers are read over, they are of no use to an API client."""
        if self.response is not None:
            return
        name = name.lower()
        if name == b"content-length":
            self.ends_at_eof = False
        elif name == b"transfer-encoding":
            if self._is_chunked or value.rstrip().lower() != b"chunked":
                raise ProtocolViolated("The upstream uses a Transfer-Encoding other than chunked.")
            self._is_chunked = True
            self.ends_at_eof = False
        self._headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Make the response, unless this head is an interim one or comes after the end."""
        if self.is_complete:
            return
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        headers = self._headers
        if len(headers) > HEADERS_MAX or (self._received_bytes > HEAD_BYTES_MAX and is_too_large(headers)):
            raise head_too_large()
        if self._is_chunked or not self._is_version_known:
            version = parser.get_http_version()
            # RFC 9112, 6.1: HTTP/1.0 knows no Transfer-Encoding, so its framing cannot be trusted.
            if version != "1.1" and (version != "1.0" or self._is_chunked):
                raise ProtocolViolated("The upstream mixes HTTP versions.")
        if status < 200:
            self._skip_interim(status)
            return
        self.response = Http1Response(status, headers, self._pieces, self._source)
        if self._is_head_only or status in (204, 304):
            self.is_complete = True
            self._keeps_alive = parser.should_keep_alive()

    def on_body(self, piece: bytes) -> None:
        """Keep a piece of the body."""
        if self.is_complete:
            self.has_surplus = True
            return
        self._pieces.append(piece)
        self.body_bytes += len(piece)

    def on_message_complete(self) -> None:
        """Note the end of the response, and whether the upstream lets the connection live."""
        if self.response is None or self.has_surplus:
            return  # the end of an interim response, or of one nobody asked for
        parser = self._parser
        assert parser is not None
        self._is_in_step = True
        self.is_complete = True
        self._keeps_alive = parser.should_keep_alive()

    def _skip_interim(self, status: int) -> None:
        self._interim_count += 1
        if status < 100 or status == 101:
            raise ProtocolViolated(f"The upstream answered with status {status:03d}, which nobody asked for.")
        if self._interim_count > INTERIM_RESPONSES_MAX:
            raise ProtocolViolated(f"The upstream sent more than {INTERIM_RESPONSES_MAX} interim responses.")
        self._headers = []
        self._is_chunked = False
        self.ends_at_eof = True
        self._is_version_known = False


def as_violation(error: Exception) -> ProtocolViolated:
    """Turn the parser's error into ours; its reasons are fixed sentences that quote nothing."""
    if isinstance(error.__context__, ProtocolViolated):  # raised in one of our callbacks
        return error.__context__
    if isinstance(error, httptools.HttpParserUpgrade):
        return ProtocolViolated("The upstream switched protocols, which nobody asked for.")
    return ProtocolViolated(f"The upstream's response is malformed: {error}.")


def head_too_large() -> ProtocolViolated:
    """Return the error for a head beyond its bounds."""
    return ProtocolViolated(f"The upstream's head is larger than {HEAD_BYTES_MAX} bytes or {HEADERS_MAX} headers.")


def is_too_large(headers: list[tuple[bytes, bytes]]) -> bool:
    """Tell a large head from a small one that came in one piece with a large body."""
    return sum(len(name) + len(value) + 4 for name, value in headers) > HEAD_BYTES_MAX


def ends_in_stray_lines(received: bytes, pieces: list[bytes], *, is_chunked: bool) -> bool:
    """Tell whether line ends follow the response's last byte in *received*; llhttp skips them without a word.

    A body that ends in the same byte as the stray line hides it. That is harmless, because llhttp skips the line before
    the next response as well; it is refused where it shows because an upstream that miscounts once will do so again.
    """
    if pieces and not is_chunked:
        return received[-1] != pieces[-1][-1]
    return received.endswith(b"\r\n\r\n\r\n") or not received.endswith((b"\r\n", b"\n")[len(received) == 1])
