"""`metering.adjustments`: what an operator corrects is in the books like everything else, and in them for good."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import select

from core.ids import KeyId, OrganizationId, ProjectId, new_id
from core.money import NanoUsd
from core.settings import Pepper
from keys.budgets import budget_of, period_bounds
from keys.caps import state_key
from keys.dimensions import BudgetPeriod, BudgetScope
from keys.errors import TenantNotFound
from keys.tables import BudgetRow
from metering import partitions
from metering.adjustments import Booked, CallStanding, adjust, credit, standing
from metering.budgets import list_standings, set_budget
from metering.corrections import correct
from metering.entries import LOST, SETTLE, Entry, settle_arguments
from metering.errors import AdjustmentInvalid, EntryNotFound
from metering.usage import Units
from metering.verify import verify
from tests.harness.reconciled import reconciled
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant
from tests.metering.conftest import OwnBooks, request_id_at


async def entered(own: OwnBooks, at: datetime | None = None, **facts: Any) -> Entry:
    at = at or datetime.now(UTC)
    entry = own.books.entry(request_id_at(at), started_ms=int(at.timestamp() * 1000), **facts)
    await partitions.make_for(own.books.run, [entry.request_id])
    await own.books.run(SETTLE, *settle_arguments([entry]))
    return entry


async def adjusted(own: OwnBooks, request_id: str, charge: int, cost: int = 0, reason: str = "goodwill") -> Booked:
    async with own.database.transaction() as session:
        return await adjust(session, request_id, charge_nano_usd=charge, cost_nano_usd=cost, reason=reason)


async def credited(own: OwnBooks, amount: int, *, reason: str = "outage", **owner: Any) -> Booked:
    owner.setdefault("organization_id", own.books.tenant.organization_id)
    async with own.database.transaction() as session:
        return await credit(session, amount, reason=reason, **owner)


async def stands(own: OwnBooks, request_id: str) -> CallStanding:
    async with own.database.transaction() as session:
        return await standing(session, request_id)


async def add_budget(
    own: OwnBooks, scope: BudgetScope, period: BudgetPeriod = "month", *, is_hard: bool = True
) -> None:
    tenant = own.books.tenant
    ids = {"organization": tenant.organization_id, "project": tenant.project_id, "key": tenant.key_id}
    async with own.database.transaction() as session:
        await set_budget(
            session,
            (scope, ids[scope]),
            period,
            limit=NanoUsd(10**12),
            is_hard=is_hard,
            organization_id=tenant.organization_id,
        )


async def spent(own: OwnBooks) -> dict[str, int]:
    async with own.database.transaction() as session:
        found = await list_standings(session, datetime.now(UTC), organization_id=own.books.tenant.organization_id)
    return {one.budget.scope: one.spent_nano_usd for one in found}


async def drifts(own: OwnBooks) -> list[object]:
    return list((await verify(own.database, rerate=False)).drifts)


class TestAdjust:
    async def test_it_stands_beside_the_call_and_counts_when_the_call_began(self, own: OwnBooks) -> None:
        """Guarantee: windows and budgets hold it at once, the call's own entry is as it was."""
        month_ago = datetime.now(UTC) - timedelta(days=33)
        await add_budget(own, "key", "total")
        entry = await entered(own, month_ago, cost=100, charge=150)
        before = await own.books.entries()
        booked = await adjusted(own, entry.request_id, -50, 7, "wrong price, ticket 12 — agreed")
        usage, adjustment = await own.books.entries()
        assert [usage] == before
        assert adjustment == {
            **usage,
            "kind": "adjustment",
            "seq": 2,
            "charge_nano_usd": -50,
            "cost_nano_usd": 7,
            "input_tokens": 0,
            "output_tokens": 0,
            "requests": 0,
            "duration_ms": 0,
            "first_byte_ms": None,
            "outcome": "operator_adjustment",
            "corrects_kind": "usage",
            "corrects_seq": 0,
            "booked_at": adjustment["booked_at"],
            "note": "wrong price, ticket 12 — agreed",
        }
        assert usage["note"] is None
        [window] = await own.books.windows()
        assert [window[name] for name in ("requests", "cost_nano_usd", "charge_nano_usd")] == [1, 107, 100]
        assert await spent(own) == {"key": 100}
        assert await drifts(own) == []
        assert (booked.seq, booked.charge_nano_usd, booked.occurred_at) == (2, -50, usage["occurred_at"])

    async def test_several_of_one_call_add_up(self, own: OwnBooks) -> None:
        entry = await entered(own, cost=100)
        for number, charge in enumerate((5, -3, 1), 2):
            assert (await adjusted(own, entry.request_id, charge)).seq == number
        found = await stands(own, entry.request_id)
        assert (found.entries, found.cost_nano_usd, found.charge_nano_usd) == (4, 100, 103)

    async def test_at_once_each_has_a_place_of_its_own(self, own: OwnBooks) -> None:
        entry = await entered(own)
        booked = await asyncio.gather(*(adjusted(own, entry.request_id, charge) for charge in range(1, 31)))
        assert sorted(one.seq for one in booked) == list(range(2, 32))
        assert (await stands(own, entry.request_id)).charge_nano_usd == 100 + sum(range(31))
        assert await drifts(own) == []

    async def test_what_the_calls_own_gateway_comes_to_know_still_counts(self, own: OwnBooks) -> None:
        """Guarantee: later truth and goodwill are two things, whichever comes first."""
        for is_early in (True, False):
            lost = await entered(own, cost=50, charge=60, outcome=LOST)
            truth = own.books.entry(lost.request_id, cost=90, charge=95, started_ms=lost.started_ms)
            if is_early:
                await adjusted(own, lost.request_id, -10)
            assert await correct(own.books.run, [truth]) == 1
            assert await correct(own.books.run, [truth]) == 0
            if not is_early:
                await adjusted(own, lost.request_id, -10)
            found = await stands(own, lost.request_id)
            assert (found.entries, found.cost_nano_usd, found.charge_nano_usd) == (3, 90, 85)
        assert await drifts(own) == []

    async def test_a_call_that_is_not_there_is_said_so(self, own: OwnBooks) -> None:
        for request_id in (new_id("req"), "req_", "'; DROP TABLE ledger_entries; --"):
            with pytest.raises(EntryNotFound):
                await adjusted(own, request_id, 1)
            with pytest.raises(EntryNotFound):
                await stands(own, request_id)
        booked = await credited(own, 5)
        with pytest.raises(EntryNotFound):
            await adjusted(own, booked.request_id, 1)

    @pytest.mark.parametrize(
        ("charge", "cost", "reason"),
        [
            (0, 0, "why"),
            (1, 0, " "),
            (1, 0, "two\nlines"),
            (1, 0, "x" * 1_001),
            (1, 0, "a\0b"),
            (1, 0, "\udc80"),
            (10**16, 0, "why"),
            (1, -(10**16), "why"),
        ],
    )
    async def test_what_cannot_be_meant_is_refused(self, own: OwnBooks, charge: int, cost: int, reason: str) -> None:
        entry = await entered(own)
        with pytest.raises(AdjustmentInvalid):
            await adjusted(own, entry.request_id, charge, cost, reason)
        assert len(await own.books.entries()) == 1

    async def test_the_note_is_on_no_entry_of_the_same_transaction_but_its_own(self, own: OwnBooks) -> None:
        first, second = await entered(own), await entered(own)
        async with own.database.transaction() as session:
            await adjust(session, first.request_id, charge_nano_usd=1, reason="first")
            await adjust(session, second.request_id, charge_nano_usd=1, reason="second")
        await entered(own)
        notes = {(entry["request_id"], entry["seq"]): entry["note"] for entry in await own.books.entries()}
        assert notes[first.request_id, 2] == "first"
        assert notes[second.request_id, 2] == "second"
        assert sorted(filter(None, notes.values())) == ["first", "second"]

    async def test_undone_with_its_transaction(self, own: OwnBooks) -> None:
        entry = await entered(own)
        async with own.database.transaction() as session:
            await adjust(session, entry.request_id, charge_nano_usd=1, reason="why")
            await session.rollback()
        assert (await stands(own, entry.request_id)).entries == 1
        assert await drifts(own) == []


class TestCredit:
    async def test_it_is_an_entry_of_its_own_in_the_present_period(self, own: OwnBooks) -> None:
        await entered(own, cost=100)
        await add_budget(own, "organization")
        await add_budget(own, "project")
        booked = await credited(own, 30)
        entry = next(row for row in await own.books.entries() if row["kind"] == "credit")
        assert (entry["request_id"], entry["seq"], entry["charge_nano_usd"]) == (booked.request_id, 0, -30)
        assert (entry["outcome"], entry["note"], entry["cost_nano_usd"]) == ("operator_credit", "outage", 0)
        assert (entry["requests"], entry["is_unpriced"], entry["model"]) == (0, False, "credit")
        # It concerns no project of the organization.
        assert await spent(own) == {"organization": 70, "project": 100}
        assert await drifts(own) == []

    async def test_for_a_project_or_key_it_counts_in_theirs_too(self, own: OwnBooks) -> None:
        tenant = own.books.tenant
        for scope in ("organization", "project", "key"):
            await add_budget(own, scope)
        await credited(own, 5, project_id=tenant.project_id)
        await credited(own, 10, key_id=tenant.key_id)
        await credited(own, 20, key_id=tenant.key_id, project_id=tenant.project_id)
        await credited(own, 40)
        assert await spent(own) == {"organization": -75, "project": -35, "key": -30}
        assert await drifts(own) == []

    async def test_nobody_is_credited_who_is_not_there(self, own: OwnBooks, stores: TestStores) -> None:
        other = await new_tenant(own.database, Pepper(id="x", key=bytes(32)))
        for owner in (
            {"organization_id": OrganizationId("org_x")},
            {"project_id": ProjectId("proj_x")},
            {"key_id": KeyId("key_x")},
            {"project_id": other.project_id},
            {"key_id": other.key_id},
            {"key_id": own.books.tenant.key_id, "project_id": other.project_id},
        ):
            with pytest.raises(TenantNotFound):
                await credited(own, 5, **owner)
        for amount in (0, -5, 10**16):
            with pytest.raises(AdjustmentInvalid):
                await credited(own, amount)
        assert (await own.books.run("SELECT count(*) FROM ledger_entries"))[0][0] == 0

    async def test_an_installation_that_was_away_for_long_has_a_month_for_it(self, own: OwnBooks) -> None:
        for name in await partitions.partitions(own.books.run):
            await own.books.run(f"DROP TABLE {name}")
        await credited(own, 5)
        assert await drifts(own) == []


class TestHardBudgets:
    async def state(self, own: OwnBooks, redis: Redis) -> dict[bytes, bytes]:
        return await redis.hgetall(await self.key(own))

    async def key(self, own: OwnBooks) -> bytes:
        async with own.database.transaction() as session:
            budget = budget_of((await session.scalars(select(BudgetRow))).one())
        return state_key(budget, period_bounds(budget.period, datetime.now(UTC))[0])

    async def test_in_redis_they_follow(self, own: OwnBooks, redis: Redis) -> None:
        """Guarantee: up and down, past a call that runs, and no further than what was corrected."""
        await add_budget(own, "organization")
        entry = await entered(own, cost=100)
        await redis.hset(await self.key(own), mapping={"s": 100, "r": 9, new_id("req"): 9})
        held = {name: value for name, value in (await self.state(own, redis)).items() if len(name) > 1}
        for change, expected in ((-40, 60), (90, 150), (-150, 0)):
            await adjusted(own, entry.request_id, change)
            await reconciled(own.database, redis)
            assert await self.state(own, redis) == {b"s": b"%d" % expected, b"r": b"9", **held}
        await credited(own, 25)
        await reconciled(own.database, redis)
        assert (await self.state(own, redis))[b"s"] == b"-25"

    async def test_a_call_that_redis_still_holds_is_charged_with_its_correction_once(
        self, own: OwnBooks, redis: Redis
    ) -> None:
        await add_budget(own, "organization")
        entry = await entered(own, cost=100, units=Units(output_tokens=1))
        await redis.hset(await self.key(own), mapping={"s": 0, "r": 500, entry.request_id: 500})
        await adjusted(own, entry.request_id, -30)
        for _ in range(2):
            await reconciled(own.database, redis)
            assert await self.state(own, redis) == {b"s": b"70", b"r": b"0"}
