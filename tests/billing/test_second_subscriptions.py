"""Two subscriptions of one organization, which only the dashboard can make: usage is billed once."""

from __future__ import annotations

import asyncio
import contextlib
import tomllib
from datetime import timedelta

from metering.billing import agreement
from metering.billing.errors import StripeFailed
from metering.billing.plans import EXAMPLE, build_plans
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import DOLLAR, BillingPlace

_FLAT = EXAMPLE + '\n[plans.flat]\ntitle = "Flat"\nprice_usd_per_month = 50\n'
_TRY = EXAMPLE + '\n[plans.try]\ntitle = "Try"\nprice_usd_per_month = 20\nbills_usage = true\ntrial_days = 7\n'


def invoiced(place: BillingPlace) -> int:
    return sum(
        line["quantity"]
        for invoice in place.twin.state.tables["invoice"].values()
        if invoice["status"] in {"paid", "open"}
        for line in invoice["lines"]["data"]
        if line["_price"]["recurring"]["usage_type"] == "metered"
    )


async def pass_days(place: BillingPlace, days: int) -> None:
    for _ in range(days):
        place.pass_time(days=1)
        await place.hear()
        await place.export()
        await place.reconciler.round()
        await place.reconciler.round(is_doubt_only=True)


async def agreement_of(place: BillingPlace) -> agreement.ReconciliationView:
    async with place.database.transaction() as session:
        return await agreement.reconciliation(session, place.clock.now())


def _items(place: BillingPlace, subscription_id: str) -> list[str]:
    return [
        one["price"]["id"]
        for one in place.twin.state.tables["subscription"][subscription_id]["items"]["data"]
        if one["price"]["recurring"]["usage_type"] == "metered"
    ]


async def test_usage_while_the_first_is_past_due_is_billed_when_it_is_paid_again(place: BillingPlace) -> None:
    """A pays late: B bills meanwhile; then A again."""
    org = await place.subscriber()
    await pass_days(place, 2)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    await place.second_subscription(org)
    await place.hear()
    await pass_days(place, 1)
    place.twin.state.tables["subscription"][first]["status"] = "past_due"
    await place.applier.look_at_customers()
    await pass_days(place, 1)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await pass_days(place, 1)
    place.twin.state.tables["subscription"][first]["status"] = "active"
    await place.applier.look_at_customers()
    await pass_days(place, 75)
    found = await agreement_of(place)
    assert invoiced(place) == 3_000_000
    assert found.agrees


async def test_a_first_that_ended_unheard_leaves_the_seconds_usage_billed(place: BillingPlace) -> None:
    """In the dashboard the old one is cancelled and another made; the worker hears of it two hours later."""
    org = await place.subscriber()
    await pass_days(place, 2)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    await place.api.cancel_subscription(str(first))
    place.pass_time(seconds=5)
    await place.second_subscription(org)
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=1)
    await place.applier.look_at_customers()
    await place.hear()
    await pass_days(place, 75)
    await agreement_of(place)
    assert invoiced(place) == 3_000_000


async def test_the_same_heard_by_events(place: BillingPlace) -> None:
    org = await place.subscriber()
    await pass_days(place, 2)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    await place.api.cancel_subscription(str(first))
    place.pass_time(seconds=5)
    await place.second_subscription(org)
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=1)
    await place.hear()
    await pass_days(place, 75)
    assert invoiced(place) == 3_000_000


async def test_a_refusal_to_take_the_item_off_holds_up_no_invoice(place: BillingPlace) -> None:
    """The second subscription has nothing but usage: Stripe keeps its last item."""
    await place.subscriber()
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    await pass_days(place, 2)
    source = place.twin.state.tables["subscription"][first]
    await place.api._client.v1.subscriptions.create_async(
        {
            "customer": source["customer"],
            "items": [{"price": _items(place, str(first))[0]}],
            "default_payment_method": source["default_payment_method"],
        }
    )
    await place.hear()
    await pass_days(place, 33)
    await place.rows(
        "SELECT type, state, attempts, problem FROM stripe_events WHERE state NOT IN ('applied', 'ignored')"
    )
    assert await place.rows("SELECT 1 FROM invoices WHERE status = 'paid' AND usage_micro_usd IS NOT NULL")


async def test_an_agreement_without_a_plan_of_ours_has_its_item_back(place: BillingPlace) -> None:
    org = await place.subscriber()
    await pass_days(place, 2)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    source = place.twin.state.tables["subscription"][first]
    price = await place.api._client.v1.prices.create_async(
        {
            "currency": "usd",
            "product_data": {"name": "Agreement"},
            "unit_amount": 50_000,
            "recurring": {"interval": "month"},
        }
    )
    await place.api._client.v1.subscriptions.create_async(
        {
            "customer": source["customer"],
            "items": [{"price": price.id}, {"price": _items(place, str(first))[0]}],
            "default_payment_method": source["default_payment_method"],
        }
    )
    await place.hear()
    await pass_days(place, 1)
    await place.api.cancel_subscription(str(first))
    await place.hear()
    await pass_days(place, 2)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await pass_days(place, 40)
    await agreement_of(place)
    assert invoiced(place) == 3_000_000


async def test_a_negotiated_price_of_usage_comes_back(place: BillingPlace) -> None:
    await place.subscriber()
    await pass_days(place, 2)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
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
    second = await place.api._client.v1.subscriptions.create_async(
        {
            "customer": source["customer"],
            "items": [{"price": plan["id"]}, {"price": price.id}],
            "default_payment_method": source["default_payment_method"],
        }
    )
    await place.hear()
    await pass_days(place, 1)
    await place.api.cancel_subscription(str(first))
    await place.hear()
    assert _items(place, second.id) == [price.id]


async def test_usage_until_the_second_is_heard_of_is_billed_once_although_the_first_is_past_due(
    place: BillingPlace,
) -> None:
    org = await place.subscriber()
    await pass_days(place, 2)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    place.twin.state.tables["subscription"][first]["status"] = "past_due"
    await place.applier.look_at_customers()
    place.pass_time(minutes=5)
    await place.second_subscription(org)
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=2)
    await place.export()
    await place.hear()
    await pass_days(place, 70)
    found = await agreement_of(place)
    assert (invoiced(place), found.agrees) == (3_000_000, True)


async def test_a_second_that_is_heard_of_late_raises_no_alarm(place: BillingPlace) -> None:
    org = await place.subscriber()
    await pass_days(place, 2)
    await place.second_subscription(org)
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=2)
    await place.hear()
    await pass_days(place, 40)
    found = await agreement_of(place)
    assert invoiced(place) == 3_000_000
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
    await pass_days(place, 45)
    assert invoiced(place) == 0


async def test_two_workers_give_the_item_back_once(place: BillingPlace) -> None:
    org = await place.subscriber()
    await pass_days(place, 1)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    second = await place.second_subscription(org)
    await place.hear()
    await pass_days(place, 1)
    await place.api.cancel_subscription(str(first))
    hold = place.twin.faults.add(FaultPlan(kind="hold", method="POST", path=f"/v1/subscriptions/{second}"))
    one = asyncio.create_task(place.applier.look_at_customers(org))
    await hold.entered.wait()
    other = asyncio.create_task(place.applier.look_at_customers(org))
    await other
    hold.release()
    await one
    assert len(_items(place, second)) == 1


async def test_the_answer_of_giving_it_back_is_lost(place: BillingPlace) -> None:
    org = await place.subscriber()
    await pass_days(place, 1)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    second = await place.second_subscription(org)
    await place.hear()
    await pass_days(place, 1)
    await place.api.cancel_subscription(str(first))
    place.twin.faults.add(FaultPlan(kind="drop_after_commit", method="POST", path=f"/v1/subscriptions/{second}"))
    with contextlib.suppress(StripeFailed):
        await place.applier.look_at_customers(org)
    await pass_days(place, 2)
    assert len(_items(place, second)) == 1


async def test_the_answer_of_taking_it_off_is_lost(place: BillingPlace) -> None:
    org = await place.subscriber()
    await pass_days(place, 1)
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    second = await place.second_subscription(org)
    place.twin.faults.add(FaultPlan(kind="drop_after_commit", method="POST", path=f"/v1/subscriptions/{second}"))
    with contextlib.suppress(StripeFailed):
        await place.applier.look_at_customers(org)
    assert _items(place, second) == []
    await pass_days(place, 1)
    await place.api.cancel_subscription(str(first))
    await place.hear()
    assert len(_items(place, second)) == 1


async def test_an_item_that_stripe_did_not_take_off_is_taken_off_at_the_next_look(place: BillingPlace) -> None:
    org = await place.subscriber()
    await pass_days(place, 1)
    second = await place.second_subscription(org)
    failing = FaultPlan(kind="error_before_commit", method="POST", path=f"/v1/subscriptions/{second}", times=99)
    place.twin.faults.add(failing)
    await place.applier.look_at_customers(org)
    assert len(_items(place, second)) == 1
    place.twin.faults.clear()
    await place.applier.look_at_customers(org)
    assert len(_items(place, second)) == 0


async def test_one_subscription_that_stripe_fails_on_holds_up_no_other(place: BillingPlace) -> None:
    """Its change is answered by 500 each time; the others are looked at all the same."""
    other = await place.subscriber()  # older: after it in Stripe's list
    place.pass_time(minutes=1)
    org = await place.subscriber()
    ((other_id,),) = await place.rows("SELECT id FROM subscriptions WHERE organization_id = :org", org=other)
    place.pass_time(minutes=1)
    ((first,),) = await place.rows("SELECT id FROM subscriptions WHERE organization_id = :org", org=org)
    source = place.twin.state.tables["subscription"][first]
    second = await place.api._client.v1.subscriptions.create_async(
        {
            "customer": source["customer"],
            "items": [{"price": item["price"]["id"]} for item in source["items"]["data"]],
            "default_payment_method": source["default_payment_method"],
        }
    )
    place.twin.faults.add(
        FaultPlan(kind="error_before_commit", method="POST", path=f"/v1/subscriptions/{second.id}", times=99)
    )
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
    ((first,),) = await place.rows("SELECT id FROM subscriptions")
    await pass_days(place, 2)
    source = place.twin.state.tables["subscription"][first]
    await place.api._client.v1.subscriptions.create_async(
        {
            "customer": source["customer"],
            "items": [{"price": _items(place, str(first))[0]}],
            "default_payment_method": source["default_payment_method"],
        }
    )
    await place.applier.look_at_customers()
    place.pass_time(hours=5)
    await place.use(org, 3 * DOLLAR)
    for _ in range(40):
        place.pass_time(days=1)
        await place.applier.look_at_customers(with_invoices=True)
        await place.export()
        await place.reconciler.round()
    found = await agreement_of(place)
    assert invoiced(place) == 3_000_000 or not found.agrees
