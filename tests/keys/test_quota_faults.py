"""Quotas while Redis is down, slow, empty or late, and while callers give up."""

from __future__ import annotations

import asyncio
import contextlib
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from core.clock import ManualClock, SystemClock
from core.ids import OrganizationId, new_id
from core.redis import Scripts, scripts_for
from core.resp import RedisUnavailable, Script, ScriptCall, ScriptShape
from keys.dimensions import LimitScope
from keys.errors import RateLimitReached, RequestTooLarge
from keys.limits import QUOTA_SCRIPTS, QuotaPlan, RateLimits, ScopedLimits
from keys.local_quota import LocalQuota
from keys.quota import Quota, Reservation
from tests.harness.authority import Authority
from tests.harness.eventually import eventually, moment
from tests.harness.private_stores import PrivateRedis, private_redis
from tests.harness.quota_oracle import fresh
from tests.harness.quota_view import leases, records
from tests.harness.stores import TestStores


def plan_of(**limits: int) -> QuotaPlan:
    return plan_with({"key": RateLimits(**limits)})


def plan_with(scoped: dict[LimitScope, RateLimits]) -> QuotaPlan:
    return QuotaPlan(OrganizationId(new_id("org")), [ScopedLimits(scope, "x", one) for scope, one in scoped.items()])


def local_quota(gateways: int = 1) -> LocalQuota:
    return LocalQuota(SystemClock(), lambda: gateways)


async def grants(quota: Quota, plan: QuotaPlan, asked: int, tokens: int = 0) -> int:
    count = 0
    for _ in range(asked):
        try:
            await quota.reserve(new_id("req"), fresh(plan), tokens, 0)
        except RateLimitReached:
            continue
        count += 1
    return count


class TestSizes:
    async def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers(self, quota: Quota) -> None:
        plan = plan_with({"key": RateLimits(tokens_per_minute=500), "organization": RateLimits(tokens_per_day=400)})
        with pytest.raises(RequestTooLarge) as caught:
            await quota.reserve(new_id("req"), plan, 401, 0)
        assert "401" in caught.value.message
        assert "400" in caught.value.message
        assert "organization tokens per day" in caught.value.message

    async def test_the_outputs_share_is_cut_to_the_smallest_limit(self, quota: Quota) -> None:
        plan = plan_with({"key": RateLimits(tokens_per_minute=500), "organization": RateLimits(tokens_per_day=400)})
        reservation = await quota.reserve(new_id("req"), plan, 100, 100_000)
        assert reservation.tokens == 400
        assert reservation.tokens_window is not None
        assert reservation.tokens_window.remaining == 0
        quota.settle(reservation, 150)
        again = await quota.reserve(new_id("req"), plan, 250, 0)
        assert again.tokens_window is not None
        assert again.tokens_window.remaining == 0

    async def test_without_limits_redis_is_not_asked(self) -> None:
        down = scripts_for("unix:///nowhere/redis.sock", QUOTA_SCRIPTS)
        quota = Quota(down, local_quota())
        reservation = await quota.reserve(new_id("req"), plan_of(), 10**9, 10**9)
        quota.settle(reservation, 5)
        assert (reservation.is_local, quota.local_decisions, len(down.undelivered)) == (False, 0, 0)


class TestDenialCache:
    async def test_exhausted_requests_are_denied_without_asking_redis(self, quota: Quota, redis: Redis) -> None:
        plan = plan_of(requests_per_minute=1)
        await quota.reserve(new_id("req"), plan, 0, 0)
        with pytest.raises(RateLimitReached) as first:
            await quota.reserve(new_id("req"), plan, 0, 0)
        await cast("Any", redis).delete(*await cast("Any", redis).keys(f"*{plan.organization_id}*"))
        with pytest.raises(RateLimitReached) as second:
            await quota.reserve(new_id("req"), plan, 0, 0)
        assert first.value.retry_after_seconds is not None
        assert second.value.retry_after_seconds is not None
        assert second.value.retry_after_seconds <= first.value.retry_after_seconds <= 60
        assert second.value.shown == first.value.shown
        assert await quota.reserve(new_id("req"), fresh(plan), 0, 0)

    @pytest.mark.parametrize("limits", [{"tokens_per_minute": 100}, {"concurrent_requests": 1}])
    async def test_what_can_be_given_back_is_asked_for_again(self, quota: Quota, limits: dict[str, int]) -> None:
        plan = plan_of(**limits)
        reservation = await quota.reserve(new_id("req"), plan, 100, 0)
        with pytest.raises(RateLimitReached):
            await quota.reserve(new_id("req"), plan, 100, 0)
        quota.settle(reservation, 0)
        assert (await quota.reserve(new_id("req"), plan, 100, 0)).is_local is False


class TestRedisDown:
    async def test_limits_hold_at_this_processs_share_and_are_exact_again_on_recovery(self, workdir: Path) -> None:
        async with private_redis(workdir) as server:
            scripts = scripts_for(server.url, QUOTA_SCRIPTS, deadline_seconds=1)
            await scripts.start()
            quota = Quota(scripts, local_quota(4))
            plan = plan_of(requests_per_minute=40)
            assert await grants(quota, plan, 5) == 5
            await server.kill()
            await eventually(lambda: not scripts.is_up)
            assert await grants(quota, plan, 50) == 10
            assert quota.local_decisions == 50
            await server.start()
            await eventually(lambda: scripts.is_up)
            reservation = await quota.reserve(new_id("req"), fresh(plan), 0, 0)
            assert not reservation.is_local
            assert reservation.requests is not None
            assert reservation.requests.limit == 40
            await scripts.close()

    async def test_a_settlement_without_redis_is_kept(self, workdir: Path) -> None:
        async with private_redis(workdir) as server:
            scripts = scripts_for(server.url, QUOTA_SCRIPTS, deadline_seconds=1)
            await scripts.start()
            quota = Quota(scripts, local_quota())
            reservation = await quota.reserve(
                new_id("req"), plan_of(concurrent_requests=3, tokens_per_minute=100), 60, 0
            )
            await server.kill()
            await eventually(lambda: not scripts.is_up)
            quota.settle(reservation, 10)
            quota.settle(reservation, 10)
            quota.renew([reservation])
            quota.flush()
            assert len(scripts.undelivered) == 1
            await scripts.close()

    async def test_scripts_that_redis_forgot_are_sent_again(self, scripts: Scripts, redis: Redis, quota: Quota) -> None:
        plan = plan_of(requests_per_minute=100, tokens_per_minute=10_000)
        for _ in range(3):
            await redis.script_flush()
            found = await asyncio.gather(*(quota.reserve(new_id("req"), plan, 10, 0) for _ in range(20)))
            assert not any(reservation.is_local for reservation in found)
            await redis.script_flush()
            for reservation in found:
                quota.settle(reservation, 0)
        last = await quota.reserve(new_id("req"), plan, 10, 0)
        assert last.tokens_window is not None
        assert last.requests is not None
        assert (last.requests.remaining, last.tokens_window.remaining // 10) == (100 - 61, 999)

    async def test_a_restarted_redis_that_kept_its_file_kept_the_limits(self, workdir: Path) -> None:
        """Guarantee: a restart of Redis forgives no more than its last second, and what runs can still be settled."""
        async with private_redis(workdir) as server:
            client = Redis.from_url(server.url)
            await client.config_set("appendfsync", "always")
            scripts = scripts_for(server.url, QUOTA_SCRIPTS, deadline_seconds=5)
            await scripts.start()
            quota = Quota(scripts, local_quota())
            plan = plan_of(tokens_per_day=1_000, concurrent_requests=5)
            reservation = await quota.reserve(new_id("req"), plan, 900, 0)
            await server.kill()
            await eventually(lambda: not scripts.is_up)
            await server.start()
            await eventually(lambda: scripts.is_up)
            with pytest.raises(RateLimitReached):
                await quota.reserve(new_id("req"), plan, 200, 0)
            quota.settle(reservation, 100)
            after = await quota.reserve(new_id("req"), plan, 200, 0)
            assert after.tokens_window is not None
            assert after.tokens_window.remaining == 700
            quota.settle(after, 0)
            await scripts.close()
            assert await leases(client, plan.organization_id) == {}
            await client.aclose()


class TestRedisPaused:
    async def test_calls_fail_at_the_deadline_and_at_once_afterwards(self, workdir: Path) -> None:
        async with private_redis(workdir) as server:
            scripts = scripts_for(server.url, QUOTA_SCRIPTS, deadline_seconds=0.2)
            await scripts.start()
            quota = Quota(scripts, local_quota())
            plan = plan_of(requests_per_minute=100)
            await quota.reserve(new_id("req"), plan, 0, 0)
            server.freeze()
            loop = asyncio.get_running_loop()
            began = loop.time()
            assert (await quota.reserve(new_id("req"), plan, 0, 0)).is_local
            assert 0.15 < loop.time() - began < 1.5
            await eventually(lambda: not scripts.is_up)
            began = loop.time()
            assert await grants(quota, plan, 20) == 20
            assert loop.time() - began < 0.1
            server.thaw()
            await eventually(lambda: scripts.is_up)
            assert not (await quota.reserve(new_id("req"), plan, 0, 0)).is_local
            await scripts.close()

    async def test_a_late_answer_is_never_taken_for_another_calls(self, workdir: Path) -> None:
        """Guarantee: every caller gets the answer to its own call, or none."""
        async with private_redis(workdir) as server:
            scripts = scripts_for(server.url, QUOTA_SCRIPTS, deadline_seconds=0.3)
            await scripts.start()
            got = answered = 0
            for turn in range(4):
                await eventually(lambda: scripts.is_up)
                late = [echo(scripts, turn * 1_000 + number) for number in range(50)]
                server.freeze()
                pause = asyncio.gather(*late, return_exceptions=True)
                # Half of the pauses are longer than the deadline, and shorter than what makes the connection be given up.
                await moment(0.4 if turn % 2 else 0.05)
                server.thaw()
                more = [echo(scripts, turn * 1_000 + 500 + number) for number in range(50)] if scripts.is_up else []
                for number, answer in enumerate(await pause):
                    answered += 1
                    if not isinstance(answer, BaseException):
                        got += 1
                        assert answer == [turn * 1_000 + number]
                for number, answer in enumerate(await asyncio.gather(*more, return_exceptions=True)):
                    answered += 1
                    if not isinstance(answer, BaseException):
                        got += 1
                        assert answer == [turn * 1_000 + 500 + number]
            assert answered >= 200
            assert got >= 50
            await scripts.close()

    async def test_a_grant_that_comes_too_late_is_given_back_when_the_process_refused(self, workdir: Path) -> None:
        """Guarantee: a call that was refused holds no slot in Redis, though Redis granted it after all."""
        async with private_redis(workdir) as server:
            client = Redis.from_url(server.url)
            # Refused locally: a share of one request, taken. Granted by Redis: the limit is 40.
            scripts = scripts_for(server.url, QUOTA_SCRIPTS, deadline_seconds=0.4)
            await scripts.start()
            local = local_quota(40)
            quota = Quota(scripts, local)
            plan = plan_of(requests_per_minute=40, concurrent_requests=1_000)
            local.reserve(plan, 0)
            server.freeze()
            waiting = asyncio.ensure_future(quota.reserve(new_id("req"), plan, 0, 0))
            with pytest.raises(RateLimitReached):
                await waiting
            assert scripts.is_up
            server.thaw()
            await eventually(lambda: answered_all(scripts))
            assert await records(client, plan.organization_id) == []
            assert await leases(client, plan.organization_id) == {}
            await scripts.close()
            await client.aclose()


class TestCancelled:
    async def test_a_cancelled_call_holds_nothing(self, quota: Quota, redis: Redis) -> None:
        plan = plan_of(concurrent_requests=1, tokens_per_day=100)
        waiting = asyncio.ensure_future(quota.reserve(new_id("req"), plan, 100, 0))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        reservation = await quota.reserve(new_id("req"), plan, 100, 0)
        assert reservation.tokens_window is not None
        assert reservation.tokens_window.remaining == 0
        quota.settle(reservation, 0)

    async def test_in_a_storm_of_cancellations_answers_stay_with_their_calls_and_nothing_leaks(
        self, quota: Quota, redis: Redis
    ) -> None:
        """Guarantee: cancelled at any point, no call gets another's answer, and every slot comes back."""
        chance = random.Random(7)
        organization_id = OrganizationId(new_id("org"))
        # The limit in the answer is the checksum: every call has its own.
        plans = [
            QuotaPlan(
                organization_id,
                [ScopedLimits("model", f"m{n}", RateLimits(requests_per_day=1_000 + n, concurrent_requests=3))],
            )
            for n in range(1_000)
        ]

        async def one(number: int) -> Reservation | None:
            try:
                reservation = await quota.reserve(f"req_{number}", plans[number], 1, 0)
            except asyncio.CancelledError:
                return None
            assert reservation.requests is not None
            assert reservation.requests.limit == 1_000 + number
            for _ in range(chance.randint(0, 3)):
                await asyncio.sleep(0)
            quota.settle(reservation, 1)
            return reservation

        tasks = [asyncio.ensure_future(one(number)) for number in range(1_000)]
        victims = chance.sample(tasks, 600)
        while victims:
            for _ in range(40):
                victims.pop().cancel()
            await asyncio.sleep(0)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(one, Reservation) for one in ended) >= 400
        assert sum(not isinstance(one, Reservation) for one in ended) > 20
        assert not [one for one in ended if isinstance(one, Exception)]

        async def all_given_back() -> bool:
            return not await leases(redis, organization_id)

        held = [n for n, one in enumerate(ended) if isinstance(one, BaseException)]
        await quota.reserve(new_id("req"), plan_of(requests_per_day=5), 0, 0)
        # What was cancelled after its grant, before its settlement, is its caller's to settle.
        left = await leases(redis, organization_id)
        assert left.keys() <= {f"req_{n}" for n in held}
        for n in held:
            quota.settle(Reservation(f"req_{n}", plans[n], 1), 0)
        await eventually(all_given_back)


def answered_all(scripts: Any) -> bool:
    return scripts.is_up and not scripts._wire.waiting


_ECHO = Script("return {tonumber(ARGV[1])}")
_ECHO_SHAPE = ScriptShape(_ECHO, keys=[], fixed=[])


async def echo(scripts: Scripts, number: int) -> list[int]:
    return await scripts.run(ScriptCall(_ECHO_SHAPE, (b"echo",), (b"%d" % number,)))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
    writer.close()


class TestConnection:
    async def test_a_refused_command_fails_only_itself(self, scripts: Scripts) -> None:
        broken = ScriptShape(Script("return redis.call('NO SUCH COMMAND')"), keys=[], fixed=[])
        calls = [scripts.run(ScriptCall(broken, (b"x",), (b"1",))), echo(scripts, 5)]
        first, second = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(first, RedisUnavailable)
        assert second == [5]

    async def test_a_wrong_password_or_nobody_there_is_down_not_an_error(self, workdir: Path) -> None:
        async with private_redis(workdir) as server:
            client = Redis.from_url(server.url)
            await client.config_set("requirepass", "right")
            wrong = scripts_for(server.url.replace("unix://", "unix://:wrong@"), QUOTA_SCRIPTS)
            right = scripts_for(server.url.replace("unix://", "unix://:right@"), QUOTA_SCRIPTS, deadline_seconds=5)
            for one in (wrong, right):
                await one.start()
            assert (wrong.is_up, right.is_up) == (False, True)
            assert await echo(right, 3) == [3]
            with pytest.raises(RedisUnavailable):
                await echo(wrong, 3)
            for one in (wrong, right):
                await one.close()
            await client.aclose()

    async def test_the_tls_options_of_the_address_hold(self, workdir: Path, redis: Redis, stores: TestStores) -> None:
        """Guarantee: `rediss://` verifies, against the roots that the address names."""
        authority = Authority(workdir)
        socket_path = stores.redis_url.removeprefix("unix://").partition("?")[0]

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner_writer = await asyncio.open_unix_connection(socket_path)
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))

        server = await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=authority.server_context("127.0.0.1"))
        address = f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        trusting = scripts_for(f"{address}?ssl_ca_certs={authority.path}", QUOTA_SCRIPTS, deadline_seconds=5)
        doubting = scripts_for(address, QUOTA_SCRIPTS)
        for one in (trusting, doubting):
            await one.start()
        assert (trusting.is_up, doubting.is_up) == (True, False)
        assert await echo(trusting, 7) == [7]
        for one in (trusting, doubting):
            await one.close()
        server.close()

    async def test_a_paused_server_is_found_again_when_it_comes_back_elsewhere(self, workdir: Path) -> None:
        server = PrivateRedis(workdir / "r")
        scripts = scripts_for(f"unix://{workdir}/r/redis.sock", QUOTA_SCRIPTS, deadline_seconds=1)
        await scripts.start()
        assert not scripts.is_up
        await server.start()
        await eventually(lambda: scripts.is_up)
        assert await echo(scripts, 9) == [9]
        await scripts.close()
        await server.close()


class TestLocalQuota:
    def test_a_share_of_every_limit_and_its_refill(self) -> None:
        clock = ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
        local = LocalQuota(clock, lambda: 3)
        plan = plan_of(requests_per_minute=30, requests_per_day=36)
        for _ in range(10):
            local.reserve(plan, 0)
        with pytest.raises(RateLimitReached) as caught:
            local.reserve(plan, 0)
        assert (caught.value.dimension, caught.value.limit) == ("requests_per_minute", 10)
        assert caught.value.retry_after_seconds == pytest.approx(6)
        clock.advance(timedelta(seconds=5.9))
        with pytest.raises(RateLimitReached):
            local.reserve(plan, 0)
        clock.advance(timedelta(seconds=0.2))
        local.reserve(plan, 0)
        clock.advance(timedelta(minutes=10))
        local.reserve(plan, 0)
        with pytest.raises(RateLimitReached) as caught:
            local.reserve(plan, 0)
        assert caught.value.dimension == "requests_per_day"

    def test_a_denial_takes_nothing_in_any_scope(self) -> None:
        clock = ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
        local = LocalQuota(clock, lambda: 1)
        plan = plan_with({"key": RateLimits(requests_per_minute=5), "organization": RateLimits(concurrent_requests=1)})
        local.reserve(plan, 0)
        for _ in range(20):
            with pytest.raises(RateLimitReached) as caught:
                local.reserve(plan, 0)
            assert caught.value.scope == "organization"
        for _ in range(4):
            local.settle(plan, 0, 0)
            local.reserve(plan, 0)
        local.settle(plan, 0, 0)
        with pytest.raises(RateLimitReached) as caught:
            local.reserve(plan, 0)
        assert caught.value.dimension == "requests_per_minute"

    def test_tokens_are_given_back_and_debts_are_kept(self) -> None:
        clock = ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
        local = LocalQuota(clock, lambda: 2)
        plan = plan_of(tokens_per_minute=200)
        local.reserve(plan, 80)
        local.settle(plan, 80, 30)
        local.reserve(plan, 70)
        local.settle(plan, 70, 370)
        clock.advance(timedelta(minutes=2.9))
        with pytest.raises(RateLimitReached):
            local.reserve(plan, 1)
        clock.advance(timedelta(minutes=0.2))
        local.reserve(plan, 1)

    def test_the_smallest_limit_lets_one_through_per_gateway(self) -> None:
        local = LocalQuota(ManualClock(datetime(2026, 1, 1, tzinfo=UTC)), lambda: 50)
        plan = plan_of(requests_per_minute=3, concurrent_requests=3, tokens_per_minute=100)
        # Larger than the share of 2 tokens: elsewhere it would fit, so it passes while the bucket is full.
        local.reserve(plan, 90)
        with pytest.raises(RateLimitReached):
            local.reserve(plan, 0)

    def test_no_gateway_known_counts_as_one(self) -> None:
        local = LocalQuota(ManualClock(datetime(2026, 1, 1, tzinfo=UTC)), lambda: 0)
        plan = plan_of(requests_per_minute=2)
        local.reserve(plan, 0)
        local.reserve(plan, 0)
        with pytest.raises(RateLimitReached):
            local.reserve(plan, 0)
