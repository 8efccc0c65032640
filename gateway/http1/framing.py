"""What a request's head says about its way here: how long its body is, and whether it is taken at all.

llhttp (strict by default) itself refuses obs-fold, bytes that are no header, bare CR or LF, a repeated Content-Length,
Content-Length beside Transfer-Encoding, and chunk sizes that are no plain hexadecimal number. It lets through, and this
package refuses: versions other than 1.0 and 1.1 (RTSP/1.0 and ICE/1.0 are HTTP/1.0 to it, and so to us), any
Transfer-Encoding but one `chunked`, no Host or several, heads, chunk extensions and trailers without bound. An offered
change of protocol is not taken up (RFC 9110, 7.8).
"""

from __future__ import annotations

from typing import Final

from core.errors import AppError
from gateway.errors import FramingUnsupported, HeadTooLarge, MethodNotAllowed, RequestMalformed
from gateway.http1.request import HttpRequest

HEADERS_MAX: Final = 100
_VERSIONS: Final = frozenset({"1.0", "1.1"})
# Said twice, one of them is read here and the other elsewhere.
_ONCE_ONLY: Final = frozenset(
    {
        b"host",
        b"transfer-encoding",
        b"content-length",
        b"content-type",
        b"content-encoding",
        b"expect",
        b"idempotency-key",
    }
)


def read_framing(request: HttpRequest, version: str) -> AppError | None:
    """Read what concerns this hop. Return why the request is not taken, if it is not."""
    headers = request.headers
    found = request.found = dict(headers)
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
