"""A plan's allowance while Redis is gone: calls go on, are counted, and the month is not given twice afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis.asyncio import Redis

from core.clock import SystemClock
from core.database import Database
from core.settings import LedgerSettings
from keys.allowances import month_of
from keys.plans import PlanLimits
from keys.tenants import set_plan
from metering.allowances import list_allowances
from metering.billing.plans import Plans
from metering.worker import MeteringStores, MeteringWorker
from tests.faults.conftest import PATH
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway, config_for
from tests.harness.private_stores import PrivateRedis, private_redis
from tests.harness.provider import FakeProvider
from tests.harness.raw import RawAnswer, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

INCLUDED = 6


@pytest.fixture
async def fragile(workdir: Path) -> AsyncIterator[PrivateRedis]:
    async with private_redis(workdir) as redis:
        yield redis


@pytest.fixture
async def gateway(
    fragile: PrivateRedis, stores: TestStores, provider: FakeProvider, workdir: Path
) -> AsyncIterator[Gateway]:
    """A gateway on a Redis of its own, whose plan includes six chat requests."""
    plans = f"[plans.six.limits]\nchat_requests_per_month = {INCLUDED}\n"
    own = stores._replace(redis_url=fragile.url)
    async with Gateway(own, workdir, config_for(provider.base_url, more=plans)) as made:
        yield made


@pytest.fixture
async def tenant(database: Database, stores: TestStores) -> Tenant:
    made = await new_tenant(database, stores.pepper)
    async with database.transaction() as session:
        await set_plan(session, "six", organization_id=made.organization_id)
    return made


async def ask(gateway: Gateway, tenant: Tenant) -> RawAnswer:
    return await call(gateway.port, post(PATH, tenant.key, chat()))


async def is_used(database: Database, tenant: Tenant, count: int) -> bool:
    """Whether so many calls are in the ledger."""
    async with database.transaction() as session:
        now, own = datetime.now(UTC), tenant.organization_id
        return (await list_allowances(session, PlanLimits(), now, organization_id=own))[0].used == count


async def is_redis_back(gateway: Gateway) -> bool:
    got = await call(gateway.port, b"GET /metrics HTTP/1.1\r\nhost: t\r\n\r\n")
    return b"\naap_redis_up 1" in got.body


class TestRedisGone:
    @pytest.mark.parametrize("is_forgetful", [True, False])
    async def test_calls_go_on_and_count_when_it_is_back(
        self,
        gateway: Gateway,
        fragile: PrivateRedis,
        database: Database,
        stores: TestStores,
        tenant: Tenant,
        is_forgetful: bool,
    ) -> None:
        """Guarantee: whether Redis comes back with nothing or with what it had, what was used meanwhile counts."""
        assert [(await ask(gateway, tenant)).status for _ in range(2)] == [200, 200]
        await eventually(lambda: is_used(database, tenant, 2))
        await fragile.kill()
        for _ in range(INCLUDED):
            got = await ask(gateway, tenant)
            assert (got.status, got.headers.get("x-quota-mode")) == (200, "local")
        await eventually(lambda: is_used(database, tenant, 2 + INCLUDED))
        await fragile.start()
        redis = Redis.from_url(fragile.url)
        if is_forgetful:
            await redis.flushall()
        else:
            name = f"q:{{{tenant.organization_id}}}:$:allow_chat_requests:{int(month_of(datetime.now(UTC))[0].timestamp())}"
            await redis.hset(name, mapping={"s": 2, "r": 0})  # type: ignore[misc]
            settings = LedgerSettings(lease_seconds=10, retention_months=0, archive_dir=Path("/nowhere"))
            worker = MeteringWorker(
                MeteringStores(stores.database_url, database, redis), settings, SystemClock(), plans=Plans
            )
            await worker.reconcile_allowances()
        await redis.aclose()
        await eventually(lambda: is_redis_back(gateway))
        got = await ask(gateway, tenant)
        assert (got.status, got.error()["code"]) == (429, "plan_limit_reached")
