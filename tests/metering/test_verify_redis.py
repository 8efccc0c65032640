"""`metering.verify_redis`: what Redis holds of hard budgets, beside what PostgreSQL knows."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis
from sqlalchemy import select

from core.clock import SystemClock
from core.money import NanoUsd
from keys.budgets import budget_of, period_bounds
from keys.caps import state_key
from keys.tables import BudgetRow
from metering.budgets import set_budget
from metering.entries import INTEND, SETTLE, intend_arguments, settle_arguments
from metering.verify_redis import BudgetInRedis, compare
from tests.harness.reconciled import reconciled
from tests.metering.conftest import OwnBooks


@pytest.fixture
async def key(own: OwnBooks) -> bytes:
    """Where Redis holds a budget of which 100 are spent and 7 reserved for a call that runs."""
    organization_id = own.books.tenant.organization_id
    for is_hard, scope in ((True, "organization"), (False, "project")):
        async with own.database.transaction() as session:
            scope_id = organization_id if scope == "organization" else own.books.tenant.project_id
            await set_budget(
                session,
                (scope, scope_id),  # type: ignore[arg-type]
                "month",
                limit=NanoUsd(10**12),
                is_hard=is_hard,
                organization_id=organization_id,
            )
    await own.books.run(SETTLE, *settle_arguments([own.books.entry(cost=100)]))
    async with own.database.transaction() as session:
        row = (await session.scalars(select(BudgetRow).where(BudgetRow.is_hard))).one()
    return state_key(budget_of(row), period_bounds("month", datetime.now(UTC))[0])


async def compared(own: OwnBooks, redis: Redis) -> BudgetInRedis:
    [found] = await compare(own.database, redis, SystemClock())
    return found


async def test_what_agrees_agrees(own: OwnBooks, redis: Redis, key: bytes) -> None:
    intent = own.books.intent(reserved=7)
    await own.books.run(INTEND, *intend_arguments("gw_1", [intent]))
    await redis.hset(key, mapping={"s": 100, "r": 7, intent.request_id: 7})
    found = await compared(own, redis)
    assert found.agrees
    assert (found.spent_nano_usd, found.held_nano_usd, found.without_call) == (100, 7, 0)


@pytest.mark.parametrize(("spent", "reserved", "held"), [(99, 7, 7), (101, 0, None), (100, 7, 7), (100, 3, None)])
async def test_what_does_not_is_told_until_a_worker_has_put_it_right(
    own: OwnBooks, redis: Redis, key: bytes, spent: int, reserved: int, held: int | None
) -> None:
    """Guarantee: spent differently, reserved for nothing that runs, reserved for nobody at all."""
    await redis.hset(key, mapping={"s": spent, "r": reserved})
    if held is not None:
        await redis.hset(key, "req_0000000000" + "0" * 16, held)
    assert not (await compared(own, redis)).agrees
    await reconciled(own.database, redis)
    # What is reserved for nobody is out of a worker's reach: it counts calls, and there is none.
    assert (await compared(own, redis)).agrees is not (reserved == 3)


async def test_what_redis_does_not_know_is_not_compared(own: OwnBooks, redis: Redis, key: bytes) -> None:
    await redis.delete(key)
    assert await compare(own.database, redis, SystemClock()) == []
