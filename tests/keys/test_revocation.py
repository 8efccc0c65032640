"""How a change to a key reaches every gateway: three real API processes, a Redis of their own."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from core.database import Database
from core.ids import GatewayId, KeyId, OrganizationId
from core.redis import connect
from keys.lifecycle import NewKey, revoke_key, rotate_key, set_limits
from keys.limits import RateLimits
from keys.revocation import KeyChange, KeyFeed, Propagation, announce
from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway
from tests.harness.private_stores import PrivateRedis, private_redis
from tests.harness.raw import RawAnswer, call, chat, post
from tests.harness.stores import TestStores, with_database
from tests.harness.tenant import Tenant, new_tenant
from tests.keys.conftest import IS_FULL

GATEWAYS = 3
TRIALS = 100 if IS_FULL else 10
PATH = "/v1/chat/completions"


class Fleet(NamedTuple):
    """Gateways that share their stores, each on a port of its own."""

    gateways: list[Gateway]
    server: PrivateRedis
    redis: Redis

    async def ask(self, key: str, at: int = 0) -> RawAnswer:
        return await call(self.gateways[at].port, post(PATH, key, chat("demo")))

    async def ask_all(self, key: str) -> list[int]:
        return [(await self.ask(key, at)).status for at in range(GATEWAYS)]

    async def warm(self, key: str) -> None:
        """Have the key in every cache."""
        for _ in range(2):
            assert await self.ask_all(key) == [200] * GATEWAYS


@pytest.fixture(scope="module")
async def fleet(stores: TestStores) -> AsyncIterator[Fleet]:
    directory = Path(tempfile.mkdtemp(prefix="aap-"))
    async with private_redis(directory) as server, contextlib.AsyncExitStack() as running:
        own = TestStores(stores.database_url, server.url, stores.pepper)
        gateways = []
        for at in range(GATEWAYS):
            (directory / str(at)).mkdir()
            gateways.append(Gateway(own, directory / str(at), ""))
            running.push_async_callback(gateways[-1].stop)
        await asyncio.gather(*(gateway.start() for gateway in gateways))
        redis = connect(server.url)
        running.push_async_callback(redis.aclose)
        yield Fleet(gateways, server, redis)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def all_live(fleet: Fleet, database: Database, stores: TestStores) -> Fleet:
    """The fleet, once every process is registered and hears what is announced."""
    tenant = await new_tenant(database, stores.pepper)

    async def three_acknowledge() -> bool:
        change = await change_limits(database, tenant, RateLimits(requests_per_day=1_000))
        found = await announce(fleet.redis, change)
        return len(found.acknowledged) == GATEWAYS and found.is_complete

    await eventually(three_acknowledge, 20)
    return fleet


async def change_limits(database: Database, tenant: Tenant, limits: RateLimits) -> KeyChange:
    organization_id = tenant.organization_id
    async with database.transaction() as session:
        sequence = await set_limits(session, "organization", organization_id, limits, organization_id=organization_id)
    return KeyChange(sequence=sequence, organization_id=organization_id, key_id=None)


async def revoke(database: Database, tenant: Tenant) -> KeyChange:
    async with database.transaction() as session:
        sequence = await revoke_key(
            session, tenant.key_id, organization_id=tenant.organization_id, now=datetime.now(UTC)
        )
    return KeyChange(sequence=sequence, organization_id=tenant.organization_id, key_id=tenant.key_id)


async def rotate(database: Database, stores: TestStores, tenant: Tenant, grace: timedelta) -> tuple[str, KeyChange]:
    async with database.transaction() as session:
        issued = await rotate_key(
            session,
            tenant.key_id,
            organization_id=tenant.organization_id,
            grace=grace,
            pepper=stores.pepper,
            now=datetime.now(UTC),
        )
    return issued.secret, KeyChange(
        sequence=issued.change, organization_id=tenant.organization_id, key_id=tenant.key_id
    )


class Poll:
    """Asks one gateway again and again until it refuses. Times are on the monotonic clock."""

    def __init__(self, fleet: Fleet, key: str, at: int) -> None:
        self.taken_at = 0.0
        self.refused_at = asyncio.ensure_future(self._until_refused(fleet, key, at))

    async def _until_refused(self, fleet: Fleet, key: str, at: int) -> float:
        while True:
            began = time.monotonic()
            if (await fleet.ask(key, at)).status != 200:
                return time.monotonic()
            self.taken_at = began


class TestAnnounced:
    async def test_once_announce_returns_no_process_takes_the_key(
        self,
        all_live: Fleet,
        database: Database,
        stores: TestStores,
        record_testsuite_property: Callable[[str, object], None],
    ) -> None:
        """Guarantee: revoked is dead on every process within 1 s (p99), and when all have acknowledged, at once."""
        latencies: list[float] = []
        for _ in range(TRIALS):
            tenant = await new_tenant(database, stores.pepper)
            await all_live.warm(tenant.key)
            polls = [Poll(all_live, tenant.key, at) for at in range(GATEWAYS)]
            await eventually(lambda polls=polls: all(poll.taken_at for poll in polls))
            change = await revoke(database, tenant)
            committed_at = time.monotonic()
            propagation = await announce(all_live.redis, change)
            announced_at = time.monotonic()
            assert (len(propagation.acknowledged), propagation.missing) == (GATEWAYS, [])
            assert await all_live.ask_all(tenant.key) == [401] * GATEWAYS
            refused_at = [await asyncio.wait_for(poll.refused_at, 10) for poll in polls]
            assert max(poll.taken_at for poll in polls) < announced_at
            latencies.append(max(refused_at) - committed_at)
        latencies.sort()
        p99 = latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))]
        record_testsuite_property("revocation_seconds_median", latencies[len(latencies) // 2])
        record_testsuite_property("revocation_seconds_p99", p99)
        assert p99 <= 1.0

    async def test_a_rotated_secret_works_through_its_grace_and_not_without_one(
        self, all_live: Fleet, database: Database, stores: TestStores
    ) -> None:
        tenant = await new_tenant(database, stores.pepper)
        await all_live.warm(tenant.key)
        second, change = await rotate(database, stores, tenant, timedelta(hours=1))
        assert (await announce(all_live.redis, change)).is_complete
        assert await all_live.ask_all(tenant.key) == await all_live.ask_all(second) == [200] * GATEWAYS
        third, change = await rotate(database, stores, tenant, timedelta(0))
        assert (await announce(all_live.redis, change)).is_complete
        for ended in (tenant.key, second):
            assert await all_live.ask_all(ended) == [401] * GATEWAYS
        assert await all_live.ask_all(third) == [200] * GATEWAYS

    async def test_new_limits_hold_on_every_process(
        self, all_live: Fleet, database: Database, stores: TestStores
    ) -> None:
        tenant = await new_tenant(database, stores.pepper)
        await all_live.warm(tenant.key)
        for limit in (70, 50):
            change = await change_limits(database, tenant, RateLimits(requests_per_minute=limit))
            assert (await announce(all_live.redis, change)).is_complete
            for at in range(GATEWAYS):
                got = await all_live.ask(tenant.key, at)
                assert got.headers["x-ratelimit-limit-requests"] == str(limit)


async def test_a_key_and_a_grace_end_at_their_moment_on_every_process(
    all_live: Fleet, database: Database, stores: TestStores
) -> None:
    """Guarantee: exact without any message, from the record that is cached: never later, never earlier."""
    ends = datetime.now(UTC) + timedelta(seconds=1.5)
    expiring = await new_tenant(database, stores.pepper, NewKey(name="k", expires_at=ends))
    rotated = await new_tenant(database, stores.pepper)
    await all_live.warm(expiring.key)
    await all_live.warm(rotated.key)
    _, change = await rotate(database, stores, rotated, ends - datetime.now(UTC))
    assert (await announce(all_live.redis, change)).is_complete

    async def watch(key: str, at: int) -> None:
        while True:
            began = time.time()
            status = (await all_live.ask(key, at)).status
            if status == 401:
                assert time.time() >= ends.timestamp() - 0.001
                return
            # The rotation's own moment is a few milliseconds after `ends`.
            assert began < ends.timestamp() + 0.1
            await moment(0.02)

    await asyncio.wait_for(
        asyncio.gather(*(watch(key, at) for key in (expiring.key, rotated.key) for at in range(GATEWAYS))), 10
    )


class TestCutOff:
    async def test_without_pubsub_a_revoked_key_is_dead_within_five_seconds(
        self, all_live: Fleet, database: Database, stores: TestStores
    ) -> None:
        """Guarantee: whatever happens to messages, and though nobody announces: 5 s."""
        tenant = await new_tenant(database, stores.pepper)
        await all_live.warm(tenant.key)

        async def cut() -> None:
            while True:
                with contextlib.suppress(RedisError):
                    await cast("Any", all_live.redis).execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                await moment(0.005)

        cutting = asyncio.ensure_future(cut())
        try:
            await moment(0.1)
            await revoke(database, tenant)
            committed_at = time.monotonic()

            async def all_refuse() -> bool:
                return await all_live.ask_all(tenant.key) == [401] * GATEWAYS

            await eventually(all_refuse, 5)
            assert time.monotonic() - committed_at <= 5
        finally:
            cutting.cancel()
            await asyncio.gather(cutting, return_exceptions=True)

    async def test_a_stopped_process_is_named_and_refuses_as_soon_as_it_goes_on(
        self, all_live: Fleet, database: Database, stores: TestStores
    ) -> None:
        tenant = await new_tenant(database, stores.pepper)
        await all_live.warm(tenant.key)
        stopped = all_live.gateways[1].processes[0]
        stopped.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            propagation = await announce(all_live.redis, await revoke(database, tenant))
            assert time.monotonic() - began < 4
            assert (len(propagation.acknowledged), len(propagation.missing)) == (GATEWAYS - 1, 1)
            assert propagation.missing[0].startswith("gw_")
            assert not propagation.is_complete
            assert [(await all_live.ask(tenant.key, at)).status for at in (0, 2)] == [401, 401]
        finally:
            stopped.send_signal(signal.SIGCONT)
        assert (await all_live.ask(tenant.key, 1)).status == 401

    async def test_a_frozen_redis_means_that_nobody_is_told_and_the_key_is_dead_all_the_same(
        self, all_live: Fleet, database: Database, stores: TestStores
    ) -> None:
        tenant = await new_tenant(database, stores.pepper)
        await all_live.warm(tenant.key)
        all_live.server.freeze()
        try:
            change = await revoke(database, tenant)
            committed_at = time.monotonic()
            telling = asyncio.ensure_future(announce(all_live.redis, change))

            async def all_refuse() -> bool:
                return await all_live.ask_all(tenant.key) == [401] * GATEWAYS

            await eventually(all_refuse, 5)
            assert time.monotonic() - committed_at <= 5
            assert await asyncio.wait_for(telling, 10) == Propagation(acknowledged=[], missing=["redis"])
        finally:
            all_live.server.thaw()


class Heard:
    """A feed in this process, and what it was told to forget."""

    def __init__(self, feed: KeyFeed) -> None:
        self.feed = feed
        self.forgotten: list[tuple[OrganizationId, KeyId | None]] = []

    def forget(self, organization_id: OrganizationId, key_id: KeyId | None) -> None:
        self.forgotten.append((organization_id, key_id))


@pytest.fixture
async def listen(database: Database) -> AsyncIterator[Callable[..., Awaitable[Heard]]]:
    async with contextlib.AsyncExitStack() as running:

        async def make(name: str, url: str, source: Database = database) -> Heard:
            heard = Heard(KeyFeed(GatewayId(name), source, url))
            running.push_async_callback(lambda: asyncio.wait_for(heard.feed.close(), 10))
            await heard.feed.start(heard.forget)
            return heard

        yield make


class TestFeed:
    async def test_living_gateways_are_counted_and_leaving_ones_are_not(
        self, fleet: Fleet, workdir: Path, listen: Callable[..., Awaitable[Heard]]
    ) -> None:
        async with private_redis(workdir) as server:
            first = await listen("gw_a", server.url)
            second = await listen("gw_b", server.url)
            await eventually(lambda: first.feed.live_gateways == second.feed.live_gateways == 2)
            await asyncio.wait_for(second.feed.close(), 10)
            await eventually(lambda: first.feed.live_gateways == 1)
            redis = connect(server.url)
            tenant = OrganizationId("org_x")
            found = await announce(redis, KeyChange(sequence=1, organization_id=tenant, key_id=None))
            assert found == Propagation(acknowledged=["gw_a"], missing=[])
            assert (tenant, None) in first.forgotten
            await redis.aclose()
            await asyncio.wait_for(first.feed.close(), 10)

    @pytest.mark.parametrize(
        "message",
        [b"", b"{", b"\xff\xfe", b"[]", b'{"sequence":"x"}', b'{"sequence":1,"organization_id":2,"key_id":3}'],
    )
    async def test_a_message_that_nobody_understands_ends_nothing(
        self, workdir: Path, listen: Callable[..., Awaitable[Heard]], message: bytes
    ) -> None:
        """Guarantee: another release's words, or anybody's, do not make a gateway deaf."""
        async with private_redis(workdir) as server:
            heard = await listen("gw_a", server.url)
            await eventually(heard.feed.is_live)
            redis = connect(server.url)
            await cast("Any", redis).publish("aap:key-changes", message)
            change = KeyChange(sequence=1, organization_id=OrganizationId("org_x"), key_id=KeyId("key_x"))

            async def is_acknowledged() -> bool:
                return (await announce(redis, change)).acknowledged == ["gw_a"]

            await eventually(is_acknowledged)
            await eventually(heard.feed.is_live)
            await redis.aclose()
            await asyncio.wait_for(heard.feed.close(), 10)

    async def test_it_is_not_live_without_redis_and_reads_up_on_what_it_missed(
        self, workdir: Path, database: Database, tenant: Tenant, listen: Callable[..., Awaitable[Heard]]
    ) -> None:
        async with private_redis(workdir) as server:
            heard = await listen("gw_a", server.url)
            await eventually(heard.feed.is_live)
            server.freeze()
            await eventually(lambda: not heard.feed.is_live(), 1.5)
            await revoke(database, tenant)
            await eventually(lambda: (tenant.organization_id, tenant.key_id) in heard.forgotten, 4)
            server.thaw()
            await eventually(heard.feed.is_live)
            await server.kill()
            await eventually(lambda: not heard.feed.is_live(), 1.5)
            heard.forgotten.clear()
            await revoke(database, tenant)
            await server.start()
            await eventually(heard.feed.is_live)
            # Live again only after everything missed was read.
            assert (tenant.organization_id, tenant.key_id) in heard.forgotten
            await asyncio.wait_for(heard.feed.close(), 10)

    async def test_it_survives_a_postgresql_that_refuses_and_catches_up(
        self,
        workdir: Path,
        stores: TestStores,
        database: Database,
        tenant: Tenant,
        listen: Callable[..., Awaitable[Heard]],
    ) -> None:
        """Guarantee: a PostgreSQL that is starting, full or gone interrupts the reading up, and does not end it."""
        async with private_redis(workdir) as server:
            broken = Database(with_database(stores.database_url, "no_such_database"))
            heard = await listen("gw_a", server.url, broken)
            await eventually(lambda: heard.feed.live_gateways == 1)
            await moment(0.5)
            heard.feed._database = database
            await revoke(database, tenant)
            await eventually(lambda: (tenant.organization_id, tenant.key_id) in heard.forgotten, 5)
            await eventually(heard.feed.is_live)
            await asyncio.wait_for(heard.feed.close(), 10)
            await broken.close()

    async def test_nobody_can_be_told_when_redis_is_down(self) -> None:
        redis = connect("redis://127.0.0.1:1")
        change = KeyChange(sequence=1, organization_id=OrganizationId("org_x"), key_id=None)
        assert await announce(redis, change) == Propagation(acknowledged=[], missing=["redis"])
        await redis.aclose()
