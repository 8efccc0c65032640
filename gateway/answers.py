"""The headers of every answer of the data plane, under OpenAI's exact names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from inference.exchange import Exchange

# One formatting per answer: building a list of pairs and joining it costs three times as much.
_HEAD: Final = (
    b"content-type: %b\r\n"
    b"x-request-id: %b\r\n"
    b"openai-processing-ms: %d\r\n"
    b"openai-version: 2020-10-01\r\n"
    b"access-control-expose-headers: X-Request-ID\r\n"
    b"x-content-type-options: nosniff\r\n"
)
_REQUESTS: Final = (
    b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\nx-ratelimit-reset-requests: %b\r\n"
)
_TOKENS: Final = b"x-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-tokens: %d\r\nx-ratelimit-reset-tokens: %b\r\n"
# What a provider says about its answer that a caller may want. All else (cookies, its limits, its ids) stays here.
_PASSED_ON: Final = frozenset({b"openai-model", b"retry-after", b"content-encoding"})


def answer_lines(exchange: Exchange, content_type: bytes) -> bytes:
    """Return the header lines that stand before every body, on streams and on errors too."""
    elapsed_ms = (time.perf_counter() - exchange.started_at) * 1000
    lines = _HEAD % (content_type, exchange.request_id.encode(), elapsed_ms)
    reservation = exchange.reservation
    if reservation is None:
        return lines
    lines += limit_lines(reservation.shown)
    return lines + b"x-quota-mode: local\r\n" if reservation.is_local else lines


def limit_lines(shown: Sequence[int] | None) -> bytes:
    """Return the `x-ratelimit-*` headers for the limits that hold; *shown* is what the quota's script said of them."""
    if shown is None:
        return b""
    lines = b""
    if shown[0] >= 0:
        lines = _REQUESTS % (shown[0], shown[1], go_duration(shown[2]))
    if shown[3] >= 0:
        lines += _TOKENS % (shown[3], shown[4], go_duration(shown[5]))
    return lines


def passed_on(upstream_headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return the provider's headers that the caller gets. Their values were checked when they were parsed."""
    return b"".join([b"%b: %b\r\n" % header for header in upstream_headers if header[0] in _PASSED_ON])


def cost_line(usd: str) -> bytes:
    """Return the header that says what the call is charged; nothing where nobody can say."""
    return b"x-request-cost-usd: %b\r\n" % usd.encode() if usd else b""


@lru_cache(maxsize=4096)
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
