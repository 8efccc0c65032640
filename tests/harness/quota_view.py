"""What of quotas is in Redis: read with redis-py, beside the product's own code."""

from __future__ import annotations

from typing import cast

from redis.asyncio import Redis

_UNITS_PER_TOKEN = {"tm": 60_000, "td": 86_400, "rm": 60_000, "rd": 86_400}


async def records(redis: Redis, organization_id: str) -> list[bytes]:
    """The reservations that nobody has settled."""
    return [key async for key in redis.scan_iter(f"q:{{{organization_id}}}:r:*", count=1000)]


async def leases(redis: Redis, organization_id: str) -> dict[str, float]:
    """Every slot that is taken: request id → when it expires, in seconds since the epoch."""
    found: dict[str, float] = {}
    async for key in redis.scan_iter(f"q:{{{organization_id}}}:c:*", count=1000):
        for member, score in await redis.zrange(key, 0, -1, withscores=True):
            found[member.decode()] = score / 1000
    return found


async def bucket(redis: Redis, organization_id: str, name: str) -> dict[str, float]:
    """Levels of one bucket in requests and tokens, as last written."""
    found = cast("dict[bytes, bytes]", await redis.hgetall(f"q:{{{organization_id}}}:b:{name}"))
    levels = {field.decode(): int(value) for field, value in found.items()}
    return {field: level / _UNITS_PER_TOKEN[field] for field, level in levels.items() if field in _UNITS_PER_TOKEN}


async def nothing_is_taken(redis: Redis, organization_id: str) -> bool:
    return not await records(redis, organization_id) and not await leases(redis, organization_id)
