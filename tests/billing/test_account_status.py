"""What an organization may do while its payment is late, and while two act on it at once."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta

import pytest

from core.ids import OrganizationId
from keys import tenants
from keys.lifecycle import record_change
from metering.billing import agreement, prepaid
from metering.billing.errors import AlreadySubscribed, StripeFailed
from metering.billing.outbox import SendResult, claim, record
from metering.billing.prepaid import Credit
from metering.billing.returning import ReturnPages
from metering.billing.twin.engine.payments import attach
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import DOLLAR, PAGES, BillingPlace


async def test_what_an_operator_gives_while_a_payment_is_late_stays(place: BillingPlace) -> None:
    org = await place.subscriber()
    ((subscription_id,),) = await place.rows("SELECT id FROM subscriptions")
    place.twin.state.tables["subscription"][subscription_id]["status"] = "past_due"
    await place.applier.look_at_customers()
    async with place.database.transaction() as session:
        await tenants.set_plan(session, "enterprise", organization_id=org)
    place.pass_time(minutes=2)
    await place.applier.look_at_overdue()
    assert await place.rows("SELECT plan FROM organizations WHERE id = :org", org=org) == [("enterprise",)]


async def test_what_an_operator_lets_go_on_after_the_grace_stays(place: BillingPlace) -> None:
    org = await place.subscriber()
    ((subscription_id,),) = await place.rows("SELECT id FROM subscriptions")
    place.twin.state.tables["subscription"][subscription_id]["status"] = "past_due"
    await place.applier.look_at_customers()
    place.pass_time(days=20)
    await place.applier.look_at_overdue()
    assert await place.rows("SELECT status FROM organizations WHERE id = :org", org=org) == [("suspended",)]
    async with place.database.transaction() as session:
        await tenants.set_status(session, "active", organization_id=org)
    place.pass_time(minutes=2)
    await place.applier.look_at_overdue()
    assert await place.rows("SELECT status FROM organizations WHERE id = :org", org=org) == [("active",)]


async def test_an_unknown_charge_is_no_failure_after_the_card_was_changed(place: BillingPlace) -> None:
    org = await place.organization()
    customer = place.twin.state.find("customer", await place.customer_of(org))
    visa = attach(place.twin.state, customer["id"], "pm_card_visa")
    customer["invoice_settings"]["default_payment_method"] = visa["id"]
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=100, source=org), place.clock.now(), organization_id=org)
    await place.customers.set_automatic_top_up(org, below_cents=300, cents=2_000)
    place.twin.faults.add(FaultPlan(kind="drop_after_commit", method="POST", path="/v1/payment_intents"))
    with contextlib.suppress(StripeFailed):
        await place.top_ups.round()
    mastercard = attach(place.twin.state, customer["id"], "pm_card_mastercard")
    customer["invoice_settings"]["default_payment_method"] = mastercard["id"]
    with contextlib.suppress(StripeFailed):
        await place.top_ups.round()
    await place.hear()
    intents = [one for one in place.twin.state.tables["payment_intent"].values() if one["amount"] == 2_000]
    assert [one["status"] for one in intents] == ["succeeded"]
    assert await place.rows("SELECT state FROM top_ups") == [("paid",)]
    assert await place.rows("SELECT kind FROM emails") == []


async def test_late_usage_that_was_just_planned_is_not_stuck(place: BillingPlace) -> None:
    org = await place.subscriber()
    late = place.clock.now() + timedelta(minutes=5)
    place.pass_time(days=1)
    await place.hear()
    await place.export()
    await place.use(org, DOLLAR, late)
    place.pass_time(hours=1, minutes=5)
    exporter = place.exporter
    async with place.database.transaction() as session:
        claimed = await claim(session, exporter._worker, place.clock.now(), limit=64)
    batches = await exporter._prepared(claimed)
    async with place.database.transaction() as session:
        assert (await agreement.reconciliation(session, place.clock.now())).agrees
    # Stripe throttles once: it is put back as new.
    async with place.database.transaction() as session:
        await record(
            session, exporter._worker, batches[0], SendResult(outcomes={}, failure="throttled"), place.clock.now()
        )
    async with place.database.transaction() as session:
        assert (await agreement.reconciliation(session, place.clock.now())).agrees


async def _add(place: BillingPlace, org: OrganizationId, source: str) -> None:
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=100, source=source), place.clock.now(), organization_id=org)


async def test_an_account_is_locked_before_the_budgets_by_all(place: BillingPlace) -> None:
    """Top-ups, subscriptions and rounds for one organization, all at once."""
    for _ in range(6):
        org = await place.organization()
        async with place.database.transaction() as session:
            await prepaid.add_credit(session, Credit(cents=500, source=org), place.clock.now(), organization_id=org)
        checkout = await place.customers.subscribe(org, "pro", PAGES)
        place.twin.complete_checkout(checkout.id)
        await place.use(org, DOLLAR, place.clock.now() + timedelta(minutes=1))
        place.pass_time(hours=2)

        results = await asyncio.gather(
            *(_add(place, org, f"{org}{one}") for one in range(4)),
            place.applier.look_at_customers(org),
            place.applier.look_at_customers(org),
            place.export(),
            place.export(),
            place.reconciler.round(),
            return_exceptions=True,
        )
        assert not [one for one in results if isinstance(one, BaseException)], results
        async with place.database.transaction() as session:
            assert not await prepaid.has_gate(session, organization_id=org)


async def test_who_has_paid_is_offered_no_second_page(place: BillingPlace) -> None:
    """The event is on its way."""
    org = await place.organization()
    first = await place.customers.subscribe(org, "pro", PAGES)
    assert place.twin.complete_checkout(first.id)
    place.pass_time(seconds=3)
    with pytest.raises(AlreadySubscribed):
        await place.customers.subscribe(org, "pro", PAGES)


async def test_two_pages_asked_for_at_once_are_not_both_open(place: BillingPlace) -> None:
    org = await place.organization()
    await place.customers.subscribe(org, "pro", PAGES)
    other = ReturnPages(success_url="https://example.com/other", cancel_url="https://example.com/no")
    await asyncio.gather(place.customers.subscribe(org, "pro", PAGES), place.customers.subscribe(org, "pro", other))
    pages = [one for one in place.twin.state.tables["checkout.session"].values() if one["status"] == "open"]
    assert len(pages) == 1


async def test_a_plan_given_while_a_subscription_begins_locks_nobody_out(place: BillingPlace) -> None:
    org = await place.organization()
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=500, source=org), place.clock.now(), organization_id=org)
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)

    async def give() -> None:
        async with place.database.transaction() as session:
            await tenants.set_plan(session, "enterprise", organization_id=org)

    async with place.database.transaction() as session:
        # Another organization's change, such as a new key: both wait for the lock of key changes.
        await record_change(session, None, organization_id=org)
        beginning = asyncio.create_task(place.applier.look_at_customers(org))
        await place.held_up(1)
        giving = asyncio.create_task(give())
        await place.held_up(2)
    await asyncio.gather(beginning, giving)
    assert await place.rows("SELECT plan FROM organizations WHERE id = :org", org=org) == [("enterprise",)]
