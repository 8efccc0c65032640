"""One request to an upstream as values, and its head as bytes."""

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal
from urllib.parse import urlsplit

import msgspec

DEFAULT_PORTS = {"http": 80, "https": 443}
# Without a body these still say content-length: 0, since a server may otherwise wait for one (RFC 9110, 8.6).
METHODS_WITH_BODY = frozenset({b"POST", b"PUT", b"PATCH"})
# Framing is the client's business alone: a second framing header is how requests are smuggled. The others belong to
# one hop (RFC 9110, 7.6.1), and `expect` would make us wait for a 100 we do not wait for.
CLIENT_HEADERS = frozenset(
    (
        b"connection content-length expect host http2-settings keep-alive proxy-authorization proxy-connection te "
        b"trailer transfer-encoding upgrade"
    ).split()
)
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
TARGET = re.compile(rb"/[\x21-\x22\x24-\x7e]*")  # visible ASCII without "#": a fragment never leaves the client
HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
CONTROL_OR_SPACE = re.compile(r"[\x00-\x20\x7f\\]")


class Origin(msgspec.Struct, frozen=True, cache_hash=True):
    """Where an upstream is. *host* is lower-case ASCII (IDNA already applied), an IPv6 address without brackets."""

    scheme: Literal["http", "https"]
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The `Host` header's value: brackets around IPv6, no port where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def address(self) -> str:
        """Host and port, always both: for messages and for `CONNECT`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Deadlines(msgspec.Struct, frozen=True):
    """How long each phase of one exchange may take. All are in seconds and none is optional."""

    connect_seconds: float
    """Waiting for a free connection, name lookup, TCP, proxy and TLS together; a stale retry starts it anew."""
    first_byte_seconds: float
    """From the last piece of the request handed to the network until the response head is complete."""
    idle_seconds: float
    """Between two pieces of the body. Does not run while we ourselves have stopped reading."""
    total_seconds: float
    """From `send` to the last byte of the body."""


class UpstreamRequest(msgspec.Struct):
    """One request. Neither *headers* nor *body* is shown by `repr`: they carry credentials and people's words."""

    origin: Origin
    method: bytes
    target: bytes
    """Path and query in origin form, starting with "/"."""
    headers: Sequence[tuple[bytes, bytes]]
    """Without Host, Content-Length and the other hop's headers (`CLIENT_HEADERS`), which are refused."""
    body: bytes

    def __repr__(self) -> str:
        return f"UpstreamRequest({self.method!r}, {self.origin.authority!r}, {len(self.body)} bytes)"


def parse_base_url(url: str) -> tuple[Origin, bytes]:
    """Return a base URL's origin and path prefix; the prefix has no trailing slash and is b"" for the root.

    Errors: ValueError, in words that may be shown to whoever typed the URL and that never repeat userinfo.
    """
    if CONTROL_OR_SPACE.search(url):
        raise ValueError("A base URL has no spaces, control characters or backslashes.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("The base URL's host or port is not valid.") from None
    scheme = parts.scheme
    if scheme not in ("http", "https"):
        raise ValueError("A base URL starts with http:// or https://.")
    if "@" in parts.netloc:
        raise ValueError("A base URL carries no user name or password; credentials belong to the provider's settings.")
    if "?" in url or "#" in url:
        raise ValueError("A base URL has no query and no fragment.")
    if not parts.hostname or port == 0 or parts.netloc.endswith(":"):
        raise ValueError("The base URL's host or port is not valid.")
    path = parts.path.rstrip("/")
    if not path.isascii():
        raise ValueError("A base URL's path is ASCII; percent-encode the rest.")
    literal_scheme: Literal["http", "https"] = "https" if scheme == "https" else "http"
    return Origin(literal_scheme, parse_host(parts.hostname), port or DEFAULT_PORTS[scheme]), path.encode()


def parse_host(host: str) -> str:
    """Return *host* in the form `Origin` wants. Errors: ValueError."""
    if ":" in host:
        if "%" in host:
            raise ValueError("The URL's IPv6 address names a zone, which means nothing to another machine.")
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise ValueError("The URL's IPv6 address is not valid.") from None
    try:
        name = host.lower() if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError("The URL's host name is not valid.") from None
    if len(name) > 253 or not HOST_NAME.fullmatch(name):
        raise ValueError("The URL's host name is not valid.")
    return name


def encode_head(request: UpstreamRequest, target_prefix: bytes, fixed_lines: bytes) -> bytes:
    """Return the request's head. *target_prefix* makes the absolute form for a proxy, *fixed_lines* holds Host.

    Errors: ValueError for a target, a header name or a value that could break out of its line, without quoting it.
    """
    line = request_line(request.method, target_prefix, request.target)
    start = start_of_head(line, fixed_lines, tuple(request.headers))
    if request.body or request.method in METHODS_WITH_BODY:
        return start + f"content-length: {len(request.body)}\r\n\r\n".encode()
    return start + b"\r\n"


@lru_cache(maxsize=1024)
def start_of_head(line: bytes, fixed_lines: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Return a head without its length and its end, checked. Errors: ValueError.

    Cached: to one provider a gateway sends the same head all day. The cache holds the credentials that these headers
    carry, as the settings they come from do.
    """
    parts = [line, fixed_lines]
    needs_encoding = True
    for name, value in headers:
        if is_accept_encoding(name):
            needs_encoding = False
        parts += (name, b": ", value, b"\r\n")
    lines_count = len(headers) + fixed_lines.count(b"\n") + 1
    if needs_encoding:
        # Usage is read from the body as it passes, so it has to arrive readable unless the caller says otherwise.
        parts.append(b"accept-encoding: identity\r\n")
        lines_count += 1
    start = b"".join(parts)
    # One count over the whole head sees what each value could hide: a line break in any of them adds to it.
    if start.count(b"\n") != lines_count or start.count(b"\r") != lines_count or b"\0" in start:
        raise ValueError("A request header's value contains a line break or a NUL.")
    return start


@lru_cache(maxsize=1024)
def request_line(method: bytes, target_prefix: bytes, target: bytes) -> bytes:
    """Return the checked request line. Cached: a gateway asks the same few targets all day. Errors: ValueError."""
    if not TOKEN.fullmatch(method) or method == b"CONNECT":
        raise ValueError("The request's method is not an HTTP token.")
    if not TARGET.fullmatch(target):
        raise ValueError("The request's target is not a path of visible ASCII.")
    return b"%b %b%b HTTP/1.1\r\n" % (method, target_prefix, target)


def is_accept_encoding(name: bytes) -> bool:
    """Check a header name, and tell whether it is Accept-Encoding. Errors: ValueError for one that is not allowed."""
    if not TOKEN.fullmatch(name):
        raise ValueError("A request header's name is not an HTTP token.")
    lowered = name.lower()
    if lowered in CLIENT_HEADERS:
        raise ValueError(f"The header {lowered.decode()} is the HTTP client's own; leave it out.")
    return lowered == b"accept-encoding"
