"""What `aap ledger verify` does."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import msgspec
from redis.exceptions import RedisError

from core.clock import SystemClock
from core.money import usd_text
from gateway.cli.stores import Stores, on_stores
from metering.verify import Drift, verify
from metering.verify_redis import compare, compare_allowances

# A long ledger takes minutes to read, and nobody waits for this process.
_STATEMENT_SECONDS_MAX: Final = 6 * 3600.0
# A lost call is entered a lease and some seconds after its gateway's death.
_SWEPT_WITHIN: Final = timedelta(minutes=2)


class RedisLine(msgspec.Struct, frozen=True, kw_only=True):
    """A hard budget as PostgreSQL and Redis have it, in US dollars."""

    budget_id: str
    scope: str
    scope_id: str
    spent_usd: str
    spent_in_redis_usd: str
    reserved_usd: str
    held_usd: str
    without_call: int
    agrees: bool


class AllowanceLine(msgspec.Struct, frozen=True, kw_only=True):
    """One unit of a plan as PostgreSQL and Redis have it."""

    organization_id: str
    unit: str
    used: int
    used_in_redis: int
    reserved: int
    held: int
    without_call: int
    agrees: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, and what does not agree. What is *in_redis* is None when Redis did not answer."""

    entries: int
    windows: int
    budgets: int
    intents: int
    rated: int
    drifts: list[Drift]
    budgets_in_redis: list[RedisLine] | None
    allowances_in_redis: list[AllowanceLine] | None


def verify_all(*, rerate: bool) -> Report:
    """Compare everything with everything, for the whole installation."""

    async def act(stores: Stores) -> Report:
        overdue = timedelta(seconds=stores.settings.ledger.lease_seconds) + _SWEPT_WITHIN
        found = await verify(stores.database, rerate=rerate, overdue=overdue)
        return Report(
            **msgspec.structs.asdict(found),
            budgets_in_redis=await _in_redis(stores),
            allowances_in_redis=await _allowances_in_redis(stores),
        )

    return on_stores(act, statement_seconds_max=_STATEMENT_SECONDS_MAX)


async def _in_redis(stores: Stores) -> list[RedisLine] | None:
    try:
        found = await compare(stores.database, stores.redis, SystemClock())
    except RedisError:
        return None
    return [
        RedisLine(
            budget_id=one.budget_id,
            scope=one.scope,
            scope_id=one.scope_id,
            spent_usd=usd_text(one.spent_nano_usd),
            spent_in_redis_usd=usd_text(one.spent_in_redis_nano_usd),
            reserved_usd=usd_text(one.reserved_in_redis_nano_usd),
            held_usd=usd_text(one.held_nano_usd),
            without_call=one.without_call,
            agrees=one.agrees,
        )
        for one in found
    ]


async def _allowances_in_redis(stores: Stores) -> list[AllowanceLine] | None:
    try:
        found = await compare_allowances(stores.database, stores.redis, SystemClock())
    except RedisError:
        return None
    return [
        AllowanceLine(
            organization_id=one.organization_id,
            unit=one.unit,
            used=one.used,
            used_in_redis=one.used_in_redis,
            reserved=one.reserved_in_redis,
            held=one.held,
            without_call=one.without_call,
            agrees=one.agrees,
        )
        for one in found
    ]
