"""What is known of one call, from its first byte to its settlement: the source of its log line, metrics and bill."""

from __future__ import annotations

import asyncio
import time

from inference.catalog import Deployment
from inference.endpoints import Endpoint
from inference.upstreams.sse import SseRelay
from inference.wire import ParsedRequest
from keys.principal import Principal
from keys.quota import Reservation
from metering.normalise import CountedUsage, OpenAIUsage
from metering.prices import CallPrices
from metering.usage import NO_MEDIA, Media, Units


class Exchange:
    """One call. Filled in as it goes; handed to `on_settled` once, at the end."""

    __slots__ = (
        "attempts",
        "charge_nano_usd",
        "cost_nano_usd",
        "counted",
        "deployment",
        "endpoint",
        "error_code",
        "first_byte_at",
        "intent",
        "is_estimated",
        "is_stream",
        "media_estimated",
        "model",
        "outcome",
        "prices",
        "principal",
        "relay",
        "reported_cost_nano_usd",
        "request_id",
        "reservation",
        "service_tier",
        "started_at",
        "started_ms",
        "status",
        "tokens_estimated",
        "units",
        "upstream_status",
        "usage",
        "usage_rated",
        "was_seen",
    )

    def __init__(self, request_id: str, endpoint: Endpoint) -> None:
        self.request_id = request_id
        self.endpoint = endpoint
        self.started_at = time.perf_counter()
        self.started_ms = time.time_ns() // 1_000_000
        self.first_byte_at = 0.0
        self.principal: Principal | None = None
        self.model = ""
        self.deployment: Deployment | None = None
        self.reservation: Reservation | None = None
        self.is_stream = False
        self.attempts = 0
        self.status = 0
        self.upstream_status = 0
        self.usage: OpenAIUsage | CountedUsage | None = None
        self.counted: CountedUsage | None = None
        """What the answer itself holds of pictures and sound: rated where no price fits what was reported."""
        self.reported_cost_nano_usd: int | None = None
        self.is_estimated = False
        self.was_seen = False
        """Whether an attempt that failed was sent: whatever becomes of later ones, its provider may bill for it."""
        self.tokens_estimated: tuple[int, int] = (0, 0)
        self.media_estimated: Media = NO_MEDIA
        """Of a call for pictures or of a recording; of others NO_MEDIA itself."""
        # done | client_gone | interrupted | upstream_failed | refused | replayed | broken
        self.outcome = "refused"
        self.error_code: str | None = None
        # Of the ledger: what it was told before the first byte, and what it will be told in the end.
        self.intent: asyncio.Future[None] | None = None
        self.prices: CallPrices | None = None
        self.service_tier = "default"
        self.units: Units | None = None
        self.usage_rated: OpenAIUsage | CountedUsage | None = None
        """Of which usage `units` and the amounts are."""
        self.cost_nano_usd: int | None = 0
        self.charge_nano_usd: int | None = 0
        self.relay: SseRelay | None = None

    def sent(self, request: ParsedRequest) -> None:
        """Note that from here on a provider may have read the request; what it reports replaces the estimate."""
        self.tokens_estimated, self.media_estimated = (request.prompt_tokens, 0), request.media
        self.is_estimated = True

    def unseen(self) -> None:
        """Note that nothing was used: the last attempt was not sent, or refused. An earlier one may have been read."""
        if self.was_seen:
            return
        self.tokens_estimated, self.media_estimated, self.is_estimated = (0, 0), NO_MEDIA, False

    def observed(self, output_tokens: int) -> None:
        """Note how much has come out, for as long as nobody reports it. Pictures and sound are no text."""
        if self.media_estimated is NO_MEDIA:
            self.tokens_estimated = (self.tokens_estimated[0], output_tokens)

    @property
    def observed_output_tokens(self) -> int:
        """How many tokens have come out so far, as far as that can be seen."""
        if self.relay is None or self.media_estimated is not NO_MEDIA:
            return 0
        return self.relay.observed_tokens

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens in and out: as reported, or else as estimated and observed."""
        usage = self.usage
        return self.tokens_estimated if usage is None else usage.counts()
