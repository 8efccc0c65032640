"""Random lives of a subscription among faults: what is invoiced and what credit paid is what the ledger has."""

from __future__ import annotations

import contextlib
import os
import random
from datetime import datetime, timedelta
from typing import Literal

import pytest

from core.ids import OrganizationId
from metering.billing import agreement, prepaid
from metering.billing.errors import StripeFailed
from metering.billing.prepaid import Credit
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import BillingPlace

_FAULTS: tuple[Literal["drop_after_commit", "error_before_commit", "reset"], ...] = (
    "drop_after_commit",
    "error_before_commit",
    "reset",
)


class _Life:
    """What an organization, its worker and the network do, by the dice of a seed."""

    def __init__(self, place: BillingPlace, organization_id: OrganizationId, seed: int) -> None:
        self._place = place
        self._organization_id = organization_id
        self._dice = random.Random(seed)
        self._has_credit, self._has_corrections = seed % 2 == 1, seed % 3 == 2
        self._began_at = place.clock.now()

    async def _work(self) -> None:
        place, dice = self._place, self._dice
        if dice.random() < 0.9:
            await place.hear()
        if dice.random() < 0.3:
            # As after a notice: the turn of the hour is not waited for.
            await place.rows("UPDATE meter_cursors SET next_at = 'epoch' RETURNING 1")
        if dice.random() < 0.8:
            await place.export()
        if dice.random() < 0.7:
            with contextlib.suppress(StripeFailed):
                await place.reconciler.round(is_doubt_only=dice.random() < 0.7)

    async def _act(self) -> None:
        place, dice, now = self._place, self._dice, self._place.clock.now()
        roll = dice.random()
        if roll < 0.5:
            await place.use(self._organization_id, dice.randrange(1, 5_000_000_000), now)
        elif roll < 0.7:
            late = self._before(timedelta(minutes=dice.randrange(1, 200)))
            await place.use(self._organization_id, dice.randrange(1, 5_000_000_000), late)
        elif roll < 0.75 and self._has_corrections:
            late = self._before(timedelta(hours=dice.randrange(1, 100)))
            await place.use(self._organization_id, -dice.randrange(1, 1_000_000), late)
        elif roll < 0.8 and self._has_credit:
            async with place.database.transaction() as session:
                credit = Credit(cents=dice.randrange(100, 800), source=f"{dice.random()}")
                await prepaid.add_credit(session, credit, now, organization_id=self._organization_id)
        elif roll < 0.85:
            kind, times = dice.choice(_FAULTS), dice.randrange(1, 3)
            place.twin.faults.add(FaultPlan(kind=kind, method="POST", path="/v1/billing/meter_events", times=times))

    def _before(self, past: timedelta) -> datetime:
        return max(self._began_at + timedelta(minutes=1), self._place.clock.now() - past)

    async def _period_ends_at(self) -> datetime:
        ((ends_at,),) = await self._place.rows("SELECT max(ends_at) FROM billing_periods")
        assert isinstance(ends_at, datetime)
        return ends_at

    async def live_a_period(self) -> None:
        """Days in leaps, and the hours around the period's end in minutes."""
        place, ends_at = self._place, await self._period_ends_at()
        while place.clock.now() < ends_at - timedelta(hours=3):
            left = ends_at - timedelta(hours=2) - place.clock.now()
            place.pass_time(hours=min(31, max(1, left / timedelta(hours=1))))
            await self._act()
            await self._work()
        while place.clock.now() < ends_at + timedelta(hours=4):
            place.pass_time(minutes=self._dice.choice([1, 7, 13, 22]))
            await self._act()
            await self._work()

    async def rest_a_period(self) -> None:
        """Nothing breaks, and everything comes to rest."""
        place, ends_at = self._place, await self._period_ends_at()
        while place.clock.now() < ends_at + timedelta(hours=4):
            place.pass_time(hours=25)
            for _ in range(2):
                await place.hear()
                await place.export()
                with contextlib.suppress(StripeFailed):
                    await place.reconciler.round()
                place.pass_time(minutes=11)


@pytest.mark.parametrize("seed", range(24 if os.environ.get("AAP_TEST_SCALE") == "full" else 6))
async def test_a_life_is_invoiced_to_the_micro_dollar(place: BillingPlace, seed: int) -> None:
    org = await place.subscriber()
    life = _Life(place, org, seed)
    for _ in range(3):
        await life.live_a_period()
    for _ in range(3):
        await life.rest_a_period()
    ((invoiced,),) = await place.rows("SELECT coalesce(sum(usage_micro_usd), 0)::bigint FROM invoices")
    ((drawn,),) = await place.rows("SELECT coalesce(sum(drawn), 0)::bigint FROM meter_reports")
    # An hour that Stripe lost three times over is no invoice's, and the operator is told.
    ((lost,),) = await place.rows(
        "SELECT coalesce(sum(ours - theirs), 0)::bigint FROM meter_checks WHERE state = 'alert'"
    )
    async with place.database.transaction() as session:
        found = await agreement.reconciliation(session, place.clock.now())
    total = int(str(invoiced)) + int(str(drawn)) + int(str(lost))
    assert (total, found.agrees) == (await place.ledger_total(org) // 1_000, not lost), found
