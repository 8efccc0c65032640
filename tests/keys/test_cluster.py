"""Quotas and revocation on a real Redis Cluster of three nodes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.clock import SystemClock
from core.database import Database
from core.ids import GatewayId, KeyId, OrganizationId, new_id
from core.redis import Scripts, connect, scripts_for
from keys.errors import RateLimitReached
from keys.lifecycle import revoke_key
from keys.limits import QUOTA_SCRIPTS, QuotaPlan, RateLimits, ScopedLimits
from keys.local_quota import LocalQuota
from keys.quota import Quota, Reservation
from keys.revocation import KeyChange, KeyFeed, announce
from tests.harness.eventually import eventually, moment
from tests.harness.redis_cluster import RedisCluster
from tests.harness.tenant import Tenant

LIMITS = RateLimits(requests_per_minute=5, tokens_per_day=1_000, concurrent_requests=4)


@pytest.fixture(scope="module")
async def cluster() -> AsyncIterator[RedisCluster]:
    directory = Path(tempfile.mkdtemp(prefix="aap-"))
    made = RedisCluster(directory)
    try:
        yield await made.start()
    finally:
        await made.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def scripts(cluster: RedisCluster) -> AsyncIterator[Scripts]:
    made = scripts_for(cluster.url, QUOTA_SCRIPTS, deadline_seconds=2)
    await made.start()
    yield made
    await made.close()


def quota_on(scripts: Scripts) -> Quota:
    return Quota(scripts, LocalQuota(SystemClock(), lambda: 1))


def plan_of(organization_id: OrganizationId) -> QuotaPlan:
    return QuotaPlan(
        organization_id,
        [ScopedLimits("key", "k", LIMITS), ScopedLimits("model", "m", RateLimits(tokens_per_minute=800))],
    )


def organizations(count: int) -> list[OrganizationId]:
    return [OrganizationId(new_id("org")) for _ in range(count)]


async def test_many_organizations_spread_over_the_nodes_and_each_limit_is_exact(
    cluster: RedisCluster, scripts: Scripts
) -> None:
    quota = quota_on(scripts)
    tenants = organizations(60)

    async def one(organization_id: OrganizationId) -> int:
        reservation = await quota.reserve(new_id("req"), plan_of(organization_id), 100, 100_000)
        assert (reservation.is_local, reservation.tokens) == (False, 800)
        quota.settle(reservation, 100)
        # Together: settled before, so that the tokens are back.
        again = await asyncio.gather(
            *(quota.reserve(new_id("req"), plan_of(organization_id), 10, 0) for _ in range(8)), return_exceptions=True
        )
        assert {type(found) for found in again if isinstance(found, Exception)} <= {RateLimitReached}
        return sum(not isinstance(found, BaseException) for found in again)

    assert set(await asyncio.gather(*map(one, tenants))) == {4}
    assert quota.local_decisions == 0
    sizes = []
    for node in cluster.nodes:
        client = node.client()
        sizes.append(await client.dbsize())
        await client.aclose()
    assert min(sizes) > 0


async def test_a_settled_slot_is_free_and_a_repeated_settlement_frees_nothing_more(scripts: Scripts) -> None:
    quota = quota_on(scripts)
    plan = plan_of(organizations(1)[0])
    taken = [await quota.reserve(new_id("req"), plan, 1, 0) for _ in range(4)]
    with pytest.raises(RateLimitReached) as caught:
        await quota.reserve(new_id("req"), plan, 1, 0)
    assert caught.value.dimension == "concurrent_requests"
    quota.renew(taken)
    quota.settle(taken[0], 1)
    quota.settle(taken[0], 1)
    await quota.reserve(new_id("req"), plan, 1, 0)
    with pytest.raises(RateLimitReached):
        await quota.reserve(new_id("req"), plan, 1, 0)


async def test_calls_that_are_cancelled_while_they_are_admitted_leave_nothing(scripts: Scripts) -> None:
    """Guarantee: a settlement never overtakes the reservation that it belongs to."""
    quota = quota_on(scripts)
    plan = QuotaPlan(organizations(1)[0], [ScopedLimits("key", "k", RateLimits(concurrent_requests=4))])
    for _ in range(60):
        calls = [asyncio.create_task(quota.reserve(new_id("req"), plan, 1, 0)) for _ in range(3)]
        await moment(0.0005)
        for call in calls:
            call.cancel()
        for got in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(got, Reservation):
                quota.settle(got, 1)
    # All four slots are free, so all are granted; one that was left taken would stay so for a minute.
    await asyncio.gather(*(quota.reserve(new_id("req"), plan, 1, 0) for _ in range(4)))


async def test_a_change_is_announced_heard_and_acknowledged(
    cluster: RedisCluster, database: Database, tenant: Tenant
) -> None:
    heard: list[tuple[OrganizationId, KeyId | None]] = []
    feeds = [KeyFeed(GatewayId(f"gw_{at}"), database, cluster.url) for at in range(2)]
    for feed in feeds:
        await feed.start(lambda organization_id, key_id: heard.append((organization_id, key_id)))
    redis = connect(cluster.url)
    try:
        await eventually(lambda: all(feed.is_live() for feed in feeds))
        await eventually(lambda: all(feed.live_gateways == 2 for feed in feeds))
        async with database.transaction() as session:
            sequence = await revoke_key(
                session, tenant.key_id, organization_id=tenant.organization_id, now=SystemClock().now()
            )
        change = KeyChange(sequence=sequence, organization_id=tenant.organization_id, key_id=tenant.key_id)
        propagation = await announce(redis, change)
        assert (propagation.acknowledged, propagation.missing) == (["gw_0", "gw_1"], [])
        assert heard.count((tenant.organization_id, tenant.key_id)) >= 2
    finally:
        for feed in feeds:
            await feed.close()
        await redis.aclose()


async def test_a_killed_node_means_local_limits_until_it_is_back(cluster: RedisCluster, database: Database) -> None:
    """Guarantee: without a node its organizations fall back to this process's share, soon and without hanging; and
    everything is exact again when it returns."""
    scripts = scripts_for(cluster.url, QUOTA_SCRIPTS, deadline_seconds=0.5)
    await scripts.start()
    quota = quota_on(scripts)
    feed = KeyFeed(GatewayId("gw_left"), database, cluster.url)
    await feed.start(lambda organization_id, key_id: None)
    tenants = organizations(20)
    try:
        await eventually(feed.is_live)
        await cluster.nodes[1].kill()

        async def is_noticed() -> bool:
            for organization_id in tenants:
                await quota.reserve(
                    new_id("req"),
                    QuotaPlan(organization_id, [ScopedLimits("key", "k", RateLimits(requests_per_day=10**6))]),
                    1,
                    0,
                )
            return quota.local_decisions > 0

        await eventually(is_noticed, 10)
        await eventually(lambda: not scripts.is_up)
        began = asyncio.get_running_loop().time()
        plan = plan_of(organizations(1)[0])
        found = await asyncio.gather(
            *(quota.reserve(new_id("req"), plan, 1, 0) for _ in range(8)), return_exceptions=True
        )
        assert asyncio.get_running_loop().time() - began < 2
        assert sum(not isinstance(one, BaseException) for one in found) == 4
        await cluster.nodes[1].start()
        await cluster.wait_ok()
        await eventually(lambda: scripts.is_up, 15)
        for organization_id in organizations(20):
            assert not (await quota.reserve(new_id("req"), plan_of(organization_id), 1, 0)).is_local
        await eventually(feed.is_live, 15)
    finally:
        await feed.close()
        await scripts.close()
