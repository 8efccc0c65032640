"""From an error's kind to OpenAI's form: status, type, headers. Statuses are known here and nowhere below.

AppError
├── Invalid
│   ├── BodyTooLarge           413
│   ├── ContentTypeUnsupported 415
│   ├── FramingUnsupported     400, and the connection is closed
│   ├── RequestMalformed       400, and the connection is closed
│   ├── HeadTooLarge           431, and the connection is closed
│   ├── ClientGone             499, which only logs ever see
│   ├── IdempotencyKeyInvalid  400
│   ├── IdempotencyKeyReused   422
│   ├── MethodNotAllowed       405
│   └── RequestTimedOut        408
├── Conflict
│   ├── AnswerTooLarge         409
│   └── StillRunning           409
├── NotFound
│   └── RouteNotFound          404
└── Unavailable
    ├── GatewayFull            503
    └── GatewayStopping        503
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from core.errors import (
    AppError,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    PaymentRequired,
    RateLimited,
    Unauthenticated,
    Unavailable,
    UpstreamFailed,
)
from inference.errors import UpstreamTimedOut
from keys.errors import RateLimitReached
from keys.secrets import redact

Headers = list[tuple[bytes, bytes]]


class BodyTooLarge(Invalid):
    """The body is larger than this gateway takes."""

    code = "request_too_large"

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"The request body is larger than the maximum of {bytes_max} bytes.")


class ContentTypeUnsupported(Invalid):
    """The body is of a kind that the route does not take."""

    code = "unsupported_content_type"

    def __init__(self, expected: str) -> None:
        super().__init__(f"Unsupported content type: expected {expected}.")


class FramingUnsupported(Invalid):
    """The body's framing is one that a proxy in front may have read otherwise: what follows is not trusted."""

    code = "unsupported_transfer_encoding"

    def __init__(self) -> None:
        super().__init__("Unsupported transfer encoding.")


class RequestMalformed(Invalid):
    """What came is not HTTP as RFC 9112 has it."""

    code = "malformed_request"

    def __init__(self, message: str = "The request is malformed.") -> None:
        super().__init__(message)


class HeadTooLarge(Invalid):
    """The request's head is larger than this gateway takes."""

    code = "request_headers_too_large"

    def __init__(self) -> None:
        super().__init__("The request's headers are too large or too many.")


class ClientGone(Invalid):
    """The caller hung up, or has stopped reading: nobody will read an answer. 499 is what logs call it."""

    code = "client_gone"

    def __init__(self) -> None:
        super().__init__("The caller hung up.")


class MethodNotAllowed(Invalid):
    """The route exists, for another method."""

    code = "method_not_allowed"

    def __init__(self, allowed: str) -> None:
        super().__init__(f"Method not allowed: use {allowed}.")
        self.allowed = allowed


class RequestTimedOut(Invalid):
    """The request, head or body, did not arrive in time."""

    code = "request_timeout"

    def __init__(self) -> None:
        super().__init__("The request did not arrive in time.")


class IdempotencyKeyInvalid(Invalid):
    """The Idempotency-Key is empty, too long, or not plain text."""

    code = "idempotency_key_invalid"

    def __init__(self) -> None:
        super().__init__("Invalid Idempotency-Key: expected 1 to 255 printable ASCII characters.")


class IdempotencyKeyReused(Invalid):
    """The Idempotency-Key belongs to another request."""

    code = "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used with another request. Use a new one for each request.")


class AnswerTooLarge(Conflict):
    """The request was answered, and the answer is too large to be given again."""

    code = "idempotent_answer_too_large"

    def __init__(self) -> None:
        super().__init__("This request was answered before, and its answer was too large to be kept.")


class StillRunning(Conflict):
    """Another request with the same Idempotency-Key is still being worked on."""

    code = "idempotent_request_in_progress"

    def __init__(self) -> None:
        super().__init__(
            "A request with the same Idempotency-Key is still in progress. Please try again.", retry_after_seconds=5
        )


class RouteNotFound(NotFound):
    """Nothing is served under this path."""

    code = "unknown_url"

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Unknown request URL: {method[:16]} {path[:200]}.")


class GatewayFull(Unavailable):
    """As many calls are running and waiting as this process takes."""

    code = "overloaded"

    def __init__(self) -> None:
        super().__init__("The gateway is overloaded. Please try again.", retry_after_seconds=1)


class GatewayStopping(Unavailable):
    """This process is being stopped; another takes new calls."""

    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("The gateway is restarting. Please try again.", retry_after_seconds=1)


# The first class that fits, so the specific ones come first. The types are OpenAI's (openai-wire reference, 4.1).
_FORMS: Final[tuple[tuple[type[AppError], int, str], ...]] = (
    (BodyTooLarge, 413, "invalid_request_error"),
    (HeadTooLarge, 431, "invalid_request_error"),
    (ClientGone, 499, "invalid_request_error"),
    (ContentTypeUnsupported, 415, "invalid_request_error"),
    (IdempotencyKeyReused, 422, "invalid_request_error"),
    (MethodNotAllowed, 405, "invalid_request_error"),
    (RequestTimedOut, 408, "invalid_request_error"),
    (UpstreamTimedOut, 504, "server_error"),
    (Unauthenticated, 401, "invalid_request_error"),
    (Forbidden, 403, "invalid_request_error"),
    (NotFound, 404, "invalid_request_error"),
    (Invalid, 400, "invalid_request_error"),
    (Conflict, 409, "invalid_request_error"),
    (RateLimited, 429, "requests"),
    (PaymentRequired, 429, "insufficient_quota"),
    (UpstreamFailed, 502, "server_error"),
    (Unavailable, 503, "server_error"),
)
_INTERNAL: Final = "The server had an error while processing your request. Sorry about that!"


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's error object: all four names are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """What every error answer holds."""

    error: ErrorDetail


def status_of(error: Exception) -> int:
    """Return the HTTP status for *error*; 500 for what is not an AppError."""
    return _form(error)[0]


def body_of(error: Exception) -> bytes:
    """Return the JSON body for *error*. What is not an AppError shows nothing of itself."""
    return msgspec.json.encode(error_body(error))


def error_body(error: Exception) -> ErrorBody:
    """Return the body for *error* before it is encoded."""
    if not isinstance(error, AppError):
        return ErrorBody(ErrorDetail(_INTERNAL, "server_error", None, None))
    kind = _form(error)[1]
    if isinstance(error, RateLimitReached) and error.dimension.startswith("tokens"):
        kind = "tokens"
    # A message may quote what was sent, and what was sent in the wrong place may be a key.
    return ErrorBody(ErrorDetail(redact(error.message), kind, error.param, error.code))


def headers_of(error: Exception) -> Headers:
    """Return the headers that tell a client whether and when to try again.

    `Retry-After` is whole seconds and at least one, `retry-after-ms` exact; official clients read both.
    """
    headers: Headers = []
    if isinstance(error, AppError) and error.retry_after_seconds is not None:
        wait_seconds = error.retry_after_seconds
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(wait_seconds))))
        headers.append((b"retry-after-ms", b"%d" % max(1, math.ceil(wait_seconds * 1000))))
    if isinstance(error, PaymentRequired | AnswerTooLarge):
        # Official clients retry every 409 and 429 unless told otherwise; no retry helps here.
        headers.append((b"x-should-retry", b"false"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))  # RFC 9110, 15.5.6
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def _form(error: Exception) -> tuple[int, str]:
    for kind, status, name in _FORMS:
        if isinstance(error, kind):
            return status, name
    return 500, "server_error"
