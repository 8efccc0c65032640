"""Hard budgets and plans' allowances in Redis beside what PostgreSQL says: for information.

While calls run the two differ for moments: a call is charged in PostgreSQL first, and a reservation comes before its
intent. A worker puts right what does not go away by itself (`metering.reconcile`), so what is still told when
nothing runs, or again and again, tells that none does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import msgspec
from redis.asyncio import Redis
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import Database
from keys.allowances import Allowance
from keys.budgets import budget_of
from keys.tables import BudgetRow
from metering import allowances, caps
from metering.caps import CapPeriod
from metering.tables import UsageIntentRow


class BudgetInRedis(msgspec.Struct, frozen=True, kw_only=True):
    """A hard budget in its present period, twice."""

    budget_id: str
    scope: str
    scope_id: str
    spent_nano_usd: int
    spent_in_redis_nano_usd: int
    reserved_in_redis_nano_usd: int
    held_nano_usd: int
    """The sum of all that is reserved for single calls: the same as what is reserved, or the state is broken."""
    without_call: int
    """For how many of them nothing runs: their calls have just begun or ended, or their gateways died."""

    @property
    def agrees(self) -> bool:
        """Whether Redis knows exactly what PostgreSQL knows."""
        spent, reserved = self.spent_in_redis_nano_usd, self.reserved_in_redis_nano_usd
        return (spent, reserved, self.without_call) == (self.spent_nano_usd, self.held_nano_usd, 0)


class AllowanceInRedis(msgspec.Struct, frozen=True, kw_only=True):
    """One unit of an organization's plan in the present month, twice. The same as of budgets, in that unit."""

    organization_id: str
    unit: str
    used: int
    used_in_redis: int
    reserved_in_redis: int
    held: int
    without_call: int

    @property
    def agrees(self) -> bool:
        """Whether Redis knows exactly what PostgreSQL knows."""
        return (self.used_in_redis, self.reserved_in_redis, self.without_call) == (self.used, self.held, 0)


class _Seen(NamedTuple):
    """What Redis holds of a cap, and what PostgreSQL knows."""

    spent: int
    spent_in_redis: int
    reserved_in_redis: int
    held: int
    without_call: int


async def compare(database: Database, redis: Redis, clock: Clock) -> list[BudgetInRedis]:
    """Return every hard budget that Redis knows of. Errors: what either store raises."""
    async with database.transaction() as session:
        hard = select(BudgetRow).where(BudgetRow.is_hard).order_by(BudgetRow.id)
        budgets = [budget_of(row) for row in await session.scalars(hard)]
    looked = [(budget, await _look(database, redis, CapPeriod.around(budget, clock.now()))) for budget in budgets]
    return [
        BudgetInRedis(
            budget_id=budget.id,
            scope=budget.scope,
            scope_id=budget.scope_id,
            spent_nano_usd=seen.spent,
            spent_in_redis_nano_usd=seen.spent_in_redis,
            reserved_in_redis_nano_usd=seen.reserved_in_redis,
            held_nano_usd=seen.held,
            without_call=seen.without_call,
        )
        for budget, seen in looked
        if seen is not None
    ]


async def compare_allowances(database: Database, redis: Redis, clock: Clock) -> list[AllowanceInRedis]:
    """Return every allowance that Redis knows of, of who has a plan. Errors: what either store raises."""
    found: list[AllowanceInRedis] = []
    async for page in allowances.pages(database):
        for owner, _ in page:
            for unit in allowances.COUNTED_UNITS:
                seen = await _look(database, redis, CapPeriod.around(Allowance(owner, unit, 0), clock.now()))
                if seen is not None:
                    found.append(
                        AllowanceInRedis(
                            organization_id=owner,
                            unit=unit,
                            used=seen.spent,
                            used_in_redis=seen.spent_in_redis,
                            reserved_in_redis=seen.reserved_in_redis,
                            held=seen.held,
                            without_call=seen.without_call,
                        )
                    )
    return found


async def _look(database: Database, redis: Redis, period: CapPeriod) -> _Seen | None:
    state: dict[bytes, bytes] = await cast("Any", redis).hgetall(period.key)
    if b"s" not in state:
        return None
    # Single letters are sums; all other fields are request ids.
    held = {name.decode(): int(value) for name, value in state.items() if len(name) > 1}
    async with database.transaction() as session:
        spent = (await caps.spent_in(session, [period])).get(period.key, 0)
        running = await _running(session, list(held))
    return _Seen(spent, int(state[b"s"]), int(state.get(b"r", b"0")), sum(held.values()), len(held) - running)


async def _running(session: AsyncSession, request_ids: Sequence[str]) -> int:
    count = select(func.count()).select_from(UsageIntentRow).where(UsageIntentRow.request_id.in_(request_ids))
    return int(await session.scalar(count) or 0)
