"""Subscriptions, one for all and all for one, the inbox."""

from __future__ import annotations

import asyncio
import contextlib
import time
import tomllib
from datetime import timedelta

import msgspec
import pytest

from keys import tenants
from metering.billing import agreement, emails, inbox, marks, prepaid
from metering.billing.errors import StripeFailed, StripeRefused
from metering.billing.export import Exported
from metering.billing.mail_texts import text_of
from metering.billing.outbox import claim
from metering.billing.plans import EXAMPLE, Plans, build_plans
from metering.billing.prepaid import Credit
from metering.billing.reconcile import Reconciled
from metering.billing.stripe_api import is_signed
from metering.billing.twin.engine.payments import attach
from metering.billing.twin.errors import StripeError
from metering.billing.twin.faults import FaultPlan
from metering.billing.worker import BillingWorker
from tests.harness.billing import PAGES, BillingPlace

_DOLLAR = 1_000_000_000


async def test_a_second_subscription_bills_no_usage(place: BillingPlace) -> None:
    """Guarantee: however it came about, the meter's sum is on one invoice only."""
    org = await place.subscriber()
    customer = await place.customer_of(org)
    first = await place.subscription_of(org)
    place.pass_time(minutes=1)
    items = place.twin.state.tables["subscription"][first]["items"]["data"]
    made = await place.api._client.v1.subscriptions.create_async(
        {
            "customer": customer,
            "items": [{"price": item["price"]["id"]} for item in items],
            "default_payment_method": place.twin.state.tables["subscription"][first]["default_payment_method"],
        }
    )
    await place.hear()
    assert [
        one
        for one in place.twin.state.tables["subscription"][made.id]["items"]["data"]
        if one["price"]["recurring"]["usage_type"] == "metered"
    ] == []
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    for _ in range(33):
        place.pass_time(days=1)
        await place.hear()
        await place.export()
    rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
    assert sum(int(row[0]) for row in rows) == 1_000_000


async def test_usage_is_billed_once_whoever_pays_two_checkouts(place: BillingPlace) -> None:
    org = await place.organization()
    first = await place.customers.subscribe(org, "pro", PAGES)
    place.pass_time(minutes=50)  # an idempotency key of the next hour; or another plan, or another success_url
    second = await place.customers.subscribe(org, "pro", PAGES)
    for page in (first, second):
        with contextlib.suppress(StripeError):
            place.twin.complete_checkout(page.id)
    await place.hear()
    place.pass_time(hours=1)
    await place.use(org, _DOLLAR)
    for _ in range(33):
        place.pass_time(days=1)
        await place.hear()
        await place.export()
    rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
    assert sum(int(row[0]) for row in rows) == 1_000_000


def _lose(place: BillingPlace, kind: str, identity: str) -> None:
    place.twin.state.tables[kind].pop(identity)


async def test_a_subscription_that_is_gone_holds_up_nobodys_days_of_grace(place: BillingPlace) -> None:
    gone, other = await place.subscriber(), await place.subscriber()
    _lose(place, "subscription", await place.subscription_of(gone))
    await place.rows("UPDATE subscriptions SET period_ends_at = '2027-01-15' RETURNING 1")
    await place.rows(
        "UPDATE subscriptions SET status = 'past_due', past_due_since = '2026-12-01' WHERE organization_id = :org"
        " RETURNING 1",
        org=other,
    )
    await place.applier.look_at_overdue()


async def test_a_customer_that_is_gone_holds_up_nobodys_reconciliation(place: BillingPlace, monkeypatch) -> None:
    orgs = [await place.subscriber() for _ in range(3)]
    for org in orgs:
        await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    await place.export()
    gone = await place.customer_of(orgs[0])
    original = place.api.hourly_sums

    async def sums(meter_id, customer_id, starts_at, ends_at):
        if customer_id == gone:
            raise StripeRefused("No such customer", code="resource_missing", param="customer", status=400)
        return await original(meter_id, customer_id, starts_at, ends_at)

    monkeypatch.setattr(place.api, "hourly_sums", sums)
    place.pass_time(hours=1)
    found = Reconciled()
    with contextlib.suppress(StripeFailed):
        found = await place.reconciler.round()
    assert found.hours >= 2


async def test_a_customer_that_is_gone_holds_up_nobodys_subscriptions(place: BillingPlace) -> None:
    orgs = [await place.subscriber() for _ in range(3)]
    _lose(place, "customer", await place.customer_of(orgs[0]))
    assert await place.applier.look_at_customers(with_invoices=True) >= 2


async def test_a_customer_that_is_gone_holds_up_nobodys_top_ups(place: BillingPlace) -> None:
    orgs = []
    for _ in range(3):
        org = await place.organization()
        customer = place.twin.state.find("customer", await place.customer_of(org))
        method = attach(place.twin.state, customer["id"], "pm_card_visa")
        customer["invoice_settings"]["default_payment_method"] = method["id"]
        async with place.database.transaction() as session:
            await prepaid.add_credit(session, Credit(cents=100, source=org), place.clock.now(), organization_id=org)
        await place.customers.set_automatic_top_up(org, below_cents=300, cents=2_000)
        orgs.append(org)
    _lose(place, "customer", await place.customer_of(orgs[0]))
    for _ in range(3):
        with contextlib.suppress(StripeFailed):
            await place.top_ups.round()
    paid = await place.rows("SELECT 1 FROM top_ups WHERE state = 'paid'")
    assert len(paid) == 2


async def test_a_cancelled_subscription_is_noticed_although_its_price_was_changed_in_the_dashboard(
    place: BillingPlace,
) -> None:
    org = await place.subscriber()
    subscription = place.twin.state.tables["subscription"][await place.subscription_of(org)]
    for item in subscription["items"]["data"]:
        item["price"] = {**item["price"], "metadata": {}}
    subscription |= {"status": "canceled", "ended_at": int(place.clock.now().timestamp())}
    await place.applier.look_at_customers()
    assert await place.rows("SELECT status FROM subscriptions") == [("canceled",)]


async def test_what_an_operator_gives_after_a_cancellation_stays(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.customers.cancel(org, at_once=True)
    async with place.database.transaction() as session:
        await tenants.set_plan(session, "enterprise", organization_id=org)
    place.pass_time(hours=1)
    await place.applier.look_at_customers()
    assert await place.rows("SELECT plan FROM organizations WHERE id = :org", org=org) == [("enterprise",)]


async def test_one_500_does_not_keep_a_customer_from_billing_for_a_day(place: BillingPlace) -> None:
    org = await place.organization()
    place.twin.faults.add(FaultPlan(kind="error_before_commit", method="POST", path="/v1/customers"))
    with pytest.raises(Exception):  # noqa: B017
        await place.customers.subscribe(org, "pro", PAGES)
    place.pass_time(hours=2)
    await place.customers.subscribe(org, "pro", PAGES)


async def test_another_organizations_name_or_address_does_not_keep_it_from_billing(place: BillingPlace) -> None:
    org = await place.organization()
    place.twin.faults.add(FaultPlan(kind="drop_after_commit", method="POST", path="/v1/customers"))
    with pytest.raises(Exception):  # noqa: B017
        await place.customers.subscribe(org, "pro", PAGES)
    await place.customers.subscribe(org, "pro", PAGES, email="a@example.com")


@pytest.mark.parametrize("header", ["t={now},v1=\xe9", "t={now},v1=a,v1=\xff"])
def test_a_forged_signature_is_no_error_of_ours(header: str) -> None:
    assert not is_signed(b"{}", header.format(now=int(time.time())), ["whsec_x"])


async def test_the_list_of_events_is_asked_for_as_stripe_allows(place: BillingPlace) -> None:
    """stripe/params/_event_list_params.py: 'An array of up to 20 strings'."""
    await place.subscriber()
    asked = [entry.params for entry in place.twin.journal.entries if entry.path == "/v1/events"]
    assert len({kind for one in asked for kind in one["types"]}) == len(inbox.KINDS)
    assert max(len(one["types"]) for one in asked) <= 20


async def test_thin_events_that_were_not_told_are_found(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    customer = place.twin.state.tables["customer"].pop(await place.customer_of(org))
    await place.export()
    place.twin.state.tables["customer"][customer["id"]] = customer
    place.pass_time(minutes=1)
    await place.hear()
    found = await place.rows("SELECT type FROM stripe_events WHERE type LIKE 'v1.billing.meter.%'")
    assert found == [("v1.billing.meter.error_report_triggered",)]


async def test_cancelled_at_once_everything_is_invoiced_although_a_worker_was_at_it(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    await place.use(org, 2 * _DOLLAR, place.clock.now() - timedelta(minutes=5))
    worker = place.exporter
    async with place.database.transaction() as session:
        claimed = await claim(session, worker._worker, place.clock.now(), limit=64)
    batches = await worker._prepared(claimed)
    ending = asyncio.create_task(place.customers.cancel(org, at_once=True))
    await worker._recorded(batches, await worker._sent(batches), Exported())
    await ending
    for _ in range(240):
        place.pass_time(minutes=1)
        await place.export()
        await place.hear()
    rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
    assert sum(int(row[0]) for row in rows) == 3_000_000


async def test_automatic_top_ups_go_on_after_a_subscription_is_gone(place: BillingPlace) -> None:
    gone = await place.subscriber()
    org = await place.organization()
    customer = place.twin.state.find("customer", await place.customer_of(org))
    customer["invoice_settings"]["default_payment_method"] = attach(place.twin.state, customer["id"], "pm_card_visa")[
        "id"
    ]
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=100, source=org), place.clock.now(), organization_id=org)
    await place.customers.set_automatic_top_up(org, below_cents=300, cents=2_000)
    _lose(place, "subscription", await place.subscription_of(gone))
    await place.rows("UPDATE subscriptions SET period_ends_at = '2027-01-15' RETURNING 1")
    worker = BillingWorker(place.database, place.api, place.clock, lambda: place.plans, stream_above=5000)
    for _ in range(3):
        with contextlib.suppress(StripeFailed):
            await worker.look()
        with contextlib.suppress(StripeFailed):
            await worker.top_up()
        place.pass_time(minutes=2)
    assert await place.rows("SELECT state FROM top_ups") == [("paid",)]


async def test_a_card_that_a_checkout_kept_pays_automatic_top_ups(place: BillingPlace) -> None:
    org = await place.organization()
    checkout = await place.customers.top_up(org, 500, PAGES)
    assert place.twin.complete_checkout(checkout.id)
    await place.hear()
    # Checkout keeps the card; it makes it nobody's default (cjavilla-stripe in laravel/cashier-stripe#1007).
    customer = place.twin.state.find("customer", await place.customer_of(org))
    customer["invoice_settings"]["default_payment_method"] = None
    await place.customers.set_automatic_top_up(org, below_cents=300, cents=2_000)
    await place.use(org, 3 * _DOLLAR, place.clock.now() + timedelta(minutes=1))
    assert await place.top_ups.round() == 1


async def test_a_subscribers_card_pays_automatic_top_ups(place: BillingPlace) -> None:
    org = await place.subscriber()
    customer = place.twin.state.find("customer", await place.customer_of(org))
    customer["invoice_settings"]["default_payment_method"] = None  # it is the subscription's only
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=100, source=org), place.clock.now(), organization_id=org)
    await place.customers.set_automatic_top_up(org, below_cents=300, cents=2_000)
    assert await place.top_ups.round() == 1


async def test_a_declined_automatic_top_up_is_told(place: BillingPlace) -> None:
    org = await place.organization()
    customer = place.twin.state.find("customer", await place.customer_of(org))
    method = attach(place.twin.state, customer["id"], "pm_card_chargeCustomerFail")
    customer["invoice_settings"]["default_payment_method"] = method["id"]
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=100, source=org), place.clock.now(), organization_id=org)
    await place.customers.set_automatic_top_up(org, below_cents=300, cents=2_000)
    await place.top_ups.round()
    await place.hear()
    assert await place.rows("SELECT kind FROM emails") == [("top_up_failed",)]


async def test_every_mail_that_is_written_down_has_a_text(place: BillingPlace) -> None:
    """Guarantee: what is noted of a failure can be read by those who send it."""
    org = await place.subscriber()
    async with place.database.transaction() as session:
        subscription = await place.api.get_subscription(await place.subscription_of(org))
        trial = msgspec.structs.replace(subscription, status="trialing", trial_ends_at=place.clock.now(), plan=None)
        await emails.note_trial_end(session, trial, organization_id=org)
        await emails.note_top_up(session, "topup_1", 500, organization_id=org)
        invoice = (await place.api.list_invoices(await place.customer_of(org), place.clock.now() - timedelta(days=1)))[
            0
        ]
        for status in ("open", "paid"):
            changed = msgspec.structs.replace(invoice, status=status, attempts=1)
            await emails.note_invoice(session, changed, organization_id=org)
    rows = await place.rows("SELECT kind, facts FROM emails")
    assert {kind for kind, _ in rows} == {"trial_ending", "top_up_failed", "payment_failed", "payment_recovered"}
    assert all(text_of(str(kind), facts, "Acme").body for kind, facts in rows)


async def test_without_plans_nobody_is_suspended(place: BillingPlace) -> None:
    """Guarantee: a file that is not there, or is faulty at a worker's start, takes nothing from anybody."""
    org = await place.subscriber()
    place.plans = Plans()
    await place.api.cancel_subscription(await place.subscription_of(org))
    await place.hear()
    assert await place.rows("SELECT plan, status FROM organizations WHERE id = :org", org=org) == [("pro", "active")]


async def test_what_an_operator_suspended_stays_so_whatever_the_reason(place: BillingPlace) -> None:
    org = await place.subscriber()
    async with place.database.transaction() as session:
        await tenants.set_status(session, "suspended", "payment_failed", organization_id=org)
    place.pass_time(days=32)
    await place.hear()
    await place.applier.look_at_customers()
    assert await place.rows("SELECT status FROM organizations WHERE id = :org", org=org) == [("suspended",)]


async def test_a_trial_is_given_once(place: BillingPlace) -> None:
    place.plans = build_plans(
        tomllib.loads(
            EXAMPLE + '\n[plans.try]\ntitle = "Try"\nprice_usd_per_month = 20\nbills_usage = true\ntrial_days = 7\n'
        )
    )
    await place.synchronise()
    org = await place.subscriber("try")
    place.pass_time(days=6)
    await place.customers.cancel(org, at_once=True)
    again = await place.customers.subscribe(org, "try", PAGES)
    place.twin.complete_checkout(again.id)
    await place.hear()
    rows = await place.rows("SELECT status FROM subscriptions WHERE ended_at IS NULL")
    assert rows == [("active",)]


async def test_status_says_so_when_nothing_was_reported_for_days(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    place.twin.faults.add(FaultPlan(kind="reset", method="POST", path="/v1/billing/meter_events", times=1000))
    for _ in range(10):
        place.pass_time(hours=2)
        await place.export()
    async with place.database.transaction() as session:
        found = await agreement.reconciliation(session, place.clock.now())
    assert not found.agrees


async def test_status_says_so_when_events_were_given_up(place: BillingPlace) -> None:
    await place.subscriber()
    await place.rows("UPDATE stripe_events SET state = 'dead', problem = 'x' RETURNING 1")
    async with place.database.transaction() as session:
        assert not (await agreement.reconciliation(session, place.clock.now())).agrees


async def test_a_worker_whose_clock_was_fast_stops_no_one(place: BillingPlace) -> None:
    now = place.clock.now()
    async with place.database.transaction() as session:
        assert await marks.take_turn(session, "turn:x", now + timedelta(days=1), timedelta(seconds=60))
    async with place.database.transaction() as session:
        assert await marks.take_turn(session, "turn:x", now + timedelta(hours=1), timedelta(seconds=60))


async def test_a_draft_that_was_deleted_is_no_draft_for_ever(place: BillingPlace) -> None:
    await place.subscriber()
    place.pass_time(days=31, minutes=10)
    await place.hear()
    ((draft,),) = await place.rows("SELECT id FROM invoices WHERE status = 'draft'")
    _lose(place, "invoice", str(draft))
    await place.hear()
    await place.applier.look_at_customers(with_invoices=True)
    assert not await place.rows("SELECT id FROM invoices WHERE status = 'draft'")
