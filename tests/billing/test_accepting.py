"""What an operator has decided about is no difference any more, as long as it stays what it was."""

from __future__ import annotations

from datetime import timedelta

from core.ids import OrganizationId
from metering.billing.accepting import Accepted, accept_differences
from tests.harness.billing import DOLLAR, BillingPlace


async def _accept(place: BillingPlace, org: OrganizationId) -> Accepted:
    async with place.database.transaction() as session:
        return await accept_differences(session, place.clock.now(), organization_id=org)


async def _lost(place: BillingPlace) -> OrganizationId:
    """An organization whose final invoice has three dollars less than was reported: Stripe lost them."""
    org = await place.subscriber()
    place.pass_time(days=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=2)
    await place.export()
    for usages in place.twin.state.usage._events.values():
        usages.clear()
    ((ends_at,),) = await place.rows("SELECT ends_at FROM billing_periods")
    place.pass_time(seconds=(ends_at - place.clock.now()).total_seconds())
    place.pass_time(hours=3)
    await place.hear()
    await place.reconcile(days=33)
    return org


async def test_an_alert_and_its_invoice_are_decided_about(place: BillingPlace) -> None:
    org = await _lost(place)
    before = await place.agreement()
    assert [(one.ours, one.theirs, one.state) for one in before.differences] == [(3_000_000, 0, "alert")]
    assert [(one.reported, one.invoiced) for one in before.invoices] == [(3_000_000, 0)]
    accepted = await _accept(place, org)
    assert (accepted.hours, accepted.invoices, accepted.periods, accepted.windows) == (1, 1, 0, 0)
    assert (await place.agreement()).agrees
    await place.reconcile(days=33)
    await place.pass_days(3)
    assert (await place.agreement()).agrees
    assert await place.rows("SELECT kind FROM meter_reports WHERE kind = 'moved'") == []


async def test_another_number_is_a_difference_again(place: BillingPlace) -> None:
    org = await _lost(place)
    await _accept(place, org)
    await place.rows("UPDATE meter_reports SET value = value + 5 WHERE value > 0 RETURNING 1")
    await place.reconcile(days=33)
    seen = await place.agreement()
    assert [(one.ours, one.theirs, one.state) for one in seen.differences] == [(3_000_005, 0, "alert")]
    assert [one.reported for one in seen.invoices] == [3_000_005]


async def test_uncollected_usage_is_written_off_and_what_comes_later_is_shown(place: BillingPlace) -> None:
    org = await place.subscriber()
    used_at = place.clock.now() + timedelta(minutes=2)
    await place.use(org, 2 * DOLLAR, used_at)
    place.pass_time(hours=3)
    await place.customers.cancel(org, at_once=True)
    await place.pass_days(2)
    await place.use(org, 3 * DOLLAR, used_at)
    await place.pass_days(2)
    assert [one.amount for one in (await place.agreement()).uncollected] == [3 * DOLLAR]
    assert (await _accept(place, org)).windows == 1
    await place.pass_days(3)
    assert (await place.agreement()).agrees
    await place.use(org, 1 * DOLLAR, used_at)
    await place.pass_days(2)
    assert [one.amount for one in (await place.agreement()).uncollected] == [1 * DOLLAR]


async def test_uncollected_usage_is_shown_until_it_is_decided_about(place: BillingPlace) -> None:
    org = await place.subscriber()
    place.pass_time(hours=3)
    await place.customers.cancel(org, at_once=True)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=2))
    await place.pass_days(90)  # further than windows are looked through
    assert [one.amount for one in (await place.agreement()).uncollected] == [3 * DOLLAR]
    await _accept(place, org)
    assert (await place.agreement()).agrees


async def test_a_period_without_an_invoice_is_told_of_and_decided_about(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.use(org, 2 * DOLLAR, place.clock.now() + timedelta(minutes=2))
    place.pass_time(hours=3)
    await place.export()
    # Stripe has the usage, and the subscription ended without an invoice.
    await place.rows("UPDATE billing_periods SET ends_at = :at RETURNING 1", at=place.clock.now())
    await place.rows(
        "UPDATE subscriptions SET status = 'canceled', ended_at = CAST(:at AS timestamptz) RETURNING 1",
        at=place.clock.now(),
    )
    place.pass_time(days=1)
    assert (await place.agreement()).invoices == []
    place.pass_time(days=2)
    assert [(one.invoice_id, one.reported) for one in (await place.agreement()).invoices] == [(None, 2_000_000)]
    assert (await _accept(place, org)).periods == 1
    assert (await place.agreement()).agrees


async def test_what_is_anothers_is_neither_shown_nor_accepted(place: BillingPlace) -> None:
    org, other = await _lost(place), await place.organization()
    assert (await place.agreement(other)).agrees
    accepted = await _accept(place, other)
    assert (accepted.hours, accepted.invoices, accepted.periods, accepted.windows) == (0, 0, 0, 0)
    assert not (await place.agreement(org)).agrees
