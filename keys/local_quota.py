"""Limits of one process, for as long as Redis is down: each live gateway grants its share of every limit.

Never consulted while Redis is healthy. Buckets start empty of debt and full: the bound of the overrun is in
docs/failure-modes.md.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from core.clock import Clock
from keys.dimensions import DIMENSIONS
from keys.errors import RateLimitReached
from keys.limits import QuotaPlan, RateLimits

_BUCKETS_MAX: Final = 100_000
_SECONDS: Final = (60, 86_400, 60, 86_400)


class _Bucket:
    """Levels in the order of DIMENSIONS; the last one counts running requests."""

    __slots__ = ("at_seconds", "levels", "running")

    def __init__(self, shares: list[float | None], now_seconds: float) -> None:
        self.at_seconds = now_seconds
        self.levels: list[float | None] = list(shares[:4])
        self.running = 0


class LocalQuota:
    """Token buckets in memory. *live_gateways* says among how many processes a limit is shared."""

    def __init__(self, clock: Clock, live_gateways: Callable[[], int]) -> None:
        self._clock = clock
        self._live_gateways = live_gateways
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()

    def reserve(self, plan: QuotaPlan, tokens: int) -> None:
        """Take one request, its tokens and a slot in every scope, or nothing. Errors: RateLimitReached."""
        now_seconds = self._clock.monotonic_seconds()
        buckets: list[_Bucket] = []
        costs = (1, 1, tokens, tokens)
        for scoped, name in zip(plan.scopes, plan.names, strict=True):
            shares = self._shares(scoped.limits)
            bucket = self._refilled((plan.organization_id, name), shares, now_seconds)
            _check(scoped.scope, bucket, shares, costs)
            buckets.append(bucket)
        for bucket in buckets:
            bucket.running += 1
            for at, cost in enumerate(costs):
                level = bucket.levels[at]
                if level is not None:
                    bucket.levels[at] = level - cost

    def settle(self, plan: QuotaPlan, tokens_reserved: int, tokens_used: int | None) -> None:
        """Give back the slot and what was not used."""
        refund = 0 if tokens_used is None else tokens_reserved - tokens_used
        for name in plan.names:
            bucket = self._buckets.get((plan.organization_id, name))
            if bucket is None:
                continue
            bucket.running = max(0, bucket.running - 1)
            for at in (2, 3):
                level = bucket.levels[at]
                if level is not None:
                    bucket.levels[at] = level + refund

    def _shares(self, limits: RateLimits) -> list[float | None]:
        # At least one request: a small limit among many gateways must not refuse everybody.
        gateways = max(1, self._live_gateways())
        return [None if limit is None else max(1.0, limit / gateways) for limit in limits.as_tuple()]

    def _refilled(self, key: tuple[str, str], shares: list[float | None], now_seconds: float) -> _Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(shares, now_seconds)
            if len(self._buckets) > _BUCKETS_MAX:
                self._buckets.popitem(last=False)
            return bucket
        self._buckets.move_to_end(key)
        elapsed_seconds = now_seconds - bucket.at_seconds
        bucket.at_seconds = now_seconds
        for at in range(4):
            share, level = shares[at], bucket.levels[at]
            if share is None:
                bucket.levels[at] = None
            else:
                refill = elapsed_seconds * share / _SECONDS[at]
                bucket.levels[at] = min(share, (share if level is None else level) + refill)
        return bucket


def _check(scope: str, bucket: _Bucket, shares: list[float | None], costs: tuple[int, ...]) -> None:
    for at, cost in enumerate(costs):
        level, share = bucket.levels[at], shares[at]
        # A call larger than this process's whole share may pass when the bucket is full: elsewhere it would fit.
        if level is not None and share is not None and level < min(cost, share):
            wait_seconds = (min(cost, share) - level) * _SECONDS[at] / share
            raise RateLimitReached(
                scope=scope, dimension=DIMENSIONS[at], limit=int(share), retry_after_seconds=wait_seconds
            )
    slots = shares[4]
    if slots is not None and bucket.running + 1 > slots:
        raise RateLimitReached(scope=scope, dimension="concurrent_requests", limit=int(slots), retry_after_seconds=1)
