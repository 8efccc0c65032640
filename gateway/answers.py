"""The headers of every answer of the data plane, under OpenAI's exact names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from gateway.errors import Headers
from inference.exchange import Exchange
from keys.errors import RateLimitReached
from keys.limits import Window

_FIXED: Final = (
    (b"openai-version", b"2020-10-01"),
    (b"access-control-expose-headers", b"X-Request-ID"),
    (b"x-content-type-options", b"nosniff"),
)
# What a provider says about its answer that a caller may want. All else (cookies, its limits, its ids) stays here.
_PASSED_ON: Final = frozenset({b"openai-model", b"retry-after", b"content-encoding"})


def answer_headers(exchange: Exchange, content_type: bytes) -> Headers:
    """Return the headers that stand before every body, on streams and on errors too."""
    elapsed_ms = (time.perf_counter() - exchange.started_at) * 1000
    headers: Headers = [
        (b"content-type", content_type),
        (b"x-request-id", exchange.request_id.encode()),
        (b"openai-processing-ms", b"%d" % elapsed_ms),
        *_FIXED,
    ]
    reservation = exchange.reservation
    if reservation is not None:
        add_limits(headers, reservation.requests, reservation.tokens_window)
        if reservation.is_local:
            headers.append((b"x-quota-mode", b"local"))
    return headers


def denial_headers(headers: Headers, error: RateLimitReached) -> None:
    """Add what is left of the limits to the answer of a call that was refused."""
    add_limits(headers, error.requests, error.tokens)


def add_limits(headers: Headers, requests: Window | None, tokens: Window | None) -> None:
    """Add the `x-ratelimit-*` headers for the limits that hold."""
    if requests is not None:
        headers += (
            (b"x-ratelimit-limit-requests", b"%d" % requests.limit),
            (b"x-ratelimit-remaining-requests", b"%d" % requests.remaining),
            (b"x-ratelimit-reset-requests", go_duration(requests.reset_ms)),
        )
    if tokens is not None:
        headers += (
            (b"x-ratelimit-limit-tokens", b"%d" % tokens.limit),
            (b"x-ratelimit-remaining-tokens", b"%d" % tokens.remaining),
            (b"x-ratelimit-reset-tokens", go_duration(tokens.reset_ms)),
        )


def passed_on(upstream_headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Return the provider's headers that the caller gets."""
    return [(name, value) for name, value in upstream_headers if name in _PASSED_ON]


def go_duration(milliseconds: int) -> bytes:
    """Return a duration as Go prints it, the form of OpenAI's headers: `0s`, `120ms`, `1.5s`, `6m0s`."""
    if milliseconds <= 0:
        return b"0s"
    if milliseconds < 1_000:
        return b"%dms" % milliseconds
    minutes, rest_ms = divmod(milliseconds, 60_000)
    seconds = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".")
    if not minutes:
        return f"{seconds}s".encode()
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}h' if hours else ''}{minutes}m{seconds}s".encode()
