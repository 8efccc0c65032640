"""Stripe's two limits: requests per second, and one meter event at a time for a customer and meter."""

from __future__ import annotations

from typing import cast

from core.clock import Clock
from metering.billing.twin.errors import Object, StripeError


class RequestRate:
    """A bucket that holds one second's requests; None is no limit."""

    def __init__(self, clock: Clock, per_second: int | None) -> None:
        self._clock = clock
        self._per_second = per_second
        self._left = float(per_second or 0)
        self._filled_at = clock.now()

    def take(self) -> None:
        """Count a request. Errors: 429 rate_limit, to be retried."""
        if self._per_second is None:
            return
        now = self._clock.now()
        passed = max((now - self._filled_at).total_seconds(), 0.0)
        self._left = min(float(self._per_second), self._left + passed * self._per_second)
        self._filled_at = now
        if self._left < 1:
            raise StripeError(429, "Request rate limit exceeded.", code="rate_limit", should_retry=True)
        self._left -= 1


class MeterLocks:
    """Which customer and meter have a meter event in flight."""

    def __init__(self) -> None:
        self._held: set[tuple[str, str]] = set()

    def claim(self, params: Object) -> tuple[str, str]:
        """Claim the event's customer and meter. Errors: 429 lock_timeout while another one is in flight."""
        payload = params.get("payload")
        who: list[tuple[str, str]] = []
        if isinstance(payload, dict):
            # The meter's mapping may name another key: all of the payload but the number stands for the customer.
            pairs = cast("Object", payload).items()
            who = sorted((key, str(value)) for key, value in pairs if key != "value")
        lock = (str(who), str(params.get("event_name")))
        if lock in self._held:
            message = (
                "This object cannot be accessed right now because another API request or Stripe process is currently "
                "accessing it. Only one request at a time may report events of a customer and meter."
            )
            raise StripeError(429, message, code="lock_timeout", should_retry=True)
        self._held.add(lock)
        return lock

    def release(self, lock: tuple[str, str]) -> None:
        """Let the next event of that customer and meter in."""
        self._held.discard(lock)
