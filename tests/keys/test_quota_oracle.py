"""The quota script against an oracle of its own arithmetic: real Redis, the real script, a clock that the test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from core.clock import SystemClock
from core.ids import OrganizationId, new_id
from core.redis import Scripts
from keys.dimensions import LIMIT_MAX, LimitScope
from keys.errors import RateLimitReached
from keys.limits import LEASE_SECONDS, QuotaPlan, RateLimits, ScopedLimits, window_of
from keys.local_quota import LocalQuota
from keys.quota import Quota, Reservation
from tests.harness.quota_oracle import Answer, Oracle, TimedScripts
from tests.keys.conftest import IS_FULL

LEASE_MS = LEASE_SECONDS * 1_000
SCOPES: tuple[LimitScope, ...] = ("key", "project", "organization", "model")
small = st.integers(1, 6)
daily = st.integers(1, 40) | st.integers(1, LIMIT_MAX)
tokens_limit = st.integers(10, 500) | st.integers(1, LIMIT_MAX)
# Often one kind of limit alone: another one in front of it would hide it.
limits = st.one_of(
    st.builds(RateLimits, concurrent_requests=st.integers(1, 3)),
    st.builds(RateLimits, requests_per_minute=small, requests_per_day=st.none() | daily),
    st.builds(RateLimits, tokens_per_minute=tokens_limit, tokens_per_day=st.none() | tokens_limit),
    st.builds(
        RateLimits,
        requests_per_minute=st.none() | small,
        requests_per_day=st.none() | daily,
        tokens_per_minute=st.none() | tokens_limit,
        tokens_per_day=st.none() | tokens_limit,
        concurrent_requests=st.none() | st.integers(1, 4),
    ),
)
# Which request an act is about: few, so that ids repeat.
request = st.integers(0, 7)
reserve = st.tuples(st.just("reserve"), request, st.integers(0, 300))
steps = st.lists(
    st.one_of(
        reserve,
        reserve,
        reserve,
        st.tuples(st.just("settle"), request, st.none() | st.integers(0, 3_000)),
        st.tuples(st.just("settle twice"), request, st.integers(0, 600)),
        st.tuples(st.just("renew"), request, st.just(0)),
        st.tuples(st.just("advance"), st.just(0), st.integers(0, 2_000)),
        st.tuples(
            st.just("advance"), st.just(0), st.sampled_from([LEASE_MS // 2, LEASE_MS - 1, LEASE_MS, 3 * 86_400_000])
        ),
        # As long as the last denial said: a wait that is told must be enough, and not more.
        st.tuples(st.just("wait"), st.just(0), st.sampled_from([-1, 0, 1])),
    ),
    min_size=12,
    max_size=40,
)


class Subject:
    """The product and the oracle, asked the same things."""

    def __init__(self, scripts: TimedScripts, redis: Redis, scoped: list[RateLimits]) -> None:
        self.organization_id = OrganizationId(new_id("org"))
        self.plan_scopes = [ScopedLimits(scope, f"{scope}1", one) for scope, one in zip(SCOPES, scoped, strict=False)]
        self.oracle = Oracle(self.plan.scopes, LEASE_MS)
        self.quota = Quota(scripts, LocalQuota(SystemClock(), lambda: 1))
        self.scripts, self.redis = scripts, redis
        self.reserved: dict[str, Reservation] = {}
        self.wait_ms = 0

    @property
    def plan(self) -> QuotaPlan:
        # A new one each time: what a plan remembers of a denial is on the machine's clock.
        return QuotaPlan(self.organization_id, self.plan_scopes)

    async def reserve(self, request_id: str, tokens: int) -> Answer:
        plan = self.plan
        tokens = int(min(tokens, plan.tokens_max))
        expected = self.oracle.reserve(request_id, tokens)
        before = None if expected.blocking is None else await self.dump()
        try:
            got = self.reserved[request_id] = await self.quota.reserve(request_id, plan, tokens, 0)
            assert not got.is_local
            answer = Answer(None, got.requests, got.tokens_window)
        except RateLimitReached as error:
            wait_seconds = error.retry_after_seconds or 0
            blocking = (error.scope, error.dimension, error.limit, wait_seconds)
            answer = Answer(blocking, window_of(error.shown, 0), window_of(error.shown, 3))
            self.wait_ms = round(wait_seconds * 1_000)
            assert await self.dump() == before
        assert answer == expected
        return answer

    def settle(self, request_id: str, used: int | None) -> None:
        if request_id in self.reserved:
            self.oracle.settle(request_id, used)
            self.quota.settle(self.reserved[request_id], used)

    def settle_twice(self, request_id: str, used: int) -> None:
        """Twice by two objects, as when a command arrives twice: `Reservation` itself does not stop the second."""
        self.settle(request_id, used)
        if request_id in self.reserved:
            self.quota.settle(Reservation(request_id, self.plan, self.reserved[request_id].tokens), used)

    def renew(self, request_id: str) -> None:
        # A lease that has run out may or may not have been swept: both are right.
        if request_id in self.reserved and self.oracle.has_live_lease(request_id):
            self.oracle.renew(request_id)
            self.quota.renew([self.reserved[request_id]])

    async def advance(self, milliseconds: int) -> None:
        self.oracle.now_ms += milliseconds
        await self.scripts.set_clock(self.oracle.now_ms)

    async def dump(self) -> dict[bytes, Any]:
        """Everything that is stored for the organization, without leases that have run out."""
        found: dict[bytes, Any] = {}
        redis = cast("Any", self.redis)
        for key in sorted(await redis.keys(f"*{self.organization_id}*")):
            if await redis.type(key) == b"zset":
                found[key] = await redis.zrangebyscore(key, f"({self.oracle.now_ms}", "+inf", withscores=True)
            else:
                found[key] = await redis.dump(key)
        return {key: value for key, value in found.items() if value}


@pytest.fixture(scope="session")
async def timed(scripts: Scripts, redis: Redis) -> AsyncIterator[TimedScripts]:
    made = TimedScripts(scripts, redis)
    yield made
    await made.set_clock(0)


@given(scoped=st.lists(limits, min_size=1, max_size=4), acts=steps)
@settings(
    max_examples=1_500 if IS_FULL else 200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@example(
    [RateLimits(tokens_per_minute=100)],
    [("reserve", 0, 100), ("settle", 0, 1_000), ("advance", 0, 60_000), ("reserve", 1, 1)],
)
@example(
    [RateLimits(requests_per_minute=1)] * 4, [("reserve", 0, 0), ("reserve", 1, 0), ("wait", 0, -1), ("reserve", 1, 0)]
)
async def test_the_script_answers_as_the_oracle(
    timed: TimedScripts, redis: Redis, scoped: list[RateLimits], acts: list[tuple[str, int, Any]]
) -> None:
    """Guarantee: grants, the blocking dimension, waits, remainders, resets, debts and leases are exact; a denial and a
    repeated command write nothing."""
    subject = Subject(timed, redis, scoped)
    await subject.advance(0)
    for act, number, amount in acts:
        request_id = f"req_{number}"
        if act == "reserve" and subject.plan.scopes:
            await subject.reserve(request_id, amount)
        elif act == "settle":
            subject.settle(request_id, amount)
        elif act == "settle twice":
            subject.settle_twice(request_id, amount)
        elif act == "renew":
            subject.renew(request_id)
        elif act == "advance":
            await subject.advance(amount)
        elif act == "wait":
            await subject.advance(max(0, subject.wait_ms + amount))


async def test_a_debt_of_many_minutes_is_paid_off_by_that_many_minutes(timed: TimedScripts, redis: Redis) -> None:
    """Guarantee: a call that used far more than it reserved delays its key, and does not shut it out."""
    subject = Subject(timed, redis, [RateLimits(tokens_per_minute=1_000)])
    await subject.advance(0)
    await subject.reserve("req_1", 1_000)
    subject.settle("req_1", 5_000)
    denied = await subject.reserve("req_2", 1_000)
    assert denied.blocking is not None
    assert denied.blocking[3] == 300
    await subject.advance(299_999)
    assert (await subject.reserve("req_2", 1_000)).blocking is not None
    await subject.advance(1)
    assert (await subject.reserve("req_2", 1_000)).blocking is None


async def test_a_clock_that_goes_back_refills_nothing_twice(timed: TimedScripts, redis: Redis) -> None:
    subject = Subject(timed, redis, [RateLimits(requests_per_minute=60, requests_per_day=1_000)])
    start = subject.oracle.now_ms

    async def granted(moment_ms: int, asked: int) -> int:
        await timed.set_clock(start + moment_ms)
        for count in range(asked):
            try:
                await subject.quota.reserve(new_id("req"), subject.plan, 0, 0)
            except RateLimitReached:
                return count
        return asked

    assert await granted(0, 61) == 60
    assert await granted(4_000, 2) == 2
    # Back, and something is still there to be taken: the bucket is written, with the later time kept.
    assert await granted(0, 1) == 1
    assert await granted(4_000, 5) == 1


async def test_a_slot_is_free_when_its_lease_ends_and_not_before_and_renewing_moves_that(
    timed: TimedScripts, redis: Redis
) -> None:
    subject = Subject(timed, redis, [RateLimits(concurrent_requests=1)])
    await subject.advance(0)
    await subject.reserve("req_1", 0)
    await subject.advance(LEASE_MS - 1)
    assert (await subject.reserve("req_2", 0)).blocking == ("key", "concurrent_requests", 1, 1.0)
    subject.renew("req_1")
    await subject.advance(LEASE_MS - 1)
    assert (await subject.reserve("req_2", 0)).blocking is not None
    await subject.advance(1)
    assert (await subject.reserve("req_2", 0)).blocking is None


async def test_a_bucket_that_is_used_does_not_expire(timed: TimedScripts, redis: Redis) -> None:
    """Guarantee: nothing that is still in use is forgotten: within an hour of use it is kept for two days more."""
    subject = Subject(timed, redis, [RateLimits(tokens_per_day=100, concurrent_requests=5)])
    buckets = f"q:{{{subject.organization_id}}}:buckets"
    leases = f"q:{{{subject.organization_id}}}:leases:{subject.plan.names[0]}"
    await subject.advance(0)
    await subject.reserve("req_1", 10)
    for hour in range(2, 4):
        assert await redis.pttl(buckets) > 47 * 3_600_000
        assert await redis.pttl(leases) > LEASE_MS
        await redis.pexpire(buckets, 60_000)
        await redis.pexpire(leases, 60_000)
        await subject.advance(3_600_000)
        await subject.reserve(f"req_{hour}", 10)
    assert await redis.pttl(buckets) > 47 * 3_600_000
    assert await redis.pttl(leases) > LEASE_MS


async def test_calls_that_end_together_are_settled_together(timed: TimedScripts, redis: Redis) -> None:
    """Guarantee: one command for many calls gives back to each what one command for each would."""
    subject = Subject(timed, redis, [RateLimits(tokens_per_minute=100_000, concurrent_requests=400)] * 2)
    await subject.advance(0)
    for number in range(300):
        await subject.reserve(f"req_{number}", 100)
    for number in range(300):
        subject.settle(f"req_{number}", (number * 7) % 250 if number % 3 else None)
        if number % 50 == 0:
            subject.settle(f"req_{number}", 1)
    await subject.reserve("req_after", 1)
    assert await redis.zcard(f"q:{{{subject.organization_id}}}:leases:{subject.plan.names[0]}") == 1


@pytest.mark.parametrize("limit", [1, 7, 10**6, LIMIT_MAX - 1, LIMIT_MAX])
async def test_the_largest_limits_are_exact_to_the_token(timed: TimedScripts, redis: Redis, limit: int) -> None:
    """Guarantee: Lua's doubles lose nothing up to LIMIT_MAX."""
    subject = Subject(timed, redis, [RateLimits(tokens_per_day=limit), RateLimits(tokens_per_minute=limit)])
    await subject.advance(0)
    first = await subject.reserve("req_1", limit - 1)
    assert first.tokens is not None
    assert first.tokens.remaining == 1
    assert (await subject.reserve("req_2", 1)).blocking is None
    assert (await subject.reserve("req_3", 1)).blocking is not None
    subject.settle("req_1", 2 * limit)
    await subject.advance(60_000)
    await subject.reserve("req_4", 1)


async def test_limits_hold_per_organization_and_scope(quota: Quota) -> None:
    """Guarantee: one tenant's use never counts against another's, also under equal names."""
    one, other = OrganizationId(new_id("org")), OrganizationId(new_id("org"))
    scoped = [ScopedLimits("model", "gpt", RateLimits(requests_per_minute=1))]
    await quota.reserve(new_id("req"), QuotaPlan(one, scoped), 1, 1)
    await quota.reserve(new_id("req"), QuotaPlan(other, scoped), 1, 1)
    named_alike = [ScopedLimits("project", "gpt", RateLimits(requests_per_minute=1))]
    await quota.reserve(new_id("req"), QuotaPlan(one, named_alike), 1, 1)
    with pytest.raises(RateLimitReached):
        await quota.reserve(new_id("req"), QuotaPlan(one, scoped), 1, 1)
