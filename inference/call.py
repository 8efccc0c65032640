"""The story of one call: admit, route, relay, settle. Everything is given back once, however the call ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import msgspec

from core.http1.errors import (
    BodyTooLarge,
    ConnectionLost,
    ConnectTimedOut,
    FirstByteTimedOut,
    IdleTimedOut,
    TotalTimedOut,
    UpstreamError,
)
from inference.attempts import AttemptPolicy, open_answer
from inference.catalog import Catalog, Model
from inference.errors import ModelNotFound, UpstreamTimedOut, UpstreamUnreachable
from inference.exchange import Exchange
from inference.metered import CallMeter
from inference.routing import Router
from inference.tokens import estimate_text_tokens
from inference.upstreams.base import Answer, Upstream
from inference.upstreams.sse import SseRelay
from inference.usage import counted_in, last_cue_seconds, reported_in, transcript_text
from inference.wire import ParsedRequest, parse
from keys.limits import QuotaPlan
from keys.quota import Quota
from metering.normalise import OpenAIUsage, reported_cost, says_nothing, units_of
from metering.rating import known_tier
from metering.usage import NO_MEDIA, NO_UNITS, Media

# An unstreamed answer is held in memory whole; images and large batches of embeddings stay below this.
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
_OUTPUT_TOKENS_MAX_UNKNOWN: Final = 128_000
# Uncompressed stereo sound has eleven times the bytes that an estimate goes by (`inference/tokens.py`).
_DENSEST_TIMES: Final = 12
_TIMEOUTS: Final = (ConnectTimedOut, FirstByteTimedOut, IdleTimedOut, TotalTimedOut)


class Inference:
    """The governed door to models. One per process."""

    def __init__(
        self,
        *,
        catalog: Callable[[], Catalog],
        quota: Quota,
        router: Router,
        upstreams: Mapping[str, Upstream],
        meter: CallMeter,
        on_settled: Callable[[Exchange, tuple[int, int]], None],
    ) -> None:
        self._catalog = catalog
        self._quota = quota
        self._meter = meter
        self._policy = AttemptPolicy(router, upstreams, meter)
        self._on_settled = on_settled

    async def open(self, exchange: Exchange, content_type: bytes, body: bytes) -> Call:
        """Admit the call and bring it to where its first bytes are known to be good.

        No provider is asked, and so no byte goes to the caller, before the call's intent is durable (decision 0015).
        Errors: BodyInvalid, ModelNotFound, ModelNotAllowed, ScopeMissing, OrganizationSuspended, RateLimitReached,
        RequestTooLarge, BudgetExhausted, PlanLimitReached, QuotaUnverifiable, PriceUnknown, LedgerUnavailable,
        UpstreamUnreachable, UpstreamTimedOut, NoDeploymentAvailable, ParameterUnsupported.
        """
        request, model, plan = self._read(exchange, content_type, body)
        output_tokens = min(request.output_tokens, model.output_tokens_max) * request.choices
        exchange.reservation = await self._quota.reserve(
            exchange.request_id,
            plan,
            request.prompt_tokens,
            output_tokens,
            self._meter.spend_of(exchange, model, request, plan),
        )
        try:
            answer, first = await open_answer(self._policy, exchange, model, request)
        except UpstreamError as error:
            raise translated(error) from error
        return Call(exchange, request, answer, first, self._meter)

    def _read(self, exchange: Exchange, content_type: bytes, body: bytes) -> tuple[ParsedRequest, Model, QuotaPlan]:
        """Return what is asked for, and the limits that hold for it, if the caller may ask for it."""
        principal = exchange.principal
        assert principal is not None
        endpoint = exchange.endpoint
        principal.require_scope(endpoint.scope)
        principal.require_active()
        request = parse(endpoint, content_type, body, _OUTPUT_TOKENS_MAX_UNKNOWN)
        exchange.is_stream = request.is_stream
        model = self._catalog().find(request.model)
        if model is None:
            raise ModelNotFound(request.model)
        exchange.model = model.name
        principal.require_model(model.name)
        return request, model, principal.plan_for(model.name, endpoint.operation)

    def settle(self, exchange: Exchange) -> None:
        """Give back what the call did not use, enter what it did, and report it with its tokens. Never fails.

        Where a hard budget or an allowance holds, PostgreSQL is told first: until it knows what was used, the most that
        the call could take stays reserved (`metering/budgets.py`).
        """
        reservation = exchange.reservation
        tokens = exchange.tokens
        used = tokens[0] + tokens[1]
        if exchange.intent is None:
            if reservation is not None:
                self._quota.settle(reservation, used)
        elif reservation is not None and reservation.plan.caps:
            self._meter.end(exchange, partial(self._quota.settle, reservation, used))
        else:
            self._meter.end(exchange)
            if reservation is not None:
                self._quota.settle(reservation, used)
        self._on_settled(exchange, tokens)


class Call:
    """A call whose answer has begun. Exactly one task reads it."""

    __slots__ = (
        "_answer",
        "_exchange",
        "_first",
        "_meter",
        "_relay",
        "_wants_text",
        "content_type",
        "headers",
        "is_stream",
        "status",
    )

    def __init__(
        self, exchange: Exchange, request: ParsedRequest, answer: Answer, first: bytes, meter: CallMeter
    ) -> None:
        self._exchange = exchange
        self._meter = meter
        self._answer = answer
        self._first = first
        self._wants_text = request.wants_text
        self.status = answer.status
        self.headers = answer.headers
        self.content_type = _content_type(answer)
        is_events = self.content_type.startswith(b"text/event-stream")
        self.is_stream = is_events
        """Whether the answer comes as events."""
        self._relay = self._relay_for(request) if is_events else None
        exchange.relay = self._relay
        exchange.upstream_status = answer.status

    def _relay_for(self, request: ParsedRequest) -> SseRelay:
        principal = self._exchange.principal
        return SseRelay(
            hides_usage=not request.shows_usage,
            counts_text=principal is not None and principal.disconnect_policy == "abort",
            cost_of=self._cost_of if request.shows_cost else None,
        )

    def _cost_of(self, relay: SseRelay) -> str:
        self._observe(relay, is_whole=True)  # as of what has been reported
        return self._meter.charged(self._exchange)

    async def collect(self) -> bytes:
        """Return the whole answer. Errors: UpstreamUnreachable, UpstreamTimedOut."""
        try:
            body = self._first + await self._answer.read_all(ANSWER_BYTES_MAX)
        except UpstreamError as error:
            raise translated(error) from error
        exchange = self._exchange
        exchange.outcome = "done"
        if self.status >= 300:
            exchange.unseen()
            return body
        reported = reported_in(body)
        usage = exchange.usage = reported.usage
        exchange.service_tier = known_tier(reported.service_tier)
        exchange.is_estimated = False
        if usage is None or exchange.media_estimated is not NO_MEDIA or says_nothing(usage):
            _look_for_more(exchange, usage, body)
        return self._as_text(body) if self._wants_text else body

    def _as_text(self, body: bytes) -> bytes:
        """Return a transcript as it was asked for: it came as JSON, which says what it took."""
        text = transcript_text(body)
        if text is None:
            return body
        self.content_type = b"text/plain; charset=utf-8"
        return text

    async def read(self) -> bytes:
        """Return the next bytes for the caller; b"" at the end. Errors: UpstreamUnreachable, UpstreamTimedOut."""
        relay = self._relay
        assert relay is not None
        data = self._first
        self._first = b""
        while True:
            try:
                data = data or await self._answer.read()
            except UpstreamError as error:
                self._observe(relay)
                raise translated(error) from error
            if not data:
                return self._end(relay)
            out = relay.feed(data)
            if out:
                return out
            data = b""

    async def pass_on(self, write: Callable[[bytes], bool]) -> bool:
        """Give *write* the next bytes for the caller as they come; return whether that was all.

        False as soon as *write* returns True: the caller takes less than it is sent. Errors: as `read`.
        """
        relay = self._relay
        assert relay is not None
        feed = relay.feed

        def sink(data: bytes) -> bool:
            out = feed(data)
            return not (out and write(out))

        try:
            if not await self._answer.pass_on(sink):
                return False
        except UpstreamError as error:
            self._observe(relay)
            raise translated(error) from error
        rest = self._end(relay)
        if rest:
            write(rest)
        return True

    def _end(self, relay: SseRelay) -> bytes:
        rest = relay.finish()
        is_cut = bool(rest) and not relay.is_done
        self._observe(relay, is_whole=not is_cut and relay.error is None)
        if is_cut:
            # Half an event: the connection's end was not the answer's.
            cut = ConnectionLost("The upstream closed in the middle of an event.", response_started=True)
            raise translated(cut) from cut
        self._exchange.outcome = "done" if relay.error is None else "upstream_failed"
        return rest

    def charged(self) -> str:
        """What the call is charged, in US dollars; "" while nobody can say."""
        return self._meter.charged(self._exchange)

    def abort(self) -> None:
        """Stop the provider at once, and keep what was seen until now."""
        self._answer.abort()
        if self._relay is not None:
            self._observe(self._relay)

    def _observe(self, relay: SseRelay, *, is_whole: bool = False) -> None:
        """Note what the stream has brought. A usage is exact if the answer *is_whole*, or if it came last."""
        exchange = self._exchange
        usage = relay.usage
        if usage is not None and exchange.media_estimated is not NO_MEDIA and units_of(usage) == NO_UNITS:
            usage = None  # pictures or sound are never nothing
        exchange.is_estimated = usage is None or not (is_whole or relay.is_done or relay.is_usage_last)
        if usage is None:
            exchange.usage = None
            exchange.observed(relay.observed_tokens)
        else:
            exchange.service_tier = known_tier(relay.service_tier)
            is_text = exchange.media_estimated is NO_MEDIA
            exchange.usage = _at_least(usage, exchange, relay) if exchange.is_estimated and is_text else usage
        if relay.error is not None:
            exchange.error_code = "upstream_error_after_first_byte"


def _at_least(usage: OpenAIUsage, exchange: Exchange, relay: SseRelay) -> OpenAIUsage:
    """Return what was reported before the end, with as much output as has been seen since."""
    prompt_tokens, output_tokens = usage.counts()
    if prompt_tokens and units_of(usage).all_output_tokens >= relay.observed_tokens:
        return usage
    return msgspec.structs.replace(
        usage,
        prompt_tokens=prompt_tokens or exchange.tokens_estimated[0],
        completion_tokens=max(output_tokens, relay.observed_tokens),
        output_tokens=None,
        total_tokens=None,
    )


def _look_for_more(exchange: Exchange, usage: OpenAIUsage | None, body: bytes) -> None:
    """Note what the answer itself says of what it took; that counts where no *usage* is reported, or one of nothing."""
    endpoint, media = exchange.endpoint, exchange.media_estimated
    counted = exchange.counted = counted_in(endpoint.operation, body)
    if usage is not None and (units_of(usage) != NO_UNITS if media is not NO_MEDIA else not says_nothing(usage)):
        return
    exchange.usage, exchange.is_estimated = counted, counted is None
    exchange.reported_cost_nano_usd = None if usage is None else reported_cost(usage)
    seconds = last_cue_seconds(body) if endpoint.operation == "transcription" else None
    if seconds is not None:
        # Its speech may end long before the recording does, which has so many bytes at the most for each second.
        exchange.media_estimated = Media(0, max(seconds, media.audio_seconds // _DENSEST_TIMES))
    elif endpoint.generates_tokens:
        exchange.observed(estimate_text_tokens(body))


def _content_type(answer: Answer) -> bytes:
    for name, value in answer.headers:
        if name == b"content-type":
            return value
    return b"application/json"


def translated(error: UpstreamError) -> UpstreamUnreachable | UpstreamTimedOut:
    """Return an upstream's failure as the caller may see it; the reason goes to the log."""
    if isinstance(error, _TIMEOUTS):
        found: UpstreamUnreachable | UpstreamTimedOut = UpstreamTimedOut()
    elif isinstance(error, BodyTooLarge):
        found = UpstreamUnreachable("The model's provider sent an answer that is too large.")
    else:
        found = UpstreamUnreachable()
    found.add_note(f"{type(error).__name__}: {error}")
    return found
