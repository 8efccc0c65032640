"""What is known of one call, from its first byte to its settlement: the source of its log line, metrics and bill."""

from __future__ import annotations

import asyncio
import time

from inference.catalog import Deployment
from inference.endpoints import Endpoint
from inference.upstreams.sse import SseRelay
from keys.principal import Principal
from keys.quota import Reservation
from metering.normalise import OpenAIUsage
from metering.prices import CallPrices
from metering.usage import Units


class Exchange:
    """One call. Filled in as it goes; handed to `on_settled` once, at the end."""

    __slots__ = (
        "attempts",
        "charge_nano_usd",
        "cost_nano_usd",
        "deployment",
        "endpoint",
        "error_code",
        "first_byte_at",
        "intent",
        "is_estimated",
        "is_stream",
        "model",
        "outcome",
        "prices",
        "principal",
        "relay",
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
        self.usage: OpenAIUsage | None = None
        self.is_estimated = False
        self.tokens_estimated: tuple[int, int] = (0, 0)
        # done | client_gone | interrupted | upstream_failed | refused | replayed | broken
        self.outcome = "refused"
        self.error_code: str | None = None
        # Of the ledger: what it was told before the first byte, and what it will be told in the end.
        self.intent: asyncio.Future[None] | None = None
        self.prices: CallPrices | None = None
        self.service_tier = "default"
        self.units: Units | None = None
        self.usage_rated: OpenAIUsage | None = None
        """Of which usage `units` and the amounts are."""
        self.cost_nano_usd: int | None = 0
        self.charge_nano_usd: int | None = 0
        self.relay: SseRelay | None = None

    @property
    def observed_output_tokens(self) -> int:
        """How many tokens have come out so far, as far as that can be seen."""
        return 0 if self.relay is None else self.relay.observed_tokens

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens in and out: as reported, or else as estimated and observed."""
        usage = self.usage
        return self.tokens_estimated if usage is None else usage.counts()
