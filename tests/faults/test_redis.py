"""Redis dies, stalls, forgets, comes back: calls go on at this process's share, and afterwards limits are exact again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from core.database import Database
from keys.limits import RateLimits
from tests.faults.conftest import PATH
from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway, config_for
from tests.harness.private_stores import PrivateRedis, private_redis
from tests.harness.provider import FakeProvider, stream
from tests.harness.quota_view import nothing_is_taken
from tests.harness.raw import RawAnswer, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

_REQUESTS_A_DAY = 1_000


@pytest.fixture
async def fragile(workdir: Path) -> AsyncIterator[PrivateRedis]:
    async with private_redis(workdir) as redis:
        yield redis


@pytest.fixture
async def gateway(
    fragile: PrivateRedis, stores: TestStores, provider: FakeProvider, workdir: Path
) -> AsyncIterator[Gateway]:
    """A gateway on a Redis of its own."""
    own = stores._replace(redis_url=fragile.url)
    async with Gateway(own, workdir, config_for(provider.base_url)) as made:
        yield made


@pytest.fixture
async def tenant(database: Database, stores: TestStores) -> Tenant:
    """A day's limit: it refills by one request in 86 s, so that counting is exact."""
    limits = RateLimits(requests_per_day=_REQUESTS_A_DAY, concurrent_requests=50)
    return await new_tenant(database, stores.pepper, limits={"key": limits})


async def _ask(gateway: Gateway, tenant: Tenant, *, streamed: bool = False) -> RawAnswer:
    return await asyncio.wait_for(call(gateway.port, post(PATH, tenant.key, chat(stream=streamed))), 10)


def _is_local(got: RawAnswer) -> bool:
    assert got.status == 200, got
    return got.headers.get("x-quota-mode") == "local"


def _left(got: RawAnswer) -> int:
    return int(got.headers["x-ratelimit-remaining-requests"])


async def _is_back(gateway: Gateway, tenant: Tenant) -> bool:
    return not _is_local(await _ask(gateway, tenant))


class TestKilled:
    async def test_calls_go_on_locally_and_come_back_when_redis_does(
        self, gateway: Gateway, fragile: PrivateRedis, tenant: Tenant
    ) -> None:
        assert not _is_local(await _ask(gateway, tenant))
        await fragile.kill()
        for _ in range(10):
            assert _is_local(await _ask(gateway, tenant))
        await fragile.start()
        await eventually(lambda: _is_back(gateway, tenant), 5)
        first = _left(await _ask(gateway, tenant))
        assert first - _left(await _ask(gateway, tenant)) == 1

    async def test_streams_that_were_running_finish_whole(
        self, gateway: Gateway, fragile: PrivateRedis, provider: FakeProvider, tenant: Tenant
    ) -> None:
        may_go_on = asyncio.Event()
        whole = stream("a", "b")

        async def play(exchange) -> None:
            await may_go_on.wait()
            await whole(exchange)

        provider.scripts.append(play)
        asked = asyncio.create_task(_ask(gateway, tenant, streamed=True))
        await eventually(lambda: provider.exchanges)
        await fragile.kill()
        may_go_on.set()
        assert (await asked).body.endswith(b"data: [DONE]\n\n")
        await fragile.start()
        await eventually(lambda: _is_back(gateway, tenant), 5)

    async def test_a_local_limit_refuses_too(
        self, gateway: Gateway, fragile: PrivateRedis, database: Database, stores: TestStores
    ) -> None:
        tight = await new_tenant(database, stores.pepper, limits={"key": RateLimits(requests_per_day=3)})
        await fragile.kill()
        got = [await _ask(gateway, tight) for _ in range(5)]
        assert [one.status for one in got] == [200, 200, 200, 429, 429]
        assert got[3].error()["code"] == "rate_limit_exceeded"
        assert int(got[3].headers["retry-after"]) >= 1

    async def test_a_gateway_starts_without_redis_and_finds_it_later(
        self, fragile: PrivateRedis, stores: TestStores, provider: FakeProvider, workdir: Path, tenant: Tenant
    ) -> None:
        await fragile.kill()
        config = config_for(provider.base_url)
        async with Gateway(stores._replace(redis_url=fragile.url), workdir, config) as late:
            assert _is_local(await _ask(late, tenant))
            await fragile.start()
            await eventually(lambda: _is_back(late, tenant), 5)


class TestFrozen:
    async def test_three_seconds_of_silence_delay_nobody_for_long(
        self, gateway: Gateway, fragile: PrivateRedis, database: Database, stores: TestStores
    ) -> None:
        """Guarantee: no call waits for a Redis that holds its connections and answers nothing."""
        tenant = await new_tenant(database, stores.pepper)
        for _ in range(20):
            assert not _is_local(await _ask(gateway, tenant))
        fragile.freeze()
        seconds: list[float] = []
        locals_seen = 0
        ends_at = time.monotonic() + 3
        while time.monotonic() < ends_at:
            started = time.perf_counter()
            got = await asyncio.gather(*(_ask(gateway, tenant) for _ in range(8)))
            seconds.append(time.perf_counter() - started)
            locals_seen += sum(_is_local(one) for one in got)
            await moment(0.02)
        fragile.thaw()
        seconds.sort()
        assert locals_seen == len(seconds) * 8
        assert seconds[int(len(seconds) * 0.99) - 1] < 0.3
        assert seconds[-1] < 1.0
        await eventually(lambda: _is_back(gateway, tenant), 5)

    async def test_what_the_frozen_redis_had_been_told_is_given_back(
        self, gateway: Gateway, fragile: PrivateRedis, tenant: Tenant
    ) -> None:
        assert not _is_local(await _ask(gateway, tenant))
        fragile.freeze()
        got = await asyncio.gather(*(_ask(gateway, tenant) for _ in range(8)))
        assert all(_is_local(one) for one in got)
        fragile.thaw()
        await eventually(lambda: _is_back(gateway, tenant), 5)
        async with Redis.from_url(fragile.url) as redis:
            await eventually(lambda: nothing_is_taken(redis, tenant.organization_id), 3)


class TestForgetful:
    async def test_flushall_gives_full_buckets_and_exact_counting(
        self, gateway: Gateway, fragile: PrivateRedis, tenant: Tenant
    ) -> None:
        for _ in range(5):
            await _ask(gateway, tenant)
        async with Redis.from_url(fragile.url) as redis:
            await redis.flushall()
            await redis.script_flush()
        got = await _ask(gateway, tenant)
        assert not _is_local(got)
        assert _left(got) == _REQUESTS_A_DAY - 1
        assert _left(await _ask(gateway, tenant)) == _REQUESTS_A_DAY - 2

    async def test_an_orderly_restart_keeps_the_counts(
        self, gateway: Gateway, fragile: PrivateRedis, tenant: Tenant
    ) -> None:
        for _ in range(5):
            await _ask(gateway, tenant)
        async with Redis.from_url(fragile.url) as redis:
            await redis.bgrewriteaof()
            await eventually(lambda: _is_written(redis))
        await fragile.kill()
        await fragile.start()
        await eventually(lambda: _is_back(gateway, tenant), 5)
        left = _left(await _ask(gateway, tenant))
        assert left < _REQUESTS_A_DAY - 6
        many = await asyncio.gather(*(_ask(gateway, tenant) for _ in range(20)))
        assert sorted(_left(one) for one in many) == list(range(left - 20, left))

    async def test_a_redis_that_is_full_is_a_redis_that_is_down(
        self, gateway: Gateway, fragile: PrivateRedis, tenant: Tenant
    ) -> None:
        async with Redis.from_url(fragile.url) as redis:
            await redis.config_set("maxmemory", "100kb")
            try:
                assert _is_local(await _ask(gateway, tenant))
            finally:
                await redis.config_set("maxmemory", "0")
        await eventually(lambda: _is_back(gateway, tenant), 5)

    async def test_dropped_connections_are_made_again(
        self, gateway: Gateway, fragile: PrivateRedis, tenant: Tenant
    ) -> None:
        async with Redis.from_url(fragile.url) as redis:
            for _ in range(3):
                await redis.client_kill_filter(_type="normal", skipme=True)
                await redis.client_kill_filter(_type="pubsub")
                assert (await _ask(gateway, tenant)).status == 200
                await eventually(lambda: _is_back(gateway, tenant), 5)


async def _is_written(redis: Redis) -> bool:
    found = await redis.info("persistence")
    return not found["aof_rewrite_in_progress"] and not found.get("aof_rewrite_scheduled")
