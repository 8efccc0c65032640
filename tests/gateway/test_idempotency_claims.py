"""Claims in PostgreSQL: what a call that was lost leaves behind stays one call."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text

from core.database import Database
from core.ids import GatewayId, new_id
from core.settings import IdempotencySettings
from gateway.idempotency import Asked, Idempotency
from gateway.idempotency_claims import ClaimKey, Claims, Hold
from inference.endpoints import ENDPOINTS
from inference.exchange import Exchange
from keys.authenticate import Authenticator
from keys.limits import DefaultLimits
from tests.harness.eventually import eventually
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant


def claims_of(database: Database, lease_seconds: float = 0.0) -> Claims:
    return Claims(database, GatewayId(new_id("gw")), kept_seconds=60, lease_seconds=lease_seconds)


async def taken_over(claims: Claims, key: ClaimKey) -> Hold:
    found = await claims.find(key)
    assert found is not None
    assert found.is_abandoned
    hold = await claims.take_over(key, found, new_id("req"))
    assert hold is not None
    return hold


@pytest.fixture
async def key(database: Database, stores: TestStores) -> ClaimKey:
    tenant = await new_tenant(database, stores.pepper)
    key = ClaimKey(tenant.key_id, new_id("idem"))
    assert await claims_of(database).claim(key, b"digest", "req_lost", tenant.organization_id)
    return key


async def test_who_takes_a_claim_over_and_never_calls_hands_on_the_lost_calls_id(
    database: Database, key: ClaimKey
) -> None:
    """Guarantee: the ledger has one call, however many gateways tried it in vain before one of them asked."""
    for _ in range(3):
        claims = claims_of(database)
        hold = await taken_over(claims, key)
        assert (hold.request_id, hold.is_inherited) == ("req_lost", True)
        await claims.hand_back(hold)


async def test_a_claim_that_is_renewed_meanwhile_is_not_taken_over(database: Database, key: ClaimKey) -> None:
    owner = claims_of(database)
    hold = await taken_over(owner, key)
    other = claims_of(database, lease_seconds=60)
    found = await claims_of(database).find(key)
    assert found is not None
    await owner.renew([hold])
    assert await other.take_over(key, found, new_id("req")) is None


async def test_a_claim_that_comes_while_its_process_stops_is_given_back(database: Database, stores: TestStores) -> None:
    """Guarantee: what a caller who left has still taken is free again, though its giver-back begins during the stop."""
    tenant = await new_tenant(database, stores.pepper)
    key = ClaimKey(tenant.key_id, new_id("idem"))
    settings = IdempotencySettings(retention_seconds=60, answer_bytes_max=100)
    idempotency = Idempotency(claims_of(database, lease_seconds=60), settings)
    authenticator = Authenticator(database, [stores.pepper], defaults=DefaultLimits, is_feed_live=lambda: False)
    call = Exchange(new_id("req"), ENDPOINTS[0])
    call.principal = await authenticator.authenticate(tenant.key.encode(), lambda: "192.0.2.1")
    claim = idempotency.begin(Asked(key, b"digest"))
    async with database.transaction() as session:
        await session.execute(text("LOCK TABLE idempotent_answers"))
        finding = asyncio.create_task(idempotency.find(call, claim))
        await eventually(lambda: idempotency._tasks)
        finding.cancel()
        await asyncio.gather(finding, return_exceptions=True)
        await idempotency.close(claim)
        stopping = asyncio.create_task(idempotency.stop())
        await asyncio.sleep(0)
    await stopping
    assert await claims_of(database).find(key) is None
