"""Hard budgets in the quota script: nothing is admitted that may not fit, and what Redis forgets PostgreSQL tells it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis

from core.clock import SystemClock
from core.ids import KeyId, OrganizationId, new_id
from core.money import NanoUsd
from core.redis import scripts_for
from core.resp import RedisUnavailable
from keys.budgets import Budget, period_bounds
from keys.caps import Cap, Standing, state_key
from keys.errors import BudgetExhausted, QuotaUnverifiable, RateLimitReached
from keys.limits import QUOTA_SCRIPTS, QuotaPlan, RateLimits, ScopedLimits
from keys.local_quota import LocalQuota
from keys.quota import Quota, Reservation, Spend
from tests.harness.stores import TestStores


class Books:
    """What PostgreSQL would know; counts how often it was asked."""

    def __init__(self) -> None:
        self.standings: dict[str, Standing] = {}
        self.asked = 0

    async def standing(self, cap: Cap, starts_at: datetime) -> Standing:
        self.asked += 1
        return self.standings.get(cap.id, Standing(0, ()))


class Place:
    def __init__(self, quota: Quota, books: Books, redis: Redis) -> None:
        self.quota, self.books, self.redis = quota, books, redis
        self.organization_id = OrganizationId(new_id("org"))

    def budget(self, limit: int, period: str = "month", scope: str = "organization") -> Budget:
        return Budget(
            id=new_id("bdgt"),
            organization_id=self.organization_id,
            scope=scope,  # type: ignore[arg-type]
            scope_id="x",
            period=period,  # type: ignore[arg-type]
            limit_nano_usd=NanoUsd(limit),
            is_hard=True,
        )

    def plan(self, *budgets: Budget, limits: RateLimits | None = None) -> QuotaPlan:
        scopes = [ScopedLimits("key", KeyId("k"), limits)] if limits else []
        return QuotaPlan(self.organization_id, scopes, budgets)

    async def reserve(self, plan: QuotaPlan, cost: int, request_id: str | None = None) -> Reservation:
        return await self.quota.reserve(request_id or new_id("req"), plan, 1, 1, Spend(cost, now_ms()))

    async def state(self, budget: Budget) -> dict[bytes, bytes]:
        starts_at = period_bounds(budget.period, datetime.now(UTC))[0]
        return await self.redis.hgetall(state_key(budget, starts_at))

    async def settled(self) -> None:
        """Return when Redis has seen what was settled."""
        self.quota.flush()
        await self.reserve(self.plan(limits=RateLimits(requests_per_minute=10**6)), 0)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
async def place(stores: TestStores, redis: Redis) -> AsyncIterator[Place]:
    scripts = scripts_for(stores.redis_url, QUOTA_SCRIPTS, deadline_seconds=1)
    await scripts.start()
    books = Books()
    yield Place(Quota(scripts, LocalQuota(SystemClock(), lambda: 1), books), books, redis)
    await scripts.close()


async def test_a_call_is_admitted_only_if_the_most_it_can_cost_fits(place: Place) -> None:
    plan = place.plan(place.budget(100))
    await place.reserve(plan, 60)
    with pytest.raises(BudgetExhausted, match="may cost up to"):
        await place.reserve(plan, 41)
    await place.reserve(plan, 40)
    with pytest.raises(BudgetExhausted, match="used up") as refused:
        await place.reserve(plan, 1)
    assert refused.value.param == "organization.budget.month"


async def test_what_was_not_used_can_be_spent_by_others(place: Place) -> None:
    budget = place.budget(100)
    plan = place.plan(budget)
    held = await place.reserve(plan, 100)
    place.quota.settle(held, 2, 30)
    place.quota.settle(held, 2, 30)
    await place.settled()
    assert await place.state(budget) == {b"s": b"30", b"r": b"0"}
    await place.reserve(plan, 70)
    with pytest.raises(BudgetExhausted):
        await place.reserve(plan, 1)


async def test_one_full_budget_refuses_and_takes_nothing_from_the_others(place: Place) -> None:
    wide, narrow = place.budget(1_000), place.budget(50, "day", "key")
    plan = place.plan(wide, narrow, limits=RateLimits(requests_per_minute=2))
    with pytest.raises(BudgetExhausted, match="the key's budget of this day"):
        await place.reserve(plan, 60)
    assert await place.state(wide) == {b"s": b"0", b"r": b"0"}
    # Nor from the limits: both requests are still there.
    for _ in range(2):
        await place.reserve(plan, 10)
    with pytest.raises(RateLimitReached):
        await place.reserve(plan, 10)
    assert (await place.state(wide))[b"r"] == b"20"


async def test_the_same_call_is_held_once(place: Place) -> None:
    budget = place.budget(100)
    plan = place.plan(budget)
    request_id = new_id("req")
    for _ in range(3):
        await place.reserve(plan, 60, request_id)
    assert await place.state(budget) == {b"s": b"0", b"r": b"60", request_id.encode(): b"60"}


@pytest.mark.parametrize("seed", range(5))
async def test_callers_together_never_spend_past_a_budget(place: Place, seed: int) -> None:
    """Guarantee: whatever they ask for at once, and however it ends, spent and reserved never exceed the limit."""
    chosen = random.Random(seed)
    budgets = [place.budget(10_000), place.budget(7_000, "day", "key"), place.budget(9_000, "total", "project")]
    plan = place.plan(*budgets, limits=RateLimits(concurrent_requests=100_000))
    charged = 0

    async def one() -> None:
        nonlocal charged
        most = chosen.randrange(1, 400)
        try:
            held = await place.reserve(plan, most)
        except BudgetExhausted:
            return
        await asyncio.sleep(0)
        actual = chosen.randrange(0, most + 1)
        charged += actual
        place.quota.settle(held, 1, actual)

    await asyncio.gather(*(one() for _ in range(500)))
    await place.settled()
    assert 0 < charged <= 7_000
    for budget in budgets:
        assert await place.state(budget) == {b"s": b"%d" % charged, b"r": b"0"}


class TestForgotten:
    async def test_redis_is_told_what_was_spent_before_anything_is_admitted(self, place: Place) -> None:
        budget = place.budget(100)
        running = new_id("req")
        place.books.standings[budget.id] = Standing(50, ((running, 30),))
        plan = place.plan(budget)
        with pytest.raises(BudgetExhausted):
            await place.reserve(plan, 21)
        await place.reserve(plan, 20)
        assert place.books.asked == 1
        # The call that was running when Redis forgot it is charged when it ends, by whichever gateway.
        place.quota.settle(Reservation(running, plan, 2, 30, plan.cap_keys(now_ms())), 2, 12)
        await place.settled()
        state = await place.state(budget)
        assert (state[b"s"], state[b"r"]) == (b"62", b"20")

    async def test_a_flush_in_the_middle_resets_no_budget(self, place: Place) -> None:
        budget = place.budget(100)
        plan = place.plan(budget)
        held = await place.reserve(plan, 70)
        await place.redis.delete(state_key(budget, period_bounds("month", datetime.now(UTC))[0]))
        place.books.standings[budget.id] = Standing(10, ((held.request_id, 70),))
        with pytest.raises(BudgetExhausted):
            await place.reserve(plan, 21)
        place.quota.settle(held, 2, 40)
        await place.reserve(plan, 50)
        with pytest.raises(BudgetExhausted):
            await place.reserve(plan, 1)

    async def test_postgresql_down_refuses_rather_than_guesses(self, place: Place) -> None:
        async def down(cap: Cap, starts_at: datetime) -> Standing:
            raise ConnectionRefusedError

        place.books.standing = down  # type: ignore[method-assign]
        with pytest.raises(QuotaUnverifiable):
            await place.reserve(place.plan(place.budget(100)), 1)

    async def test_several_gateways_that_tell_it_at_once_tell_it_once(self, place: Place) -> None:
        budget = place.budget(1_000)
        place.books.standings[budget.id] = Standing(300, ())
        await asyncio.gather(*(place.reserve(place.plan(budget), 10) for _ in range(20)))
        state = await place.state(budget)
        assert (state[b"s"], state[b"r"]) == (b"300", b"200")


class SlowBooks(Books):
    """Is asked, and answers when it is allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.may_answer, self.is_down = asyncio.Event(), asyncio.Event(), False

    async def standing(self, cap: Cap, starts_at: datetime) -> Standing:
        self.is_asked.set()
        found = await super().standing(cap, starts_at)
        await self.may_answer.wait()
        if self.is_down:
            raise ConnectionRefusedError
        return found


class TestManyMeetItUnknown:
    """Of one process, however many calls come before Redis knows a budget: PostgreSQL is asked once."""

    @pytest.fixture
    def slow(self, place: Place) -> SlowBooks:
        made = SlowBooks()
        place.quota._authority = place.books = made
        return made

    async def test_a_thousand_share_one_answer_and_each_is_held(self, place: Place) -> None:
        budget, other = place.budget(10_000), place.budget(10_000, "day")
        place.books.standings[budget.id] = Standing(1_000, ())
        plans = [place.plan(budget) for _ in range(10)]
        taken = await asyncio.gather(
            *(place.reserve(plans[at % 10], 10) for at in range(1_000)), return_exceptions=True
        )
        assert place.books.asked == 1
        assert [type(one) for one in taken].count(Reservation) == 900
        assert [type(one) for one in taken].count(BudgetExhausted) == 100
        state = await place.state(budget)
        assert (state[b"s"], state[b"r"], len(state)) == (b"1000", b"9000", 902)
        await asyncio.gather(*(place.reserve(place.plan(other), 1) for _ in range(20)))
        assert place.books.asked == 2

    async def test_who_comes_while_it_is_asked_joins_and_who_leaves_breaks_nothing(
        self, place: Place, slow: SlowBooks
    ) -> None:
        budget = place.budget(100)
        first = asyncio.create_task(place.reserve(place.plan(budget), 10))
        await slow.is_asked.wait()
        others = [asyncio.create_task(place.reserve(place.plan(budget), 10)) for _ in range(5)]
        await place.settled()
        # All of them have been told by now that Redis does not know it.
        first.cancel()
        others[0].cancel()
        await asyncio.gather(first, others[0], return_exceptions=True)
        assert (first.cancelled(), others[0].cancelled()) == (True, True)
        slow.may_answer.set()
        assert all([await other for other in others[1:]])
        assert slow.asked == 1
        assert (await place.state(budget))[b"r"] == b"40"

    async def test_a_failure_is_told_to_all_and_not_remembered(self, place: Place, slow: SlowBooks) -> None:
        plan = place.plan(place.budget(100))
        slow.is_down = True
        slow.may_answer.set()
        told = await asyncio.gather(*(place.reserve(plan, 10) for _ in range(20)), return_exceptions=True)
        assert {type(one) for one in told} == {QuotaUnverifiable}
        assert len({id(one) for one in told}) == 20
        assert slow.asked == 1
        slow.is_down = False
        await place.reserve(plan, 10)
        assert slow.asked == 2

    async def test_when_all_have_left_the_next_one_still_gets_an_answer(self, place: Place, slow: SlowBooks) -> None:
        plan = place.plan(place.budget(100))
        left = asyncio.create_task(place.reserve(plan, 10))
        await slow.is_asked.wait()
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        slow.may_answer.set()
        await place.reserve(plan, 10)
        assert slow.asked == 1


async def test_without_redis_a_hard_budget_refuses_and_a_soft_one_does_not() -> None:
    class Down:
        is_up = False
        undelivered = ()

        def run(self, call: object) -> asyncio.Future[list[int]]:
            raise RedisUnavailable("down")

        def deliver(self, call: object) -> None:
            raise AssertionError("nothing was sent: nothing is to be given back")

    quota = Quota(Down(), LocalQuota(SystemClock(), lambda: 1), Books())  # type: ignore[arg-type]
    organization_id = OrganizationId(new_id("org"))
    hard = Budget(
        id="b",
        organization_id=organization_id,
        scope="key",
        scope_id="k",
        period="day",
        limit_nano_usd=NanoUsd(10),
        is_hard=True,
    )
    soft = Budget(**{**{name: getattr(hard, name) for name in hard.__struct_fields__}, "is_hard": False})
    scopes = [ScopedLimits("key", "k", RateLimits(requests_per_minute=10))]
    with pytest.raises(QuotaUnverifiable):
        await quota.reserve("req_1", QuotaPlan(organization_id, scopes, [hard]), 1, 1, Spend(1, now_ms()))
    assert (await quota.reserve("req_2", QuotaPlan(organization_id, scopes, [soft]), 1, 1)).is_local


@pytest.mark.parametrize(
    ("period", "moment", "starts", "ends"),
    [
        ("day", "2026-12-31T23:59:59.999", "2026-12-31", "2027-01-01"),
        ("week", "2027-01-01T00:00", "2026-12-28", "2027-01-04"),
        ("month", "2026-12-31T12:00", "2026-12-01", "2027-01-01"),
        ("total", "2026-12-31T12:00", "1970-01-01", "9999-12-31T23:59:59.999999"),
    ],
)
def test_periods_are_calendar_periods_in_utc(period: str, moment: str, starts: str, ends: str) -> None:
    def at(value: str) -> datetime:
        return datetime.fromisoformat(value).replace(tzinfo=UTC)

    assert period_bounds(period, at(moment)) == (at(starts), at(ends))  # type: ignore[arg-type]


async def test_a_call_from_before_midnight_belongs_to_that_day_also_when_it_comes_late(place: Place) -> None:
    """Guarantee: its headers came in the old period, its body in the new one, behind others: the old one pays."""
    day_ms = 86_400_000
    midnight_ms = now_ms() // day_ms * day_ms
    plan = QuotaPlan(place.organization_id, [], [place.budget(100, "day")])
    before, after = plan.cap_keys(midnight_ms - 1), plan.cap_keys(midnight_ms)
    assert before != after
    assert plan.cap_keys(midnight_ms - 1) == before
    assert plan.cap_keys(midnight_ms + 1) == after
