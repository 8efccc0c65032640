"""Usage that goes from one subscription to another, and items that are put on and taken off elsewhere."""

from __future__ import annotations

import asyncio
import tomllib
from datetime import timedelta

import pytest
from sqlalchemy import text

from metering.billing.errors import StripeFailed
from metering.billing.plans import EXAMPLE, build_plans
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import DOLLAR, PAGES, BillingPlace

_FLAT = EXAMPLE + '\n[plans.flat]\ntitle = "Flat"\nprice_usd_per_month = 50\n'


async def test_usage_of_a_newer_one_is_billed_although_an_older_one_gets_an_item_later(place: BillingPlace) -> None:
    """A (older) includes usage, B bills it; after ten days the operator puts the usage price on A too."""
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("flat")
    first = await place.subscription_of(org)
    source = place.twin.state.tables["subscription"][first]
    await place.pass_days(2)
    prices = place.twin.state.tables["price"].values()
    (usage,) = [p["id"] for p in prices if p["recurring"]["usage_type"] == "metered"]
    plan = source["items"]["data"][0]["price"]["id"]
    await place.second_subscription(org, [plan, usage])
    await place.hear()
    await place.pass_days(1)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await place.pass_days(9)
    await place.api.update_subscription(first, {"items": [{"price": usage}]})
    await place.hear()
    await place.pass_days(70)
    assert place.invoiced_usage() == 3_000_000


async def test_an_invoice_of_two_parts_does_not_bill_again_what_another_billed_between(place: BillingPlace) -> None:
    """A is past due: B bills for some days, is cancelled with a last invoice; A bills again, in the same period."""
    org = await place.subscriber()
    await place.pass_days(2)
    first = await place.subscription_of(org)
    second = await place.second_subscription(org)
    await place.hear()
    await place.pass_days(1)
    place.twin.state.tables["subscription"][first]["status"] = "past_due"
    await place.applier.look_at_customers()
    await place.pass_days(1)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))  # B's
    await place.pass_days(1)
    place.twin.state.tables["subscription"][first]["status"] = "active"
    await place.applier.look_at_customers()
    await place.pass_days(1)
    await place.api.cancel_subscription(second)
    await place.hear()
    await place.pass_days(75)
    found = await place.agreement()
    assert (place.invoiced_usage(), found.agrees) == (3_000_000, True)


async def test_usage_between_the_end_of_the_first_and_when_it_is_heard_of(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(2)
    first = await place.subscription_of(org)
    await place.second_subscription(org)
    await place.hear()
    await place.pass_days(2)
    await place.api.cancel_subscription(first)
    place.pass_time(hours=2)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=2)
    await place.hear()
    await place.pass_days(75)
    assert place.invoiced_usage() == 3_000_000


async def test_late_usage_after_a_lost_answer_settles(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(20)
    second = await place.second_subscription(org)
    late = place.clock.now() + timedelta(hours=1, minutes=40)
    place.pass_time(hours=3)
    place.twin.faults.add(FaultPlan(kind="drop_after_commit", method="POST", path=f"/v1/subscriptions/{second}"))
    await place.hear()
    await place.pass_days(12)  # the first one's invoice is final
    await place.use(org, 3 * DOLLAR, late)
    await place.pass_days(1)
    for _ in range(6):
        place.pass_time(minutes=11)
        await place.export()
        await place.reconciler.round(is_doubt_only=True)
    reports = await place.rows("SELECT count(*) FROM meter_reports")
    await place.pass_days(35)
    assert place.invoiced_usage() == 3_000_000
    assert reports == [(1,)]


async def test_putting_an_item_on_waits_for_nobody_who_waits_for_it(place: BillingPlace) -> None:
    """The event of the change is applied by another worker at the same moment."""
    org = await place.subscriber()
    await place.pass_days(1)
    first = await place.subscription_of(org)
    second = await place.second_subscription(org)
    await place.hear()
    await place.pass_days(1)
    await place.api.cancel_subscription(first)
    hold = place.twin.faults.add(FaultPlan(kind="hold", method="POST", path=f"/v1/subscriptions/{second}"))
    one = asyncio.create_task(place.applier.look_at_customers(org))
    await hold.entered.wait()
    async with place.database.transaction() as session:
        # As `keep_subscription` does it.
        await session.execute(text("SELECT 1 FROM billing_customers WHERE organization_id = :o FOR UPDATE"), {"o": org})
        hold.release()
        await place.held_up()
        await session.execute(text("SELECT 1 FROM subscriptions WHERE id = :s FOR UPDATE"), {"s": second})
    await one


async def test_a_negotiated_price_that_was_changed_once_comes_back(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(2)
    first = await place.subscription_of(org)
    source = place.twin.state.tables["subscription"][first]
    old = next(one["price"] for one in source["items"]["data"] if one["price"]["recurring"]["usage_type"] == "metered")
    plan = next(one["price"] for one in source["items"]["data"] if one["price"]["recurring"]["usage_type"] != "metered")

    async def price_of(amount: str) -> str:
        return (
            await place.api._client.v1.prices.create_async(
                {
                    "currency": "usd",
                    "product": old["product"],
                    "unit_amount_decimal": amount,
                    "recurring": {"interval": "month", "usage_type": "metered", "meter": old["recurring"]["meter"]},
                }
            )
        ).id

    one, other = await price_of("0.00008"), await price_of("0.00005")
    # The first one is past due; the agreement bills.
    place.twin.state.tables["subscription"][first]["status"] = "past_due"
    second = await place.second_subscription(org, [plan["id"], one])
    await place.hear()
    await place.applier.look_at_customers()
    await place.pass_days(1)
    (item,) = [i for i in place.twin.state.tables["subscription"][second]["items"]["data"] if i["price"]["id"] == one]
    await place.api.update_subscription(second, {"items": [{"id": item["id"], "price": other}]})
    await place.hear()
    await place.pass_days(1)
    assert place.usage_prices(second) == [other]
    # It is not paid for a while: the first one, paid again, bills meanwhile; then that one ends.
    place.twin.state.tables["subscription"][first]["status"] = "active"
    place.twin.state.tables["subscription"][second]["status"] = "past_due"
    await place.applier.look_at_customers()
    assert place.usage_prices(second) == []
    place.twin.state.tables["subscription"][second]["status"] = "active"
    await place.api.cancel_subscription(first)
    await place.hear()
    await place.applier.look_at_customers()
    assert place.usage_prices(second) == [other]


async def test_the_deleted_draft_of_a_period_is_told_of(place: BillingPlace) -> None:
    org = await place.subscriber()
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=2)
    await place.export()
    place.pass_time(days=31, minutes=-170)
    await place.hear()
    ((draft,),) = await place.rows("SELECT id FROM invoices WHERE status = 'draft'")
    place.twin.state.tables["invoice"].pop(draft)
    await place.applier.look_at_customers(with_invoices=True)
    place.clock.advance(timedelta(days=9))
    await place.rows("UPDATE subscriptions SET period_ends_at = period_ends_at + interval '1 month' RETURNING 1")
    assert [one.reported for one in (await place.agreement()).invoices] == [3_000_000]


async def test_one_subscription_of_two_usage_items_is_told_of(place: BillingPlace) -> None:
    """The operator gives a new price and forgets to take the old one off: Stripe bills both."""
    org = await place.subscriber()
    await place.pass_days(1)
    first = await place.subscription_of(org)
    source = place.twin.state.tables["subscription"][first]
    old = next(one["price"] for one in source["items"]["data"] if one["price"]["recurring"]["usage_type"] == "metered")
    new = await place.api._client.v1.prices.create_async(
        {
            "currency": "usd",
            "product": old["product"],
            "unit_amount_decimal": "0.00008",
            "recurring": {"interval": "month", "usage_type": "metered", "meter": old["recurring"]["meter"]},
        }
    )
    await place.api.update_subscription(first, {"items": [{"price": new.id}]})
    await place.hear()
    await place.pass_days(1)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await place.pass_days(40)
    assert [one.reason for one in (await place.agreement()).usage_items] == ["two items bill usage"]


async def test_a_subscription_that_stripe_cannot_read_keeps_no_grace_from_ending(place: BillingPlace) -> None:
    one = await place.subscriber()
    other = await place.subscriber()
    ((one_id,),) = await place.rows("SELECT id FROM subscriptions WHERE organization_id = :o", o=one)
    ((other_id,),) = await place.rows("SELECT id FROM subscriptions WHERE organization_id = :o", o=other)
    place.pass_time(days=25)
    place.twin.state.tables["subscription"][other_id]["status"] = "past_due"
    await place.applier.look_at_customers()
    place.twin.faults.add(
        FaultPlan(kind="error_before_commit", method="GET", path=f"/v1/subscriptions/{one_id}", times=99)
    )
    place.pass_time(days=8)
    place.twin.state.tables["subscription"][other_id]["status"] = "past_due"  # the renewal was not paid either
    await place.rows("UPDATE subscriptions SET read_at = read_at - interval '1 hour' RETURNING 1")
    with pytest.raises(StripeFailed):
        await place.applier.look_at_overdue()
    assert await place.rows("SELECT status FROM organizations WHERE id = :o", o=other) == [("suspended",)]


async def test_credit_that_is_bought_later_pays_no_late_usage_that_was_told_of(place: BillingPlace) -> None:
    """What is uncollected waits for the operator; a plan that includes usage is renewed meanwhile."""
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.organization()
    await place.add_credit(org, 500, "a")
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    place.pass_time(minutes=5)
    late = place.clock.now()
    place.pass_time(minutes=5)
    await place.customers.cancel(org, at_once=True)
    for _ in range(3):
        place.pass_time(hours=1)
        await place.hear()
        await place.export()
    checkout = await place.customers.subscribe(org, "flat", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    await place.use(org, 300 * DOLLAR, late)
    place.pass_time(hours=2)
    await place.export()
    before = await place.rows("SELECT amount FROM uncollected_usage")
    await place.add_credit(org, 2_000, "b")
    place.pass_time(hours=2)
    await place.export()
    assert await place.credit_left(org) == 20 * DOLLAR
    ((ends,),) = await place.rows("SELECT period_ends_at FROM subscriptions WHERE ended_at IS NULL")
    place.clock.advance(ends - place.clock.now() + timedelta(minutes=5))  # renewed, and not heard of yet
    await place.rows("UPDATE meter_cursors SET next_at = 'epoch' RETURNING 1")
    await place.export()
    between = await place.rows("SELECT amount FROM uncollected_usage")
    place.twin.tick()
    await place.applier.look_at_overdue()
    await place.hear()
    place.pass_time(hours=3)
    await place.rows("UPDATE meter_cursors SET scanned_at = NULL RETURNING 1")
    await place.export()
    assert await place.credit_left(org) == 20 * DOLLAR
    assert between == before


async def test_an_item_taken_off_before_its_period_was_heard_of_stops_no_invoice(place: BillingPlace) -> None:
    """The worker is down from before a renewal until three days after; meanwhile the operator takes the item off."""
    org = await place.subscriber()
    await place.pass_days(1)
    ((first, item),) = await place.rows("SELECT id, usage_item_id FROM subscriptions")
    place.pass_time(days=31)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(days=3)
    await place.api.update_subscription(
        first, {"items": [{"id": str(item), "deleted": True}], "proration_behavior": "create_prorations"}
    )
    place.pass_time(days=1)
    await place.hear()
    await place.pass_days(35)
    await place.applier.look_at_customers(with_invoices=True)
    assert not await place.rows("SELECT 1 FROM stripe_events WHERE state NOT IN ('applied', 'ignored')")
    assert not (await place.agreement()).agrees


async def test_usage_of_a_paid_one_is_billed_from_its_beginning_although_an_older_one_is_tried(
    place: BillingPlace,
) -> None:
    plans = EXAMPLE + '\n[plans.try]\ntitle = "Try"\nprice_usd_per_month = 20\nbills_usage = true\ntrial_days = 7\n'
    place.plans = build_plans(tomllib.loads(plans))
    await place.synchronise()
    org = await place.subscriber("try")
    await place.pass_days(2)
    await place.second_subscription(org)  # active, paid
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=2)
    await place.export()
    await place.hear()
    await place.pass_days(75)
    assert place.invoiced_usage() == 3_000_000


async def test_a_plan_that_bills_usage_and_is_chosen_in_the_portal_bills_it(place: BillingPlace) -> None:
    """The portal exchanges the plan's price, and puts no item on for usage."""
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("flat")
    await place.pass_days(1)
    ((first, item),) = await place.rows("SELECT id, plan_item_id FROM subscriptions")
    (pro,) = [p["id"] for p in place.twin.state.tables["price"].values() if "pro" in (p["lookup_key"] or "")]
    await place.api.update_subscription(first, {"items": [{"id": str(item), "price": pro}]})
    await place.hear()
    await place.pass_days(1)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await place.pass_days(40)
    assert place.invoiced_usage() == 3_000_000


async def test_a_page_that_was_opened_while_another_could_not_be_closed_is_remembered(place: BillingPlace) -> None:
    org = await place.organization()
    await place.customers.subscribe(org, "pro", PAGES)
    hold = place.twin.faults.add(FaultPlan(kind="hold", method="POST", path="/v1/checkout/sessions/*/expire", nth=3))
    both = asyncio.gather(
        place.customers.subscribe(org, "pro", PAGES),
        place.customers.subscribe(org, "pro", PAGES),
        return_exceptions=True,
    )
    await hold.entered.wait()
    await place.customers.subscribe(org, "pro", PAGES)
    await both
    place.twin.faults.clear()
    await place.customers.subscribe(org, "pro", PAGES)
    pages = [one["id"] for one in place.twin.state.tables["checkout.session"].values() if one["status"] == "open"]
    assert len(pages) == 1
