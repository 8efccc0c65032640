"""Money at the edges: late usage and credit, clocks that differ, alarms that are true and those that are not."""

from __future__ import annotations

import asyncio
import json
import tomllib
from datetime import UTC, datetime, timedelta

from sqlalchemy import text

from core.clock import ManualClock
from metering.billing.accepting import accept_differences
from metering.billing.customers import Customers
from metering.billing.plans import EXAMPLE, build_plans
from metering.billing.stripe_objects import read_subscription
from metering.billing.twin.engine.payments import attach
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import DOLLAR, PAGES, BillingPlace

_TRY = EXAMPLE + '\n[plans.try]\ntitle = "Try"\nprice_usd_per_month = 20\nbills_usage = true\ntrial_days = 7\n'
_FLAT = EXAMPLE + '\n[plans.flat]\ntitle = "Flat"\nprice_usd_per_month = 50\n'


async def test_a_change_to_a_cheaper_plan_that_includes_usage_raises_no_alarm(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("pro")
    await place.use(org, 2 * DOLLAR, place.clock.now() + timedelta(minutes=5))
    await place.pass_days(5)
    await place.customers.change_plan(org, "flat")
    await place.pass_days(4)
    found = await place.agreement()
    assert found.agrees, found.invoices


async def test_a_subscription_that_was_never_paid_raises_no_alarm(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(1)
    await place.customers.cancel(org, at_once=True)
    await place.pass_days(3)
    assert (await place.agreement()).agrees
    first = await place.subscription_of(org)
    source = place.twin.state.tables["subscription"][first]
    await place.api._client.v1.subscriptions.create_async(
        {
            "customer": source["customer"],
            "items": [{"price": item["price"]["id"]} for item in source["items"]["data"]],
            "payment_behavior": "default_incomplete",
        }
    )
    await place.hear()
    await place.use(org, 2 * DOLLAR, place.clock.now() + timedelta(hours=2))  # under the free plan
    await place.pass_days(5)
    found = await place.agreement()
    assert found.agrees, found.invoices


async def test_late_usage_of_when_there_were_two_is_billed_with_the_next_invoice(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(20)
    await place.second_subscription(org)
    late = place.clock.now() + timedelta(hours=1, minutes=40)
    place.pass_time(hours=3)
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
    assert reports == [(1,)]


async def test_a_correction_of_what_an_invoice_paid_changes_nothing_of_what_is_left(place: BillingPlace) -> None:
    org = await place.subscriber()
    place.pass_time(minutes=5)
    await place.use(org, 8 * DOLLAR)
    paid = place.clock.now()
    await place.pass_hours(2)
    await place.customers.cancel(org, at_once=True)
    await place.pass_hours(5)
    await place.add_credit(org, 1_000, "a")
    await place.use(org, -5 * DOLLAR, paid)  # corrected
    await place.pass_hours(3)
    assert await place.credit_left(org) == 10 * DOLLAR


async def test_credit_pays_late_usage_no_further_than_it_goes(place: BillingPlace) -> None:
    org = await place.organization()
    await place.add_credit(org, 500, "a")
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    place.pass_time(minutes=5)
    await place.use(org, 300 * DOLLAR)
    place.pass_time(minutes=5)
    subscription_id = await place.subscription_of(org)
    await place.api.cancel_subscription(subscription_id)
    place.pass_time(hours=2)
    await place.hear()
    await place.pass_hours(3)
    assert await place.credit_left(org) == 0
    assert [one.amount for one in (await place.agreement()).uncollected] == [295 * DOLLAR]


async def test_late_usage_charges_a_card_once(place: BillingPlace) -> None:
    org = await place.organization()
    await place.add_credit(org, 500, "a")
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    customer = place.twin.state.find("customer", await place.customer_of(org))
    visa = attach(place.twin.state, customer["id"], "pm_card_visa")
    customer["invoice_settings"]["default_payment_method"] = visa["id"]
    await place.customers.set_automatic_top_up(org, below_cents=100, cents=2_000)
    place.pass_time(minutes=5)
    await place.use(org, 300 * DOLLAR)
    place.pass_time(minutes=5)
    subscription_id = await place.subscription_of(org)
    await place.api.cancel_subscription(subscription_id)
    place.pass_time(hours=2)
    await place.hear()
    await place.pass_hours(3)
    for _ in range(30):
        place.pass_time(minutes=1)
        await place.top_ups.round()
        await place.hear()
    assert await place.rows("SELECT count(*) FROM top_ups") == [(1,)]


async def test_a_gate_that_cannot_be_set_holds_up_no_other(place: BillingPlace) -> None:
    """Settlements of somebody's go on for seconds: the budgets' lock is not had in time."""
    gated = await place.organization()
    await place.add_credit(gated, 1_000, "a")
    async with place.database.transaction() as session:
        await session.execute(text("UPDATE budgets SET limit_nano_usd = 1"))
    other = await place.subscriber()
    await place.use(other, DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    await place.rows("UPDATE meter_cursors SET next_at = 'epoch' WHERE organization_id = :org RETURNING 1", org=gated)
    async with place.database.transaction() as session:
        await session.execute(text("LOCK TABLE budget_periods IN ROW EXCLUSIVE MODE"))
        await place.export()
    await place.export()
    assert await place.rows("SELECT state FROM meter_reports") == [("acked",)]


async def test_a_change_that_was_made_is_told_although_the_other_ones_item_stays(place: BillingPlace) -> None:
    """Stripe had trouble while a second subscription was heard of; what the customer asks for then is done."""
    org = await place.subscriber()
    place.pass_time(days=1)
    second = await place.second_subscription(org)
    path = f"/v1/subscriptions/{second}"
    place.twin.faults.add(FaultPlan(kind="error_before_commit", method="POST", path=path, times=99))
    await place.hear()
    place.twin.faults.clear()
    place.twin.faults.add(FaultPlan(kind="error_before_commit", method="POST", path=path, nth=2, times=99))
    done = await place.customers.cancel(org)
    assert done.cancel_at is not None


async def test_uncollected_usage_that_was_corrected_is_forgotten(place: BillingPlace) -> None:
    org = await place.subscriber()
    place.pass_time(minutes=5)
    late = place.clock.now()
    await place.pass_hours(2)
    await place.customers.cancel(org, at_once=True)
    await place.pass_hours(5)
    await place.use(org, 7 * DOLLAR, late)
    await place.pass_days(2)
    assert not (await place.agreement()).agrees
    await place.pass_days(80)
    await place.use(org, -7 * DOLLAR, late)
    await place.pass_days(3)
    found = await place.agreement()
    assert found.agrees, found.uncollected


async def test_late_usage_of_when_there_were_two_is_not_lost_at_the_end_of_the_loop(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.pass_days(20)
    await place.second_subscription(org)
    late = place.clock.now() + timedelta(hours=1, minutes=40)
    place.pass_time(hours=3)
    await place.hear()
    await place.pass_days(12)
    await place.use(org, 3 * DOLLAR, late)
    await place.rows("UPDATE meter_cursors SET scanned_at = NULL, next_at = 'epoch' RETURNING 1")
    place.pass_time(seconds=(late + timedelta(days=33, hours=23) - place.clock.now()).total_seconds())
    await place.hear()
    await place.export()  # told of the hour of when there were two
    place.pass_time(hours=3)
    await place.reconciler.round(is_doubt_only=True)
    await place.pass_days(70)
    assert place.invoiced_usage() == 3_000_000


async def test_usage_of_a_paid_one_is_billed_although_the_trial_of_the_older_ends(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_TRY))
    await place.synchronise()
    org = await place.subscriber("try")
    await place.pass_days(2)
    await place.second_subscription(org)  # active, paid
    await place.hear()
    await place.pass_days(2)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await place.pass_days(75)
    assert place.invoiced_usage() == 3_000_000


async def test_usage_while_two_billed_it_is_billed_once(place: BillingPlace) -> None:
    """The first is past due when a second is made; it is heard of three hours later. The first is cancelled."""
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
    await place.pass_days(3)
    await place.api.cancel_subscription(first)
    await place.hear()
    await place.pass_days(40)
    assert place.invoiced_usage() == 3_000_000


async def test_tokens_that_are_parked_keep_nobody_from_ending(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(EXAMPLE.replace("grace_days = 7 ", "token_meters = true\ngrace_days = 7 ")))
    await place.synchronise()
    org = await place.subscriber()
    place.pass_time(hours=2)
    await place.export()
    await place.rows("UPDATE meter_cursors SET parked_for = 'x' WHERE meter LIKE 'input%' RETURNING 1")
    await place.customers.cancel(org, at_once=True)
    assert await place.rows("SELECT status FROM subscriptions") == [("canceled",)]


async def test_a_clock_that_is_behind_a_second_loses_no_period(place: BillingPlace) -> None:
    """pro, then a dearer plan that includes usage (invoiced at once), then pro again, all in one period."""
    place.plans = build_plans(tomllib.loads(EXAMPLE + '\n[plans.flat]\ntitle = "Flat"\nprice_usd_per_month = 200\n'))
    await place.synchronise()
    org = await place.subscriber("pro")
    await place.pass_days(5)
    behind = ManualClock(place.clock.now() - timedelta(seconds=1))
    customers = Customers(place.database, place.api, behind, lambda: place.plans)
    await customers.change_plan(org, "flat")
    await place.pass_days(3)
    await place.customers.change_plan(org, "pro")
    await place.pass_days(2)
    await place.use(org, 3 * DOLLAR, place.clock.now() - timedelta(hours=3))
    await place.pass_days(70)
    assert place.invoiced_usage() == 3_000_000


async def test_a_clock_that_is_behind_a_second_loses_no_usage(place: BillingPlace) -> None:
    """From a plan that includes usage to one that bills it; our clock is a second behind Stripe's."""
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("flat")
    await place.pass_days(5)
    behind = ManualClock(place.clock.now() - timedelta(seconds=1))
    customers = Customers(place.database, place.api, behind, lambda: place.plans)
    await customers.change_plan(org, "pro")
    place.pass_time(minutes=10)
    await place.use(org, 3 * DOLLAR)
    await place.pass_days(70)
    assert place.invoiced_usage() == 3_000_000
    assert (await place.agreement()).agrees


async def test_a_yearly_agreement_with_monthly_usage(place: BillingPlace) -> None:
    """Flexible billing lets a subscription's items have different intervals; the plan's comes first."""
    org = await place.subscriber()
    subscription_id = await place.subscription_of(org)
    source = place.twin.state.tables["subscription"][subscription_id]
    raw = json.loads(json.dumps({k: v for k, v in source.items() if not k.startswith("_")}))
    month = raw["items"]["data"][1]
    raw["items"]["data"][0] |= {"current_period_end": month["current_period_start"] + 365 * 86_400}
    found = read_subscription(raw)
    assert found.period_ends_at == datetime.fromtimestamp(month["current_period_end"], UTC)


async def test_a_page_that_could_not_be_closed_is_closed_later(place: BillingPlace) -> None:
    """Two pages are asked for at once, and Stripe fails as the first of them is closed."""
    org = await place.organization()
    await place.customers.subscribe(org, "pro", PAGES)
    fault = FaultPlan(kind="error_before_commit", method="POST", path="/v1/checkout/sessions/*/expire", nth=3)
    place.twin.faults.add(fault)
    await asyncio.gather(
        place.customers.subscribe(org, "pro", PAGES),
        place.customers.subscribe(org, "pro", PAGES),
        return_exceptions=True,
    )
    place.twin.faults.clear()
    await place.customers.subscribe(org, "pro", PAGES)
    pages = [one for one in place.twin.state.tables["checkout.session"].values() if one["status"] == "open"]
    assert len(pages) == 1


async def test_usage_after_an_item_was_taken_off_unheard_is_told_of(place: BillingPlace) -> None:
    """The operator takes the usage item off in the dashboard; the worker hears of it two hours later."""
    org = await place.subscriber()
    await place.pass_days(2)
    ((subscription_id, item_id),) = await place.rows("SELECT id, usage_item_id FROM subscriptions")
    await place.api.update_subscription(
        subscription_id,
        {"items": [{"id": str(item_id), "deleted": True}], "proration_behavior": "create_prorations"},
    )
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=1)
    await place.export()
    await place.hear()
    await place.pass_days(40)
    found = await place.agreement()
    assert not found.agrees


async def test_usage_after_an_item_was_put_on_unheard_is_billed(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("flat")
    await place.pass_days(2)
    subscription_id = await place.subscription_of(org)
    (price,) = [p for p in place.twin.state.tables["price"].values() if p["recurring"]["usage_type"] == "metered"]
    await place.api.update_subscription(subscription_id, {"items": [{"price": price["id"]}]})
    place.pass_time(hours=1)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(hours=1)
    await place.hear()
    await place.pass_days(70)
    assert place.invoiced_usage() == 3_000_000
    found = await place.agreement()
    assert [one.reason for one in found.usage_items] == ["the plan includes usage, and an item bills it"]
    async with place.database.transaction() as session:
        await accept_differences(session, place.clock.now(), organization_id=org)
    assert (await place.agreement()).agrees


async def test_credit_that_is_bought_long_after_is_there_to_be_spent(place: BillingPlace) -> None:
    """Usage came too late for a last invoice; three weeks later the customer buys credit for the first time."""
    org = await place.subscriber()
    place.pass_time(minutes=5)
    late = place.clock.now()
    await place.pass_hours(2)
    await place.customers.cancel(org, at_once=True)
    await place.pass_hours(5)
    await place.use(org, 30 * DOLLAR, late)
    await place.pass_days(2)
    await place.pass_days(20)
    await place.add_credit(org, 1_000, "a")
    assert await place.credit_left(org) > 0
