"""What of quotas is in Redis: read with redis-py, beside the product's own code."""

from __future__ import annotations

from redis.asyncio import Redis


async def records(redis: Redis, organization_id: str) -> list[bytes]:
    """The reservations that nobody has settled."""
    return [key async for key in redis.scan_iter(f"q:{{{organization_id}}}:r:*", count=1000)]


async def leases(redis: Redis, organization_id: str) -> dict[str, float]:
    """Every slot that is taken: request id → when it expires, in seconds since the epoch."""
    found: dict[str, float] = {}
    async for key in redis.scan_iter(f"q:{{{organization_id}}}:leases:*", count=1000):
        for member, score in await redis.zrange(key, 0, -1, withscores=True):
            found[member.decode()] = score / 1000
    return found


async def nothing_is_taken(redis: Redis, organization_id: str) -> bool:
    return not await records(redis, organization_id) and not await leases(redis, organization_id)
