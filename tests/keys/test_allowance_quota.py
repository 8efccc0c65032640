"""Allowances in the quota script: what a plan includes in a month, exact over processes, kept when Redis forgets."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis

from core.clock import SystemClock
from core.ids import OrganizationId, new_id
from core.money import NanoUsd
from core.redis import scripts_for
from core.resp import RedisUnavailable
from inference.endpoints import ENDPOINTS
from keys.allowances import CHAT_OPERATIONS, Allowance, Counted, allowances_of, month_of
from keys.budgets import Budget
from keys.caps import Cap, Standing, state_key
from keys.errors import BudgetExhausted, PlanLimitReached, QuotaUnverifiable, RateLimitReached
from keys.limits import QUOTA_SCRIPTS, QuotaPlan, RateLimits, ScopedLimits
from keys.local_quota import LocalQuota
from keys.plans import PlanLimits
from keys.principal import Account, Grants, Limits, Principal
from keys.quota import Quota, Reservation, Spend
from tests.harness.stores import TestStores


class Books:
    """What PostgreSQL would know; counts how often it was asked."""

    def __init__(self) -> None:
        self.standings: dict[str, Standing] = {}
        self.asked = 0
        self.is_down = False

    async def standing(self, cap: Cap, starts_at: datetime) -> Standing:
        self.asked += 1
        if self.is_down:
            raise ConnectionRefusedError
        return self.standings.get(cap.id, Standing(0, ()))


class Place:
    """Two gateways' quotas, on one Redis."""

    def __init__(self, quotas: list[Quota], books: Books, redis: Redis) -> None:
        self.quotas, self.books, self.redis = quotas, books, redis
        self.organization_id = OrganizationId(new_id("org"))

    def plan(self, *more: Budget, limits: RateLimits | None = None, **included: int) -> QuotaPlan:
        scopes = [ScopedLimits("key", "k", limits)] if limits else []
        allowances = allowances_of(PlanLimits(**included), self.organization_id)
        return QuotaPlan(self.organization_id, scopes, [*more, *allowances])

    def budget(self, limit: int) -> Budget:
        return Budget(
            id=new_id("bdgt"),
            organization_id=self.organization_id,
            scope="organization",
            scope_id=self.organization_id,
            period="month",
            limit_nano_usd=NanoUsd(limit),
            is_hard=True,
        )

    async def reserve(
        self, plan: QuotaPlan, tokens: int = 2, *, cost: int = 0, at: int = 0, started_ms: int = 0
    ) -> Reservation:
        spend = Spend(cost, started_ms or now_ms())
        return await self.quotas[at].reserve(new_id("req"), plan, 1, tokens - 1, spend)

    async def state(self, unit: str, moment: datetime | None = None) -> dict[str, int]:
        """What is used and reserved."""
        allowance = Allowance(self.organization_id, unit, 0)  # type: ignore[arg-type]
        state = await self.redis.hgetall(state_key(allowance, month_of(moment or datetime.now(UTC))[0]))  # type: ignore[misc]
        return {name.decode(): int(value) for name, value in state.items() if len(name) == 1}

    async def settled(self) -> None:
        """Return when Redis has seen what was settled."""
        for at, quota in enumerate(self.quotas):
            quota.flush()
            await self.reserve(self.plan(limits=RateLimits(requests_per_minute=10**6)), at=at)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
async def place(stores: TestStores, redis: Redis) -> AsyncIterator[Place]:
    connections = [scripts_for(stores.redis_url, QUOTA_SCRIPTS, deadline_seconds=5) for _ in range(2)]
    for scripts in connections:
        await scripts.start()
    books = Books()
    yield Place([Quota(one, LocalQuota(SystemClock(), lambda: 1), books) for one in connections], books, redis)
    for scripts in connections:
        await scripts.close()


class TestChatRequests:
    async def test_as_many_are_admitted_as_the_plan_includes(self, place: Place) -> None:
        plan = place.plan(chat_requests_per_month=3)
        held = [await place.reserve(plan) for _ in range(3)]
        with pytest.raises(PlanLimitReached, match="used up your plan's limit of 3 chat requests a month") as refused:
            await place.reserve(plan)
        assert refused.value.param == "organization.plan.chat_requests_per_month"
        assert f"renewed at {month_of(datetime.now(UTC))[1]:%Y-%m-%dT%H:%M:%SZ}" in refused.value.message
        place.quotas[0].settle(held[0], 2, 0, Counted(1, 2))
        await place.settled()
        assert await place.state("chat_requests") == {"s": 1, "r": 2}

    async def test_one_that_its_provider_refused_is_given_back(self, place: Place) -> None:
        plan = place.plan(chat_requests_per_month=1)
        for _ in range(3):
            place.quotas[0].settle(await place.reserve(plan), 2, 0, Counted(0, 0))
        place.quotas[0].settle(await place.reserve(plan), 2, 0, Counted(1, 9))
        with pytest.raises(PlanLimitReached):
            await place.reserve(plan)

    async def test_a_plan_that_includes_none_admits_none(self, place: Place) -> None:
        with pytest.raises(PlanLimitReached):
            await place.reserve(place.plan(chat_requests_per_month=0))

    async def test_another_plan_goes_on_with_what_was_used(self, place: Place) -> None:
        small, large = place.plan(chat_requests_per_month=2), place.plan(chat_requests_per_month=3)
        held = [await place.reserve(small) for _ in range(2)]
        with pytest.raises(PlanLimitReached):
            await place.reserve(small)
        held.append(await place.reserve(large))
        for plan in (small, large):
            with pytest.raises(PlanLimitReached):
                await place.reserve(plan)


class TestTokens:
    async def test_an_estimate_is_reserved_and_the_actual_number_stays(self, place: Place) -> None:
        plan = place.plan(tokens_per_month=100)
        held = await place.reserve(plan, 60)
        with pytest.raises(PlanLimitReached, match="may take up to 41 tokens, and your plan has 40 of 100 left"):
            await place.reserve(plan, 41)
        # More than reserved: the provider counts otherwise than we do.
        place.quotas[0].settle(held, 70, 0, Counted(1, 70))
        await place.settled()
        assert await place.state("tokens") == {"s": 70, "r": 0}
        await place.reserve(plan, 30)
        with pytest.raises(PlanLimitReached):
            await place.reserve(plan, 2)


class TestAllOrNothing:
    async def test_a_full_allowance_takes_nothing_from_limits_and_budgets(self, place: Place) -> None:
        budget = place.budget(100)
        plan = place.plan(
            budget, limits=RateLimits(requests_per_minute=3), chat_requests_per_month=10, tokens_per_month=11
        )
        await place.reserve(plan, 6, cost=10)
        for _ in range(5):
            with pytest.raises(PlanLimitReached):
                await place.reserve(plan, 6, cost=10)
        with pytest.raises(BudgetExhausted):
            await place.reserve(plan, 2, cost=91)
        assert (await place.state("tokens"), await place.state("chat_requests")) == ({"s": 0, "r": 6}, {"s": 0, "r": 1})
        for _ in range(2):
            await place.reserve(plan, 2, cost=10)
        with pytest.raises(RateLimitReached):
            await place.reserve(plan, 1, cost=10)
        assert (await place.state("chat_requests"))["r"] == 3

    async def test_each_cap_has_its_own_cost(self, place: Place) -> None:
        budget = place.budget(10**9)
        plan = place.plan(budget, chat_requests_per_month=10, tokens_per_month=1_000)
        held = await place.reserve(plan, 70, cost=500)
        place.quotas[0].settle(held, 40, 300, Counted(1, 40))
        await place.settled()
        spent = await place.redis.hget(state_key(budget, month_of(datetime.now(UTC))[0]), "s")  # type: ignore[misc]
        found = [(await place.state(unit))["s"] for unit in ("chat_requests", "tokens")]
        assert (spent, found) == (b"300", [1, 40])

    @pytest.mark.parametrize("seed", range(4))
    async def test_two_gateways_together_never_admit_more_than_the_plan_includes(self, place: Place, seed: int) -> None:
        """Guarantee: whatever is asked for at once and however it ends, used and reserved never exceed the limits."""
        chosen = random.Random(seed)
        plans = [place.plan(chat_requests_per_month=150, tokens_per_month=20_000) for _ in range(2)]
        used = Counted()

        async def one() -> None:
            nonlocal used
            at, most = chosen.randrange(2), chosen.randrange(2, 400)
            try:
                held = await place.reserve(plans[at], most, at=at)
            except PlanLimitReached:
                return
            await asyncio.sleep(chosen.random() / 50)
            took = Counted(chosen.randrange(2), chosen.randrange(most + 1))
            used = Counted(used.requests + took.requests, used.tokens + took.tokens)
            place.quotas[at].settle(held, took.tokens, 0, took)

        await asyncio.gather(*(one() for _ in range(600)))
        await place.settled()
        assert 0 < used.requests <= 150
        assert used.tokens <= 20_000
        assert await place.state("chat_requests") == {"s": used.requests, "r": 0}
        assert await place.state("tokens") == {"s": used.tokens, "r": 0}


class TestMonth:
    async def test_a_new_month_begins_anew_and_a_late_call_belongs_to_the_old_one(self, place: Place) -> None:
        plan = place.plan(chat_requests_per_month=1)
        midnight = month_of(datetime.now(UTC))[1]
        midnight_ms = int(midnight.timestamp()) * 1000
        await place.reserve(plan, started_ms=midnight_ms - 1)
        with pytest.raises(PlanLimitReached) as refused:
            await place.reserve(plan, started_ms=midnight_ms - 1)
        assert f"{midnight:%Y-%m-%dT%H:%M:%SZ}" in refused.value.message
        await place.reserve(plan, started_ms=midnight_ms)
        for started_ms in (midnight_ms - 1, midnight_ms + 1):
            with pytest.raises(PlanLimitReached):
                await place.reserve(plan, started_ms=started_ms)
        assert (await place.state("chat_requests", midnight))["r"] == 1


class TestOneUnit:
    async def test_a_workflow_execution_is_one_and_nothing_else(self, place: Place) -> None:
        allowance = Allowance(place.organization_id, "workflow_executions", 2)
        quota = place.quotas[0]
        held = [await quota.reserve_one(new_id("exec"), allowance, now_ms()) for _ in range(2)]
        with pytest.raises(PlanLimitReached, match="limit of 2 workflow executions a month"):
            await quota.reserve_one(new_id("exec"), allowance, now_ms())
        quota.settle(held[0], 0, 0, Counted(1))
        quota.settle(held[1], 0)  # it never began
        await place.settled()
        assert await place.state("workflow_executions") == {"s": 1, "r": 0}
        assert await place.state("chat_requests") == {}


class TestStoresDown:
    async def test_a_redis_that_forgot_is_told_before_anything_is_admitted(self, place: Place) -> None:
        running = new_id("req")
        place.books.standings["allow_chat_requests"] = Standing(3, ((running, 1),))
        plan = place.plan(chat_requests_per_month=5)
        await asyncio.gather(place.reserve(plan), return_exceptions=True)
        with pytest.raises(PlanLimitReached):
            await place.reserve(plan)
        assert place.books.asked == 1
        # The call that ran when Redis forgot it is counted when it ends.
        place.quotas[1].settle(Reservation(running, plan, 2, 0, plan.cap_keys(now_ms())), 2, 0, Counted(1, 2))
        await place.settled()
        assert await place.state("chat_requests") == {"s": 4, "r": 1}

    async def test_postgresql_that_cannot_tell_lets_calls_go_on_unless_a_budget_holds(self, place: Place) -> None:
        place.books.is_down = True
        limits = RateLimits(requests_per_minute=1)
        plan = place.plan(limits=limits, chat_requests_per_month=1)
        assert (await place.reserve(plan)).is_local
        with pytest.raises(RateLimitReached):
            await place.reserve(plan)
        with pytest.raises(QuotaUnverifiable):
            await place.reserve(place.plan(place.budget(10), chat_requests_per_month=1), cost=1)

    async def test_without_redis_calls_go_on_within_the_rate_limits_unless_a_budget_holds(self, place: Place) -> None:
        """Guarantee: plan allowances are not money; they fail open."""

        class Down:
            is_up = False

            def run(self, call: object) -> asyncio.Future[list[int]]:
                raise RedisUnavailable("down")

            def deliver(self, call: object) -> None:
                raise AssertionError("nothing was sent: nothing is to be given back")

        place.quotas[0] = Quota(Down(), LocalQuota(SystemClock(), lambda: 1), place.books)  # type: ignore[arg-type]
        plan = place.plan(limits=RateLimits(requests_per_minute=2), chat_requests_per_month=0)
        for _ in range(2):
            assert (await place.reserve(plan)).is_local
        with pytest.raises(RateLimitReached):
            await place.reserve(plan)
        assert place.quotas[0].local_decisions == 3
        with pytest.raises(QuotaUnverifiable):
            await place.reserve(place.plan(place.budget(10), chat_requests_per_month=5), cost=1)


def principal_of(included: PlanLimits | None) -> Principal:
    organization_id = OrganizationId("org_1")
    none = RateLimits()
    return Principal(
        ids=(organization_id, "proj_1", "key_1", "ksec_1"),  # type: ignore[arg-type]
        grants=Grants(scopes=frozenset(), models=None, ip_networks=None),
        limits=Limits(
            key=none, project=none, organization=none, model={}, allowances=allowances_of(included, organization_id)
        ),
        usable_until_seconds=0,
        account=Account(disconnect_policy="drain"),
    )


class TestWhichHold:
    def test_chat_takes_a_request_and_everything_takes_tokens(self) -> None:
        principal = principal_of(
            PlanLimits(chat_requests_per_month=1, tokens_per_month=1, workflow_executions_per_month=1)
        )
        for operation, expected in (
            ("chat", ["chat_requests", "tokens"]),
            ("text_completion", ["chat_requests", "tokens"]),
            ("embeddings", ["tokens"]),
            ("image_generation", ["tokens"]),
        ):
            caps = principal.plan_for("m", operation).caps
            assert [cap.unit for cap in caps if isinstance(cap, Allowance)] == expected

    @pytest.mark.parametrize("included", [None, PlanLimits(), PlanLimits(agents=3, storage_gigabytes=1)])
    def test_what_is_unlimited_adds_nothing_to_a_command(self, included: PlanLimits | None) -> None:
        principal = principal_of(included)
        plan = principal.plan_for("m")
        assert plan.is_empty
        assert principal.plan_for("m", "embeddings") is plan
        assert (plan.cap_keys(now_ms()), plan.amounts(5, Counted(1, 1))) == ((), b"")
        bare = QuotaPlan(OrganizationId("org_1"), [])
        for shape, other in ((plan.shape, bare.shape), (plan.settle_shape, bare.settle_shape)):
            assert (shape.keys, shape.fixed) == (other.keys, other.fixed)

    def test_every_endpoint_that_generates_tokens_is_a_chat_request(self) -> None:
        served = {endpoint.operation for endpoint in ENDPOINTS if endpoint.generates_tokens}
        assert served <= set(CHAT_OPERATIONS)
        assert {endpoint.operation for endpoint in ENDPOINTS if not endpoint.generates_tokens}.isdisjoint(
            CHAT_OPERATIONS
        )
