"""Periods that overlap or are cut short, trials, and second subscriptions: usage is billed once, or told of."""

from __future__ import annotations

import asyncio
import tomllib
from datetime import timedelta

import pytest

from metering.billing import agreement, prepaid
from metering.billing.errors import BillingMisconfigured
from metering.billing.export import Exported
from metering.billing.outbox import bring_forward, claim
from metering.billing.plans import EXAMPLE, build_plans
from metering.billing.prepaid import Credit
from tests.harness.billing import DOLLAR, PAGES, BillingPlace

_TRY = EXAMPLE + '\n[plans.try]\ntitle = "Try"\nprice_usd_per_month = 20\nbills_usage = true\ntrial_days = 7\n'
_FLAT = EXAMPLE + '\n[plans.flat]\ntitle = "Flat"\nprice_usd_per_month = 200\n'
"""Dearer than `pro`, so that a change to it is billed at once; usage is included."""


async def _billed(place: BillingPlace) -> int:
    rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
    return sum(int(row[0]) for row in rows)


async def test_a_second_subscriptions_period_keeps_no_usage_from_the_first_ones_next_invoice(
    place: BillingPlace,
) -> None:
    org = await place.subscriber()
    await place.pass_days(20)
    await place.second_subscription(org)
    await place.hear()
    await place.pass_days(16)  # the first has renewed, and the second's period goes on
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await place.pass_days(65)
    assert await _billed(place) == 3_000_000


async def test_usage_is_billed_after_the_first_of_two_subscriptions_is_cancelled(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(2)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    await place.second_subscription(org)
    await place.hear()
    await place.pass_days(1)
    await place.api.cancel_subscription(str(first))  # the operator takes the older one back
    await place.hear()
    await place.pass_days(3)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await place.pass_days(35)
    assert await _billed(place) == 3_000_000


async def test_the_second_of_two_bills_usage_where_the_first_is_not_paid(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(2)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    place.twin.state.tables["subscription"][first]["status"] = "unpaid"
    await place.applier.look_at_customers()
    second = await place.second_subscription(org)
    await place.hear()
    items = place.twin.state.tables["subscription"][second]["items"]["data"]
    assert any(one["price"]["recurring"]["usage_type"] == "metered" for one in items)


async def test_trial_usage_that_is_reported_late_is_free(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_TRY))
    await place.synchronise()
    org = await place.subscriber("try")
    in_trial = place.clock.now() + timedelta(days=2)
    await place.pass_days(12)  # final by now
    rows = await place.rows("SELECT starts_at, ends_at, is_trial, is_closed FROM billing_periods ORDER BY 1")
    await place.use(org, 7 * DOLLAR, in_trial)  # settled late, or a worker that did not run
    await place.pass_days(45)
    assert place.invoiced_usage() == 0, rows


async def test_a_worker_that_did_not_run_makes_no_trial_paid(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_TRY))
    await place.synchronise()
    org = await place.subscriber("try")
    await place.use(org, 7 * DOLLAR, place.clock.now() + timedelta(days=2))
    place.pass_time(days=36)
    await place.pass_days(65)
    assert place.invoiced_usage() == 0


async def test_credit_pays_after_a_trial_that_was_ended_early(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_TRY))
    await place.synchronise()
    org = await place.subscriber("try")
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=1_000, source="a"), place.clock.now(), organization_id=org)
    place.pass_time(days=1)
    await place.export()
    ((subscription_id,),) = await place.rows("SELECT id FROM subscriptions")
    await place.api.update_subscription(subscription_id, {"trial_end": "now"})
    await place.hear()
    place.pass_time(hours=1)
    await place.use(org, 4 * DOLLAR)
    place.pass_time(hours=2)
    await place.export()
    rows = await place.rows("SELECT value, drawn FROM meter_reports")
    assert rows == [(0, 4_000_000)]


async def test_a_trial_that_was_paused_stays_free(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_TRY))
    await place.synchronise()
    org = await place.subscriber("try")
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=1_000, source="a"), place.clock.now(), organization_id=org)
    ((subscription_id,),) = await place.rows("SELECT id FROM subscriptions")
    subscription = place.twin.state.tables["subscription"][subscription_id]
    subscription["trial_settings"]["end_behavior"]["missing_payment_method"] = "pause"
    subscription["default_payment_method"] = None
    customer = place.twin.state.find("customer", await place.customer_of(org))
    customer["invoice_settings"]["default_payment_method"] = None
    place.pass_time(days=6, hours=23)
    await place.hear()
    await place.export()
    await place.use(org, 4 * DOLLAR, place.clock.now() + timedelta(minutes=10))
    place.pass_time(hours=3)
    await place.hear()
    assert await place.rows("SELECT status FROM subscriptions") == [("paused",)]
    await place.export()
    async with place.database.transaction() as session:
        left = await prepaid.left(session, place.clock.now(), organization_id=org)
    assert left == 10 * DOLLAR


async def test_a_subscription_that_ended_as_it_began_makes_no_loop(place: BillingPlace) -> None:
    org = await place.organization()
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    (subscription_id,) = place.twin.state.tables["subscription"]
    await place.api.cancel_subscription(subscription_id)  # in the same second
    await place.hear()
    assert await place.rows("SELECT 1 FROM meter_cursors")
    async with asyncio.timeout(5):
        await place.export()


async def test_late_usage_of_before_a_change_to_a_plan_that_includes_it_is_told_of(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("pro")
    await place.use(org, 2 * DOLLAR, place.clock.now() + timedelta(minutes=5))
    late = place.clock.now() + timedelta(hours=3)
    place.pass_time(days=5)
    await place.hear()
    await place.export()
    await place.customers.change_plan(org, "flat")
    await place.hear()
    await place.pass_days(28)  # the invoice of the period is final
    await place.use(org, 7 * DOLLAR, late)  # corrected, or settled late
    await place.pass_days(5)
    await place.pass_days(35)
    async with place.database.transaction() as session:
        found = await agreement.reconciliation(session, place.clock.now())
    assert (place.invoiced_usage(), found.agrees) == (2_000_000, False)
    assert [one.amount for one in found.uncollected] == [7 * DOLLAR]


async def test_usage_in_the_last_minutes_before_a_change_to_included_is_told_of(place: BillingPlace) -> None:
    """A call runs while the plan changes: it began before, and is settled after."""
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("pro")
    place.pass_time(days=5)
    await place.hear()
    await place.export()
    began = place.clock.now() - timedelta(minutes=2)
    await place.customers.change_plan(org, "flat")
    await place.hear()
    place.pass_time(minutes=3)
    await place.use(org, 7 * DOLLAR, began)
    await place.pass_days(65)
    async with place.database.transaction() as session:
        found = await agreement.reconciliation(session, place.clock.now())
    assert (place.invoiced_usage(), found.agrees) == (0, False)
    assert [one.amount for one in found.uncollected] == [7 * DOLLAR]


async def test_everything_is_billed_before_usage_is_included_although_a_worker_was_at_it(place: BillingPlace) -> None:
    """A worker has the lease, as it has for 64 cursors at a time; or it died with it a minute ago."""
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("pro")
    place.pass_time(days=5)
    await place.hear()
    await place.export()
    await place.use(org, 7 * DOLLAR)
    place.pass_time(hours=2)
    worker = place.exporter
    async with place.database.transaction() as session:
        claimed = await claim(session, worker._worker, place.clock.now(), limit=64)
    assert claimed
    change = asyncio.create_task(place.customers.change_plan(org, "flat"))
    batches = await worker._prepared(claimed)
    await worker._recorded(batches, await worker._sent(batches), Exported())
    await change
    await place.hear()
    await place.pass_days(65)
    async with place.database.transaction() as session:
        found = await agreement.reconciliation(session, place.clock.now())
    assert (place.invoiced_usage(), found.agrees) == (7_000_000, True)


async def test_reports_that_are_parked_keep_a_subscription_from_ending_unbilled(place: BillingPlace) -> None:
    org = await place.subscriber("pro")
    await place.use(org, 7 * DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    await place.rows("UPDATE meter_cursors SET parked_for = 'x' RETURNING 1")
    with pytest.raises(BillingMisconfigured):
        await place.customers.cancel(org, at_once=True)
    assert not await place.rows("SELECT 1 FROM subscriptions WHERE ended_at IS NOT NULL")


async def test_a_trial_ended_early_overlaps_nothing(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_TRY))
    await place.synchronise()
    await place.subscriber("try")
    place.pass_time(days=1)
    ((subscription_id,),) = await place.rows("SELECT id FROM subscriptions")
    await place.api.update_subscription(subscription_id, {"trial_end": "now"})
    await place.hear()
    rows = await place.rows("SELECT starts_at, ends_at FROM billing_periods ORDER BY starts_at")
    assert all(one[1] <= other[0] for one, other in zip(rows, rows[1:], strict=False)), rows


@pytest.mark.parametrize("credit_cents", [0, 100])
async def test_usage_after_a_renewal_that_was_not_heard_of_is_billed(place: BillingPlace, credit_cents: int) -> None:
    """Stripe cannot be reached while the period ends: its last hour is planned, the rest of it waits."""
    org = await place.subscriber()
    if credit_cents:
        async with place.database.transaction() as session:
            credit = Credit(cents=credit_cents, source="a")
            await prepaid.add_credit(session, credit, place.clock.now(), organization_id=org)
    ((ends_at,),) = await place.rows("SELECT ends_at FROM billing_periods")
    place.pass_time(seconds=(ends_at - place.clock.now()).total_seconds())
    await place.use(org, 2 * DOLLAR, ends_at - timedelta(minutes=5))
    await place.use(org, 3 * DOLLAR, ends_at + timedelta(minutes=5))
    for hours in (1, 2, 30):
        place.pass_time(hours=hours)
        async with place.database.transaction() as session:
            await bring_forward(session, place.clock.now(), is_flush=True)
        await place.export()
    async with place.database.transaction() as session:
        assert (await agreement.reconciliation(session, place.clock.now())).is_stuck
    await place.pass_days(33)
    drawn = credit_cents * 10_000
    # The invoice of the ended period was final before we knew of it, so that the next one has all.
    assert (place.invoiced_usage(), await _billed(place)) == (5_000_000 - drawn, 5_000_000 - drawn)
    async with place.database.transaction() as session:
        assert await prepaid.left(session, place.clock.now(), organization_id=org) == 0
