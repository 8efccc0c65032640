"""What is known of one call, from its first byte to its settlement: the source of its log line, metrics and bill."""

from __future__ import annotations

import time

from inference.catalog import Deployment
from inference.endpoints import Endpoint
from inference.usage import TokenUsage
from keys.principal import Principal
from keys.quota import Reservation


class Exchange:
    """One call. Filled in as it goes; handed to `on_settled` once, at the end."""

    __slots__ = (
        "attempts",
        "deployment",
        "endpoint",
        "error_code",
        "first_byte_at",
        "is_estimated",
        "is_stream",
        "model",
        "outcome",
        "principal",
        "request_id",
        "reservation",
        "started_at",
        "status",
        "tokens_estimated",
        "upstream_status",
        "usage",
    )

    def __init__(self, request_id: str, endpoint: Endpoint) -> None:
        self.request_id = request_id
        self.endpoint = endpoint
        self.started_at = time.perf_counter()
        self.first_byte_at = 0.0
        self.principal: Principal | None = None
        self.model = ""
        self.deployment: Deployment | None = None
        self.reservation: Reservation | None = None
        self.is_stream = False
        self.attempts = 0
        self.status = 0
        self.upstream_status = 0
        self.usage: TokenUsage | None = None
        self.is_estimated = False
        self.tokens_estimated: tuple[int, int] = (0, 0)
        # done | client_gone | interrupted | upstream_failed | refused
        self.outcome = "refused"
        self.error_code: str | None = None

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens in and out: as reported, or else as estimated and observed."""
        usage = self.usage
        return self.tokens_estimated if usage is None else usage.counts
