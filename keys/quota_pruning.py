"""Forgetting the buckets of scopes that nobody uses: an organization's hash would grow with every key it ever had."""

from __future__ import annotations

import struct
import time
from typing import Any, Final, cast

from redis.asyncio import Redis

# What was not touched for two days is full, as in keys/quota.lua.
_UNUSED_SECONDS: Final = 172_800
_FIELDS_A_STEP: Final = 500
# Only if it is still what was looked at: it may have been used in between.
_FORGET: Final = (
    "if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then return redis.call('HDEL', KEYS[1], ARGV[1]) end"
)


async def prune_buckets(redis: Redis) -> int:
    """Delete the buckets that were last refilled two days ago or earlier; return how many.

    Reads in small steps, so that calls are not held up. Redis down: raises what redis-py does; the next round goes on.
    """
    client = cast("Any", redis)
    oldest = time.time() - _UNUSED_SECONDS
    count = 0
    async for name in client.scan_iter(match="q:{*}:buckets", count=_FIELDS_A_STEP):
        async for field, bucket in client.hscan_iter(name, count=_FIELDS_A_STEP):
            # The second number of a bucket is the time of its last refill in seconds.
            if struct.unpack_from("<d", bucket, 8)[0] < oldest:
                count += int(await client.eval(_FORGET, 1, name, field, bucket) or 0)
    return count
