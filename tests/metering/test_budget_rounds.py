"""`metering.reconcile`, round by round: what is settled for others, and what may still be about to begin."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import ManualClock, SystemClock
from core.database import Database
from core.ids import new_id
from core.money import NanoUsd
from core.redis import connect, scripts_for
from core.settings import LedgerSettings, Pepper
from keys.budgets import Budget, budget_of, period_bounds
from keys.caps import state_key
from keys.limits import QUOTA_SCRIPTS, QuotaPlan, RateLimits, ScopedLimits
from keys.local_quota import LocalQuota
from keys.quota import Quota, Reservation, Spend
from keys.tables import BudgetRow
from metering.budgets import set_budget
from metering.caps import SpentCaps
from metering.entries import INTEND, LOST, SETTLE, intend_arguments, settle_arguments
from metering.reconcile import ROUNDS_APART_SECONDS, Rounds, reconcile
from metering.verify_redis import compare
from metering.worker import MeteringStores, MeteringWorker
from tests.harness.redis_cluster import RedisCluster
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant
from tests.metering.conftest import OwnBooks, now_ms, request_id_at

# What a call may cost at the most, and what a lost one is estimated at.
MOST, LOST_CHARGE = 60, 10


class Place:
    """A hard budget of which 100 are spent, a gateway's quota, and a worker's rounds on a clock that is moved by hand."""

    def __init__(self, own: OwnBooks, redis: Redis, quota: Quota, budget: Budget) -> None:
        self.own, self.redis, self.quota, self.budget = own, redis, quota, budget
        self.plan = QuotaPlan(budget.organization_id, [], [budget])
        self.key = state_key(budget, period_bounds(budget.period, datetime.now(UTC))[0])
        self.clock = ManualClock(datetime.now(UTC))
        self.rounds = Rounds(self.clock)

    async def reserve(self, request_id: str) -> Reservation:
        return await self.quota.reserve(request_id, self.plan, 1, 1, Spend(MOST, now_ms()))

    async def intend(self, request_id: str) -> None:
        intent = self.own.books.intent(request_id, reserved=MOST)
        await self.own.books.run(INTEND, *intend_arguments("gw_1", [intent]))

    async def enter(self, request_id: str, charge: int, outcome: str = "done") -> None:
        entry = self.own.books.entry(request_id, cost=charge, outcome=outcome)
        await self.own.books.run(SETTLE, *settle_arguments([entry]))

    async def end(self, reservation: Reservation, charge: int) -> None:
        """End a call as its gateway does: in PostgreSQL, then in Redis."""
        await self.enter(reservation.request_id, charge)
        self.quota.settle(reservation, 1, charge)
        self.quota.flush()
        # In order: this is answered behind it.
        limited = [ScopedLimits("key", "k", RateLimits(requests_per_minute=10**6))]
        await self.quota.reserve(new_id("req"), QuotaPlan(self.budget.organization_id, limited), 1, 1)

    async def round(self, after_seconds: float = 0.0, rounds: Rounds | None = None) -> int:
        self.clock.advance(timedelta(seconds=after_seconds))
        return await reconcile(self.own.database, self.redis, self.clock, rounds or self.rounds)

    async def held(self) -> dict[str, int]:
        state: dict[bytes, bytes] = await self.redis.hgetall(self.key)  # type: ignore[misc]
        return {name.decode(): int(value) for name, value in state.items()}


@pytest.fixture
async def place(own: OwnBooks, stores: TestStores, redis: Redis) -> AsyncIterator[Place]:
    scripts = scripts_for(stores.redis_url, QUOTA_SCRIPTS, deadline_seconds=10)
    await scripts.start()
    organization_id = own.books.tenant.organization_id
    async with own.database.transaction() as session:
        scope = ("organization", organization_id)
        await set_budget(
            session,
            scope,  # type: ignore[arg-type]
            "total",
            limit=NanoUsd(10**9),
            is_hard=True,
            organization_id=organization_id,
        )
        budget = budget_of((await session.scalars(select(BudgetRow))).one())
    await own.books.run(SETTLE, *settle_arguments([own.books.entry(cost=100)]))
    quota = Quota(scripts, LocalQuota(SystemClock(), lambda: 1), SpentCaps(own.database))
    yield Place(own, redis, quota, budget)
    await scripts.close()


def old_id() -> str:
    """The id of a call whose gateway died an hour ago: who takes it over goes by it, too."""
    return request_id_at(datetime.now(UTC) - timedelta(hours=1))


class TestAboutToBegin:
    """Guarantee: what was reserved a moment ago stays, whatever its id and whatever the ledger says of that."""

    @pytest.mark.parametrize("is_lost", [False, True], ids=["unknown", "lost"])
    async def test_a_call_that_took_over_an_old_id_keeps_its_reservation(self, place: Place, is_lost: bool) -> None:
        request_id = old_id()
        if is_lost:
            await place.enter(request_id, LOST_CHARGE, LOST)
        await place.reserve(request_id)
        assert await place.round() == 0
        await place.intend(request_id)
        for _ in range(3):
            assert await place.round(5) == 0
        assert (await place.held())[request_id] == MOST

    async def test_one_that_is_reserved_anew_between_two_rounds_is_seen_for_the_first_time(self, place: Place) -> None:
        """Guarantee: though nothing of what Redis holds of it is another number."""
        request_id = old_id()
        for _ in range(4):
            await place.reserve(request_id)
            assert await place.round(5) == 0
        assert await place.round(5) == 1

    async def test_one_that_was_given_up_and_is_reserved_anew_is_seen_for_the_first_time(self, place: Place) -> None:
        request_id = old_id()
        await place.reserve(request_id)
        assert [await place.round(5) for _ in range(2)] == [0, 1]
        await place.reserve(request_id)
        assert [await place.round(5) for _ in range(2)] == [0, 1]

    async def test_the_marks_of_another_worker_are_no_second_sight(self, place: Place) -> None:
        """Guarantee: of two workers, neither takes what the other has marked anew for what it saw marked before."""
        request_id, other = old_id(), Rounds(place.clock)
        await place.reserve(request_id)
        assert await place.round() == 0
        assert await place.round(1, other) == 0
        await place.reserve(request_id)
        assert await place.round(4) == 0
        assert await place.round(1, other) == 0
        # Five seconds after it was reserved, each would.
        assert await place.round(3) == 1

    async def test_one_whose_id_is_its_own_has_a_minute(self, place: Place) -> None:
        """Guarantee: so long may a gateway stand still between reservation and intent, and no mark is made for it."""
        request_id = new_id("req")
        await place.reserve(request_id)
        assert [await place.round(5) for _ in range(10)] == [0] * 10
        assert await place.redis.hget(place.key, request_id) == b"%d" % MOST  # type: ignore[misc]
        assert [await place.round(15), await place.round(5)] == [0, 1]


class Interposed:
    """A database, and something that happens when the last of so many transactions has ended."""

    def __init__(self, database: Database, after: int, act: Callable[[], Awaitable[object]]) -> None:
        self._database, self._left, self._act = database, after, act

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncSession]:
        async with self._database.transaction() as session:
            yield session
        self._left -= 1
        if self._left == 0:
            await self._act()


# The transactions of a page: its budgets; what was charged before Redis is read; what is known of what it holds.
TRANSACTIONS = 3


class TestMeanwhile:
    """What happens to a call while a round is under way."""

    async def _round(self, place: Place, after: int, act: Callable[[], Awaitable[object]]) -> int:
        place.clock.advance(timedelta(seconds=5))
        database: Any = Interposed(place.own.database, after, act)
        settled = await reconcile(database, place.redis, place.clock, place.rounds)
        assert database._left <= 0
        return settled

    @pytest.mark.parametrize("after", range(1, TRANSACTIONS + 1))
    async def test_it_is_reserved_anew_and_stays(self, place: Place, after: int) -> None:
        """Guarantee: also between the judgement and the script that carries it out."""
        request_id = old_id()
        await place.reserve(request_id)
        assert await place.round() == 0
        assert await self._round(place, after, lambda: place.reserve(request_id)) == 0
        assert (await place.held()) == {"s": 100, "r": MOST, request_id: MOST}

    @pytest.mark.parametrize("rounds_before", [0, 1])
    @pytest.mark.parametrize("after", range(1, TRANSACTIONS + 1))
    async def test_it_ends_and_is_charged_once(self, place: Place, after: int, rounds_before: int) -> None:
        request_id = old_id()
        reservation = await place.reserve(request_id)
        await place.intend(request_id)
        for _ in range(rounds_before):
            await place.round(5)
        await self._round(place, after, lambda: place.end(reservation, 25))
        assert await place.held() == {"s": 125, "r": 0}
        assert await place.round(5) == 0
        assert await place.held() == {"s": 125, "r": 0}


class TestSettledForOthers:
    async def test_what_nobody_knows_of_is_given_back_when_two_rounds_have_seen_it(self, place: Place) -> None:
        await place.reserve(old_id())
        assert await place.round() == 0
        # However many rounds there are.
        assert await place.round(ROUNDS_APART_SECONDS / 2) == 0
        assert await place.round(ROUNDS_APART_SECONDS / 2 - 0.1) == 0
        assert await place.round(0.1) == 1
        assert await place.held() == {"s": 100, "r": 0}

    @pytest.mark.parametrize("outcome", ["done", LOST])
    async def test_what_is_in_the_ledger_is_charged_once(self, place: Place, outcome: str) -> None:
        """Guarantee: as spent when it is no longer reserved, and not a moment both."""
        request_id = old_id()
        await place.reserve(request_id)
        await place.enter(request_id, LOST_CHARGE, outcome)
        assert await place.round() == 0
        assert await place.held() == {"s": 100, "r": MOST, request_id: MOST}
        assert await place.round(5) == 1
        assert await place.held() == {"s": 100 + LOST_CHARGE, "r": 0}
        assert await place.round(5) == 0
        assert await place.held() == {"s": 100 + LOST_CHARGE, "r": 0}

    async def test_a_call_that_a_round_has_seen_settles_as_any_other(self, place: Place) -> None:
        request_id = old_id()
        reservation = await place.reserve(request_id)
        await place.round()
        assert await place.redis.hget(place.key, request_id) != b"%d" % MOST  # type: ignore[misc]
        [found] = await compare(place.own.database, place.redis, place.clock)
        assert (found.held_nano_usd, found.reserved_in_redis_nano_usd) == (MOST, MOST)
        other = await place.reserve(new_id("req"))
        assert await place.held() == {"s": 100, "r": 2 * MOST, request_id: MOST, other.request_id: MOST}
        await place.end(reservation, 7)
        assert await place.held() == {"s": 107, "r": MOST, other.request_id: MOST}

    async def test_a_restarted_worker_begins_anew(self, place: Place) -> None:
        request_id = old_id()
        await place.reserve(request_id)
        assert await place.round() == 0
        again = Rounds(place.clock)
        assert [await place.round(5, again), await place.round(5, again)] == [0, 1]

    async def test_a_round_that_failed_costs_a_round(self, place: Place) -> None:
        async def fail() -> None:
            raise ConnectionRefusedError

        await place.reserve(old_id())
        broken: Any = Interposed(place.own.database, TRANSACTIONS, fail)
        with pytest.raises(ConnectionRefusedError):
            await reconcile(broken, place.redis, place.clock, place.rounds)
        assert [await place.round(5), await place.round(5)] == [0, 1]

    async def test_a_worker_remembers_its_rounds(self, place: Place) -> None:
        stores = MeteringStores(place.own.url, place.own.database, place.redis)
        kept = LedgerSettings(lease_seconds=15, retention_months=0, archive_dir=Path("/nowhere"))
        worker = MeteringWorker(stores, kept, place.clock)
        await place.reserve(old_id())
        assert await worker.reconcile() == 0
        place.clock.advance(timedelta(seconds=5))
        assert await worker.reconcile() == 1


class Counting:
    """A database that counts its transactions."""

    def __init__(self, database: Database) -> None:
        self._database, self.count = database, 0

    def transaction(self) -> contextlib.AbstractAsyncContextManager[AsyncSession]:
        self.count += 1
        return self._database.transaction()


async def many(own: OwnBooks, organizations: int) -> list[Budget]:
    """Twelve budgets of each of so many organizations."""
    for _ in range(organizations):
        tenant = await new_tenant(own.database, Pepper(id="x", key=bytes(32)))
        scopes = {"organization": tenant.organization_id, "project": tenant.project_id, "key": tenant.key_id}
        rows = [
            {"id": new_id("bdgt"), "scope": scope, "scope_id": scope_id, "period": period}
            for scope, scope_id in scopes.items()
            for period in ("day", "week", "month", "total")
        ]
        facts = {"organization_id": tenant.organization_id, "limit_nano_usd": 10**9, "is_hard": True}
        async with own.database.transaction() as session:
            await session.execute(insert(BudgetRow), [{**row, **facts} for row in rows])
    async with own.database.transaction() as session:
        return [budget_of(row) for row in await session.scalars(select(BudgetRow))]


async def check_many(own: OwnBooks, redis: Redis) -> None:
    """Guarantee: every budget is put right by its own numbers, and pages share their transactions."""
    budgets, clock = await many(own, 40), ManualClock(datetime.now(UTC))
    states = {budget.id: state_key(budget, period_bounds(budget.period, clock.now())[0]) for budget in budgets}
    told, forgotten = budgets[::2], budgets[1::2]
    for at, budget in enumerate(told):
        starts_at = period_bounds(budget.period, clock.now())[0]
        await own.books.run("INSERT INTO budget_periods VALUES ($1, $2, $3)", budget.id, starts_at, 1000 + at)
        state = {"s": 999 if at % 2 else 5000, "r": at + 1, old_id(): at + 1}
        await redis.hset(states[budget.id], mapping=state)  # type: ignore[misc]
    rounds, database = Rounds(clock), Counting(own.database)
    assert await reconcile(database, redis, clock, rounds) == 0  # type: ignore[arg-type]
    assert database.count <= 3 * (len(budgets) // 200 + 1)
    clock.advance(timedelta(seconds=5))
    assert await reconcile(own.database, redis, clock, rounds) == len(told)
    for at, budget in enumerate(told):
        assert await redis.hgetall(states[budget.id]) == {b"s": b"%d" % (1000 + at), b"r": b"0"}  # type: ignore[misc]
    for budget in forgotten:
        assert not await redis.exists(states[budget.id])


class TestMany:
    async def test_on_one_server(self, own: OwnBooks, redis: Redis) -> None:
        await check_many(own, redis)

    async def test_on_a_cluster(self, own: OwnBooks) -> None:
        directory = Path(tempfile.mkdtemp(prefix="aap-"))
        try:
            async with RedisCluster(directory) as cluster:
                redis = connect(cluster.url)
                await check_many(own, redis)
                await redis.aclose()
        finally:
            shutil.rmtree(directory, ignore_errors=True)
