"""Two subscriptions of one organization, which only the dashboard can make: usage is billed once."""

from __future__ import annotations

import asyncio
import contextlib
import tomllib
from datetime import timedelta

import pytest

from metering.billing.errors import StripeFailed
from metering.billing.plans import EXAMPLE, build_plans
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import DOLLAR, BillingPlace

_FLAT = EXAMPLE + '\n[plans.flat]\ntitle = "Flat"\nprice_usd_per_month = 50\n'
_TRY = EXAMPLE + '\n[plans.try]\ntitle = "Try"\nprice_usd_per_month = 20\nbills_usage = true\ntrial_days = 7\n'


async def test_usage_while_the_first_is_past_due_is_billed_when_it_is_paid_again(place: BillingPlace) -> None:
    """A pays late: B bills meanwhile; then A again."""
    org = await place.subscriber()
    await place.pass_days(2)
    first = await place.subscription_of(org)
    await place.second_subscription(org)
    await place.hear()
    await place.pass_days(1)
    place.twin.state.tables["subscription"][first]["status"] = "past_due"
    await place.applier.look_at_customers()
    await place.pass_days(1)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await place.pass_days(1)
    place.twin.state.tables["subscription"][first]["status"] = "active"
    await place.applier.look_at_customers()
    await place.pass_days(75)
    found = await place.agreement()
    assert place.invoiced_usage() == 3_000_000
    assert found.agrees


@pytest.mark.parametrize("is_read_first", [True, False], ids=["read", "by events"])
async def test_a_first_that_ended_unheard_leaves_the_seconds_usage_billed(
    place: BillingPlace, is_read_first: bool
) -> None:
    """In the dashboard the old one is cancelled and another made; the worker hears of it two hours later."""
    org = await place.subscriber()
    await place.pass_days(2)
    first = await place.subscription_of(org)
    await place.api.cancel_subscription(first)
    place.pass_time(seconds=5)
    await place.second_subscription(org)
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=1)
    if is_read_first:
        await place.applier.look_at_customers()
    await place.hear()
    await place.pass_days(75)
    assert place.invoiced_usage() == 3_000_000
    assert (await place.agreement()).agrees


async def test_a_refusal_to_take_the_item_off_holds_up_no_invoice(place: BillingPlace) -> None:
    """The second subscription has nothing but usage: Stripe keeps its last item."""
    org = await place.subscriber()
    first = await place.subscription_of(org)
    await place.pass_days(2)
    await place.second_subscription(org, place.usage_prices(first))
    await place.hear()
    await place.pass_days(33)
    assert await place.rows("SELECT 1 FROM invoices WHERE status = 'paid' AND usage_micro_usd IS NOT NULL")


async def test_an_agreement_without_a_plan_of_ours_has_its_item_back(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(2)
    first = await place.subscription_of(org)
    price = await place.api._client.v1.prices.create_async(
        {
            "currency": "usd",
            "product_data": {"name": "Agreement"},
            "unit_amount": 50_000,
            "recurring": {"interval": "month"},
        }
    )
    await place.second_subscription(org, [price.id, *place.usage_prices(first)])
    await place.hear()
    await place.pass_days(1)
    await place.api.cancel_subscription(first)
    await place.hear()
    await place.pass_days(2)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await place.pass_days(40)
    assert place.invoiced_usage() == 3_000_000
    assert (await place.agreement()).agrees


async def test_a_negotiated_price_of_usage_comes_back(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(2)
    first = await place.subscription_of(org)
    source = place.twin.state.tables["subscription"][first]
    old = next(one["price"] for one in source["items"]["data"] if one["price"]["recurring"]["usage_type"] == "metered")
    plan = next(one["price"] for one in source["items"]["data"] if one["price"]["recurring"]["usage_type"] != "metered")
    price = await place.api._client.v1.prices.create_async(
        {
            "currency": "usd",
            "product": old["product"],
            "unit_amount_decimal": "0.00005",
            "recurring": {"interval": "month", "usage_type": "metered", "meter": old["recurring"]["meter"]},
        }
    )
    second = await place.second_subscription(org, [plan["id"], price.id])
    await place.hear()
    await place.pass_days(1)
    await place.api.cancel_subscription(first)
    await place.hear()
    assert place.usage_prices(second) == [price.id]


async def test_usage_until_the_second_is_heard_of_is_billed_once_although_the_first_is_past_due(
    place: BillingPlace,
) -> None:
    org = await place.subscriber()
    await place.pass_days(2)
    first = await place.subscription_of(org)
    place.twin.state.tables["subscription"][first]["status"] = "past_due"
    await place.applier.look_at_customers()
    place.pass_time(minutes=5)
    await place.second_subscription(org)
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=2)
    await place.export()
    await place.hear()
    await place.pass_days(70)
    found = await place.agreement()
    assert (place.invoiced_usage(), found.agrees) == (3_000_000, True)


async def test_a_second_that_is_heard_of_late_raises_no_alarm(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(2)
    await place.second_subscription(org)
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=2)
    await place.hear()
    await place.pass_days(40)
    found = await place.agreement()
    assert place.invoiced_usage() == 3_000_000
    assert found.agrees, found.invoices


async def test_trial_usage_stays_free_when_a_paid_one_takes_over(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_TRY))
    await place.synchronise()
    org = await place.subscriber("try")
    place.pass_time(hours=1)
    await place.use(org, 7 * DOLLAR)
    place.pass_time(days=2)
    await place.hear()
    await place.export()
    await place.second_subscription(org)
    await place.hear()
    await place.pass_days(45)
    assert place.invoiced_usage() == 0


async def test_two_workers_give_the_item_back_once(place: BillingPlace) -> None:
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
    other = asyncio.create_task(place.applier.look_at_customers(org))
    await other
    hold.release()
    await one
    assert len(place.usage_prices(second)) == 1


async def test_the_answer_of_giving_it_back_is_lost(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(1)
    first = await place.subscription_of(org)
    second = await place.second_subscription(org)
    await place.hear()
    await place.pass_days(1)
    await place.api.cancel_subscription(first)
    place.twin.faults.add(FaultPlan(kind="drop_after_commit", method="POST", path=f"/v1/subscriptions/{second}"))
    with contextlib.suppress(StripeFailed):
        await place.applier.look_at_customers(org)
    await place.pass_days(2)
    assert len(place.usage_prices(second)) == 1


async def test_the_answer_of_taking_it_off_is_lost(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(1)
    first = await place.subscription_of(org)
    second = await place.second_subscription(org)
    place.twin.faults.add(FaultPlan(kind="drop_after_commit", method="POST", path=f"/v1/subscriptions/{second}"))
    with contextlib.suppress(StripeFailed):
        await place.applier.look_at_customers(org)
    assert place.usage_prices(second) == []
    await place.pass_days(1)
    await place.api.cancel_subscription(first)
    await place.hear()
    assert len(place.usage_prices(second)) == 1


async def test_an_item_that_stripe_did_not_take_off_is_taken_off_at_the_next_look(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(1)
    second = await place.second_subscription(org)
    failing = FaultPlan(kind="error_before_commit", method="POST", path=f"/v1/subscriptions/{second}", times=99)
    place.twin.faults.add(failing)
    await place.applier.look_at_customers(org)
    assert len(place.usage_prices(second)) == 1
    place.twin.faults.clear()
    await place.applier.look_at_customers(org)
    assert len(place.usage_prices(second)) == 0


async def test_one_subscription_that_stripe_fails_on_holds_up_no_other(place: BillingPlace) -> None:
    """Its change is answered by 500 each time; the others are looked at all the same."""
    other = await place.subscriber()  # older: after it in Stripe's list
    place.pass_time(minutes=1)
    org = await place.subscriber()
    other_id = await place.subscription_of(other)
    place.pass_time(minutes=1)
    second = await place.second_subscription(org)
    failing = FaultPlan(kind="error_before_commit", method="POST", path=f"/v1/subscriptions/{second}", times=99)
    place.twin.faults.add(failing)
    place.twin.state.tables["subscription"][other_id]["status"] = "unpaid"
    for _ in range(3):
        try:
            await place.applier.look_at_customers()
        except StripeFailed:
            place.pass_time(hours=1)
    assert await place.rows("SELECT status FROM organizations WHERE id = :org", org=other) == [("suspended",)]


async def test_usage_billed_twice_since_stripe_keeps_the_item_is_told_of(place: BillingPlace) -> None:
    """Not by events that come and go, but by status: each of two invoices agrees by itself."""
    org = await place.subscriber()
    first = await place.subscription_of(org)
    await place.pass_days(2)
    await place.second_subscription(org, place.usage_prices(first))
    await place.applier.look_at_customers()
    place.pass_time(hours=5)
    await place.use(org, 3 * DOLLAR)
    for _ in range(40):
        place.pass_time(days=1)
        await place.applier.look_at_customers(with_invoices=True)
        await place.export()
        await place.reconciler.round()
    assert place.invoiced_usage() == 6_000_000
    found = await place.agreement()
    assert [(one.organization_id, one.reason) for one in found.usage_items] == [(org, "two subscriptions bill usage")]
    assert not found.agrees
