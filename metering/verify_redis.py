"""Hard budgets in Redis beside what PostgreSQL says: for information.

While calls run the two differ for moments: a call is charged in PostgreSQL first, and a reservation comes before its
intent. A worker puts right what does not go away by itself (`metering.reconcile`), so what is still told when
nothing runs, or again and again, tells that none does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec
from redis.asyncio import Redis
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import Database
from keys.budgets import Budget, budget_of, period_bounds, state_key
from keys.tables import BudgetRow
from metering.tables import BudgetPeriodRow, UsageIntentRow


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


async def compare(database: Database, redis: Redis, clock: Clock) -> list[BudgetInRedis]:
    """Return every hard budget that Redis knows of. Errors: what either store raises."""
    async with database.transaction() as session:
        hard = select(BudgetRow).where(BudgetRow.is_hard).order_by(BudgetRow.id)
        budgets = [budget_of(row) for row in await session.scalars(hard)]
    found = [await _compare(database, redis, budget, clock) for budget in budgets]
    return [one for one in found if one is not None]


async def _compare(database: Database, redis: Redis, budget: Budget, clock: Clock) -> BudgetInRedis | None:
    starts_at = period_bounds(budget.period, clock.now())[0]
    state: dict[bytes, bytes] = await cast("Any", redis).hgetall(state_key(budget, starts_at))
    if b"s" not in state:
        return None
    # Single letters are sums; all other fields are request ids.
    held = {name.decode(): int(value) for name, value in state.items() if len(name) > 1}
    async with database.transaction() as session:
        period = BudgetPeriodRow.budget_id == budget.id, BudgetPeriodRow.starts_at == starts_at
        spent = await session.scalar(select(BudgetPeriodRow.spent_nano_usd).where(*period))
        running = await _running(session, list(held))
    return BudgetInRedis(
        budget_id=budget.id,
        scope=budget.scope,
        scope_id=budget.scope_id,
        spent_nano_usd=spent or 0,
        spent_in_redis_nano_usd=int(state[b"s"]),
        reserved_in_redis_nano_usd=int(state.get(b"r", b"0")),
        held_nano_usd=sum(held.values()),
        without_call=len(held) - running,
    )


async def _running(session: AsyncSession, request_ids: Sequence[str]) -> int:
    count = select(func.count()).select_from(UsageIntentRow).where(UsageIntentRow.request_id.in_(request_ids))
    return int(await session.scalar(count) or 0)
