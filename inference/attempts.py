"""Retries and fallbacks: only before the first byte, and only where another attempt can help.

A failure that another deployment may not have is tried there at once; the only deployment is tried again after a short
pause. What the caller got wrong is passed on as the provider said it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

import msgspec

from core.clock import SystemClock
from core.errors import AppError
from core.http1.errors import (
    BodyTooLarge,
    ConnectFailed,
    ConnectionLost,
    ConnectTimedOut,
    ProtocolViolated,
    UpstreamError,
)
from inference.catalog import Deployment, Model
from inference.errors import NoDeploymentAvailable, UpstreamUnreachable
from inference.exchange import Exchange
from inference.metered import CallMeter
from inference.routing import Router
from inference.upstreams.base import Answer, HeldAnswer, Upstream, UpstreamCall
from inference.upstreams.sse import first_payload, has_event
from inference.wire import JSON, ParsedRequest

_ATTEMPTS_MAX: Final = 3
_PAUSE_SECONDS: Final = 0.1
_ERROR_BYTES_MAX: Final = 256 * 1024
_FIRST_BYTES_MAX: Final = 256 * 1024
# 529 is Anthropic's "overloaded". A 500 may be the request's own doing, but nobody can tell: another try is cheap.
_FAILED_STATUSES: Final = frozenset({500, 502, 503, 504, 520, 522, 524, 529})
# Wrong credentials are the operator's mistake: the caller must not read that their own key is wrong.
_OPERATOR_STATUSES: Final = frozenset({401, 403, 407})
# No OpenAI-compatible call is answered without a body.
_BODILESS_STATUSES: Final = frozenset({204, 205})
_ERROR_PREFIX_BYTES: Final = 8_192


class AttemptPolicy(msgspec.Struct, frozen=True):
    """Who chooses, who connects, and who writes down that it happens."""

    router: Router
    upstreams: Mapping[str, Upstream]
    meter: CallMeter


class _Refused(Exception):
    """An answer that another attempt may better; it is what the caller gets if none does."""

    def __init__(self, answer: HeldAnswer, rest_seconds: float | None) -> None:
        super().__init__(answer.status)
        self.answer = answer
        self.rest_seconds = rest_seconds


async def open_answer(
    policy: AttemptPolicy, exchange: Exchange, model: Model, request: ParsedRequest
) -> tuple[Answer, bytes]:
    """Return an answer, and what of its body was already read to know that it is good.

    Errors: UpstreamError, UpstreamUnreachable, NoDeploymentAvailable, ParameterUnsupported, LedgerUnavailable.
    """
    failed: list[Deployment] = []
    last: UpstreamError | _Refused | None = None
    for attempt in range(1, _ATTEMPTS_MAX + 1):
        deployment = _chosen(policy.router, model, failed)
        if deployment is None:
            break
        if deployment in failed:
            await asyncio.sleep(_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        exchange.attempts = attempt
        exchange.deployment = deployment
        is_first = deployment not in failed
        try:
            permit = policy.meter.begin(exchange, deployment, request)
            exchange.sent(request)
            call = UpstreamCall(exchange.endpoint, request, deployment, permit)
            answer = await policy.upstreams[deployment.provider.settings.kind].open(call)
            # An answer that is not streamed is judged by its status alone.
            first = b"" if answer.status == 200 and not request.is_stream else await _first_bytes(answer, call)
        except (UpstreamError, _Refused) as error:
            _note_failure(policy.router, deployment, error, is_first=is_first)
            last = error
            exchange.was_seen |= not isinstance(error, _Refused | ConnectFailed | ConnectTimedOut)
            failed.append(deployment)
        except BaseException as error:
            policy.router.released(deployment)
            if isinstance(error, AppError) or not is_permitted(exchange.intent):
                exchange.unseen()  # refused on our side, or given up before it was sent
            raise
        else:
            policy.router.succeeded(deployment)
            return answer, first
        if not policy.router.has_other(model, failed) and not _is_passing(last):
            break
    assert last is not None
    exchange.unseen()
    return _ended(last), b""


def is_permitted(intent: asyncio.Future[None] | None) -> bool:
    """Tell whether a call could be sent: its intent is durable."""
    return intent is not None and intent.done() and not intent.cancelled() and intent.exception() is None


def _chosen(router: Router, model: Model, failed: list[Deployment]) -> Deployment | None:
    """Return where to try next, None if nowhere. Errors: NoDeploymentAvailable if nothing was tried yet."""
    try:
        return router.choose(model, failed)
    except NoDeploymentAvailable:
        if not failed:
            raise
        return None


def _ended(last: UpstreamError | _Refused) -> Answer:
    """Return what the caller gets when no attempt helped. Errors: those of `open_answer`."""
    if isinstance(last, UpstreamError):
        raise last
    return _passed_on(last.answer)


def _note_failure(router: Router, deployment: Deployment, error: UpstreamError | _Refused, *, is_first: bool) -> None:
    """Count a failure against a deployment's health, once a call: one bad request must not rest it for everybody."""
    rest_seconds = error.rest_seconds if isinstance(error, _Refused) else None
    # A full provider is not a broken one: it is rested for as long as it asks, and not otherwise.
    is_only_full = isinstance(error, _Refused) and error.answer.status == 429 and rest_seconds is None
    if is_first and not is_only_full:
        router.failed(deployment, rest_seconds=rest_seconds)
    else:
        router.released(deployment)


async def _first_bytes(answer: Answer, call: UpstreamCall) -> bytes:
    """Return b"" for an answer that its status judges, else its bytes up to the first event.

    An error that comes as the first event of a 200 is an error: nothing was sent yet, so it becomes a plain one.
    """
    status = answer.status
    if not (200 <= status < 300 or 400 <= status < 600) or status in _BODILESS_STATUSES:
        answer.abort()
        raise ProtocolViolated(f"The upstream answered with status {status}.")
    if status >= 400:
        if status in _FAILED_STATUSES or status in _OPERATOR_STATUSES or status == 429:
            raise await _refusal(answer)
        return b""
    if not call.request.is_stream or not _is_events(answer):
        return b""
    first = b""
    while not has_event(first) and len(first) < _FIRST_BYTES_MAX:
        data = await answer.read()
        if not data:
            break
        first += data
    if b'"error"' in first[:_ERROR_PREFIX_BYTES]:
        error = _error_answer(first)
        if error is not None:
            answer.abort()
            raise _Refused(error, None)
    return first


async def _refusal(answer: Answer) -> _Refused:
    rest_seconds = _retry_after_seconds(answer) if answer.status in {429, 503} else None
    try:
        body = await answer.read_all(_ERROR_BYTES_MAX)
    except BodyTooLarge:
        body = b"{}"
    return _Refused(HeldAnswer(answer.status, answer.headers, body), rest_seconds)


def _passed_on(answer: HeldAnswer) -> Answer:
    """Return what the caller may see of the last failure. Errors: UpstreamUnreachable for what is not theirs."""
    if answer.status in _OPERATOR_STATUSES:
        error = UpstreamUnreachable("The model's provider refused the gateway's credentials.")
    elif answer.status in _FAILED_STATUSES or b'"insufficient_quota"' in answer.body:
        # The operator's account is empty, or the provider broken: neither is the caller's quota or mistake.
        error = UpstreamUnreachable("The model's provider failed to answer.")
    else:
        return answer
    error.add_note(f"status {answer.status}")
    raise error


def _is_passing(last: UpstreamError | _Refused) -> bool:
    """Tell whether the same deployment may well answer a moment later."""
    if isinstance(last, _Refused):
        return last.answer.status in _FAILED_STATUSES
    if isinstance(last, ConnectionLost):
        return not last.response_started
    return isinstance(last, ConnectFailed | ConnectTimedOut)


def _is_events(answer: Answer) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in answer.headers)


def _retry_after_seconds(answer: Answer) -> float | None:
    for name, value in answer.headers:
        if name == b"retry-after":
            text = value.decode("latin-1")
            if text.isdecimal():
                return float(text[:6])
            try:
                return max(0.0, (parsedate_to_datetime(text) - SystemClock().now()).total_seconds())
            except (ValueError, TypeError):
                return None
    return None


class _ErrorEvent(msgspec.Struct):
    error: msgspec.Raw = msgspec.Raw(b"null")


class _ErrorDetail(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None


def _error_answer(first: bytes) -> HeldAnswer | None:
    """Return the error in a stream's first event as an answer of its own, None if there is none."""
    payload = first_payload(first)
    try:
        event = msgspec.json.decode(payload, type=_ErrorEvent)
        detail = msgspec.json.decode(event.error, type=_ErrorDetail | None)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if detail is None:
        return None
    return HeldAnswer(_status_of(detail), ((b"content-type", JSON),), payload)


def _status_of(detail: _ErrorDetail) -> int:
    if isinstance(detail.code, int) and 400 <= detail.code < 600:
        return detail.code
    words = {detail.code, detail.type}
    if words & {"rate_limit_exceeded", "rate_limit_error", "requests", "tokens"}:
        return 429
    return 400 if "invalid_request_error" in words else 502
