"""Stripe's sums against ours, and what is done about a difference."""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec
import pytest

from core.ids import OrganizationId
from metering.billing import agreement, inbox
from metering.billing.export import Exporter
from metering.billing.meters import USAGE
from metering.billing.stripe_api import StripeApi
from metering.billing.stripe_objects import MeterEvent, read_event
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import BillingPlace

_METER_EVENTS = "/v1/billing/meter_events"


async def _reported(place: BillingPlace, nano_usd: int = 5_000_000) -> OrganizationId:
    organization_id = await place.subscriber()
    await place.use(organization_id, nano_usd)
    place.pass_time(hours=2)
    await place.export()
    place.pass_time(minutes=11)
    return organization_id


async def _elsewhere(place: BillingPlace, organization_id: OrganizationId, value: int, at: datetime) -> None:
    """Somebody else tells our meter of usage."""
    event = MeterEvent(
        event_name=USAGE.event_name,
        customer_id=await place.customer_of(organization_id),
        identifier="somebody-elses",
        value=value,
        occurred_at=at,
    )
    await place.api.send_meter_event(event)


async def _checks(place: BillingPlace) -> list[tuple[object, ...]]:
    return await place.rows("SELECT ours, theirs, state FROM meter_checks ORDER BY hour")


class TestSumsThatAgree:
    async def test_leave_nothing_to_do(self, place: BillingPlace) -> None:
        await _reported(place)
        found = await place.reconcile()
        assert (found.hours, found.difference, found.repaired, found.alerts) == (1, 0, 0, 0)
        async with place.database.transaction() as session:
            assert (await agreement.reconciliation(session, place.clock.now())).agrees


class TestALostEvent:
    async def test_is_made_good_after_two_looks(self, place: BillingPlace) -> None:
        """Guarantee: what Stripe took and could not count is told again, under another identifier, once."""
        organization_id = await _reported(place)
        _forget_all(place)
        first = await place.reconciler.round()
        assert (first.waiting, first.repaired) == (1, 0)
        place.pass_time(minutes=5)
        assert (await place.reconciler.round()).repaired == 0
        place.pass_time(minutes=6)
        assert (await place.reconciler.round()).repaired == 1
        await place.export()
        assert await place.stripe_total(organization_id) == 5_000
        await place.reconcile()
        assert await _checks(place) == [(5_000, 5_000, "agrees")]

    async def test_is_an_alert_once_its_invoice_is_final(self, place: BillingPlace) -> None:
        await _reported(place)
        _forget_all(place)
        place.pass_time(days=32)
        await place.hear()
        found = await place.reconcile()
        assert (found.alerts, found.repaired) == (1, 0)
        async with place.database.transaction() as session:
            seen = await agreement.reconciliation(session, place.clock.now())
        assert not seen.agrees
        assert [(one.reported, one.invoiced) for one in seen.invoices] == [(5_000, 0)]

    async def test_that_is_lost_again_and_again_is_given_to_a_person(self, place: BillingPlace) -> None:
        await _reported(place)
        for _ in range(6):
            _forget_all(place)
            await place.reconcile()
            await place.export()
            place.pass_time(minutes=11)
        repairs = await place.rows("SELECT count(*) FROM meter_reports WHERE kind = 'repair'")
        assert repairs == [(3,)]
        assert [state for _, _, state in await _checks(place)] == ["alert"]


class TestAnEventOfSomebodyElse:
    async def test_in_an_hour_of_ours_is_taken_back(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        await place.use(organization_id, 5_000_000)
        at = place.clock.now()
        place.pass_time(hours=2)
        await place.export()
        await _elsewhere(place, organization_id, 777, at + timedelta(minutes=2))
        place.pass_time(minutes=11)
        assert (await place.reconcile()).repaired == 1
        await place.export()
        assert await place.stripe_total(organization_id) == 5_000

    async def test_where_we_told_nothing_is_an_alert(self, place: BillingPlace) -> None:
        organization_id = await _reported(place)
        await _elsewhere(place, organization_id, 777, place.clock.now())
        place.pass_time(minutes=11)
        found = await place.reconcile()
        assert (found.alerts, found.repaired) == (1, 0)
        assert await place.stripe_total(organization_id) == 5_777


class TestAReportOfUnknownOutcome:
    @pytest.mark.parametrize("kind", ["drop_after_commit", "error_before_commit"])
    async def test_is_never_sent_again_after_a_day(self, place: BillingPlace, kind: str) -> None:
        """Guarantee: Stripe may have forgotten the identifier by then, and would count it twice."""
        organization_id = await place.subscriber()
        await place.use(organization_id, 5_000_000)
        place.pass_time(hours=2)
        place.twin.faults.add(FaultPlan(kind=kind, path=_METER_EVENTS))
        await place.export()
        place.pass_time(hours=25)
        place.twin.journal.entries.clear()
        await place.export()
        assert [one for one in place.twin.journal.entries if one.path == _METER_EVENTS] == []
        assert await place.rows("SELECT state FROM meter_reports") == [("unknown",)]
        await place.reconcile()
        await place.export()
        assert await place.stripe_total(organization_id) == 5_000
        states = await place.rows("SELECT kind, state FROM meter_reports ORDER BY kind DESC")
        is_lost = kind == "error_before_commit"
        assert states == [("usage", "checked"), *([("repair", "acked")] if is_lost else [])]

    async def test_that_was_never_sent_waits_for_as_long_as_stripe_is_down(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        await place.use(organization_id, 5_000_000)
        place.pass_time(hours=2)
        nowhere = StripeApi(msgspec.structs.replace(place.settings, url="http://127.0.0.1:1"), place.clock)
        for _ in range(3):
            exported = await Exporter(place.database, nowhere, place.clock).round()
            assert exported.problem is not None
            place.pass_time(days=2)
        await nowhere.close()
        assert await place.rows("SELECT state, first_sent_at FROM meter_reports") == [("new", None)]
        await place.export()
        assert await place.stripe_total(organization_id) == 5_000


class TestAnErrorReport:
    async def test_puts_the_hours_of_its_time_in_doubt(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        await place.use(organization_id, 5_000_000)
        place.pass_time(hours=2)
        customer = place.twin.state.find("customer", await place.customer_of(organization_id))
        place.twin.state.tables["customer"].pop(customer["id"])
        await place.export()
        place.twin.state.tables["customer"][customer["id"]] = customer
        place.pass_time(minutes=11)
        thin = list(place.twin.state.tables["v2.core.event"].values())
        assert thin
        async with place.database.transaction() as session:
            await inbox.store(session, [read_event(_as_told(one)) for one in thin], source="webhook")
        await place.applier.apply_due()
        assert [state for _, _, state in await _checks(place)] == ["suspect"]
        await place.reconcile()
        await place.reconcile()
        await place.export()
        assert await place.stripe_total(organization_id) == 5_000


def _as_told(event: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in event.items() if not name.startswith("_")}


def _forget_all(place: BillingPlace) -> None:
    """Stripe took it, and does not count it."""
    place.twin.state.usage._events.clear()
