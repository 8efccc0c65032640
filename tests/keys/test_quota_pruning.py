"""Buckets of scopes that nobody uses are forgotten; those in use are not."""

from __future__ import annotations

import struct
import time

from redis.asyncio import Redis

from core.ids import OrganizationId, new_id
from keys.limits import QuotaPlan, RateLimits, ScopedLimits
from keys.quota import Quota
from keys.quota_pruning import prune_buckets


async def test_only_what_was_unused_for_two_days_is_forgotten(redis: Redis) -> None:
    now = time.time()
    fresh = struct.pack("<6d", now * 1000, int(now), 1, 2, 3, 4)
    old = struct.pack("<6d", (now - 200_000) * 1000, int(now - 200_000), 1, 2, 3, 4)
    await redis.hset("q:{org_pruned}:buckets", mapping={"key:a": fresh, "key:b": old, "key:c": old})
    assert await prune_buckets(redis) >= 2
    assert await redis.hkeys("q:{org_pruned}:buckets") == [b"key:a"]
    assert await prune_buckets(redis) == 0


async def test_places_of_an_organization_that_calls_no_more_are_forgotten_by_themselves(
    quota: Quota, redis: Redis
) -> None:
    """Guarantee: whenever a set of places is made anew, it has an end; it is not kept for ever by a call long ago."""
    organization_id = OrganizationId(new_id("org"))
    limits = RateLimits(requests_per_minute=10**6, concurrent_requests=5)
    plan = QuotaPlan(organization_id, [ScopedLimits("key", "k", limits)])
    places = f"q:{{{organization_id}}}:leases:key:k"
    for _ in range(3):
        calls = [await quota.reserve(new_id("req"), plan, 1, 1) for _ in range(2)]
        assert await redis.zcard(places) == 2
        assert 86_000 < await redis.ttl(places) <= 86_400
        for call in calls:
            quota.settle(call, 1)
        quota.flush()
        await quota.reserve("req_behind", plan, 1, 1)
        await redis.delete(places, f"q:{{{organization_id}}}:r:req_behind")
