"""The headers of every answer of the data plane, under OpenAI's exact names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from inference.exchange import Exchange

# What a provider says about its answer that a caller may want. All else (cookies, its limits, its ids) stays here.
_PASSED_ON: Final = frozenset({b"openai-model", b"retry-after", b"content-encoding"})


def answer_lines(exchange: Exchange, content_type: bytes) -> bytes:
    """Return the header lines that stand before every body, on streams and on errors too."""
    # Text, encoded once: formatting bytes costs three times as much, a list of pairs nine times.
    lines = (
        f"content-type: {content_type.decode('latin-1')}\r\n"
        f"x-request-id: {exchange.request_id}\r\n"
        f"openai-processing-ms: {int((time.perf_counter() - exchange.started_at) * 1000)}\r\n"
        "openai-version: 2020-10-01\r\n"
        "access-control-expose-headers: X-Request-ID\r\n"
        "x-content-type-options: nosniff\r\n"
    )
    reservation = exchange.reservation
    if reservation is not None:
        lines += _limit_text(reservation.shown)
        if reservation.is_local:
            lines += "x-quota-mode: local\r\n"
    return lines.encode("latin-1")


def limit_lines(shown: Sequence[int] | None) -> bytes:
    """Return the `x-ratelimit-*` headers for the limits that hold; *shown* is what the quota's script said of them."""
    return _limit_text(shown).encode()


def _limit_text(shown: Sequence[int] | None) -> str:
    if shown is None:
        return ""
    limit, remaining, reset_ms, tokens_limit, tokens_remaining, tokens_reset_ms = shown[:6]
    text = ""
    if limit >= 0:
        text = (
            f"x-ratelimit-limit-requests: {limit}\r\n"
            f"x-ratelimit-remaining-requests: {remaining}\r\n"
            f"x-ratelimit-reset-requests: {go_duration(reset_ms)}\r\n"
        )
    if tokens_limit >= 0:
        text += (
            f"x-ratelimit-limit-tokens: {tokens_limit}\r\n"
            f"x-ratelimit-remaining-tokens: {tokens_remaining}\r\n"
            f"x-ratelimit-reset-tokens: {go_duration(tokens_reset_ms)}\r\n"
        )
    return text


def passed_on(upstream_headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return the provider's headers that the caller gets. Their values were checked when they were parsed."""
    lines = b""
    for name, value in upstream_headers:
        if name in _PASSED_ON:
            lines += b"%b: %b\r\n" % (name, value)
    return lines


def cost_line(usd: str) -> bytes:
    """Return the header that says what the call is charged; nothing where nobody can say."""
    return f"x-request-cost-usd: {usd}\r\n".encode() if usd else b""


@lru_cache(maxsize=4096)
def go_duration(milliseconds: int) -> str:
    """Return a duration as Go prints it, the form of OpenAI's headers: `0s`, `120ms`, `1.5s`, `6m0s`."""
    if milliseconds <= 0:
        return "0s"
    if milliseconds < 1_000:
        return f"{milliseconds}ms"
    minutes, rest_ms = divmod(milliseconds, 60_000)
    seconds = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".")
    if not minutes:
        return f"{seconds}s"
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}h' if hours else ''}{minutes}m{seconds}s"
