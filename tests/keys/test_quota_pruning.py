"""Buckets of scopes that nobody uses are forgotten; those in use are not."""

from __future__ import annotations

import struct
import time

from redis.asyncio import Redis

from keys.quota_pruning import prune_buckets


async def test_only_what_was_unused_for_two_days_is_forgotten(redis: Redis) -> None:
    now = time.time()
    fresh = struct.pack("<6d", now * 1000, int(now), 1, 2, 3, 4)
    old = struct.pack("<6d", (now - 200_000) * 1000, int(now - 200_000), 1, 2, 3, 4)
    await redis.hset("q:{org_pruned}:buckets", mapping={"key:a": fresh, "key:b": old, "key:c": old})
    assert await prune_buckets(redis) >= 2
    assert await redis.hkeys("q:{org_pruned}:buckets") == [b"key:a"]
    assert await prune_buckets(redis) == 0
