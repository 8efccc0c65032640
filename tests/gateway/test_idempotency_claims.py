"""Claims in PostgreSQL: what a call that was lost leaves behind stays one call."""

from __future__ import annotations

import pytest

from core.database import Database
from core.ids import GatewayId, new_id
from gateway.idempotency_claims import ClaimKey, Claims, Hold
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
