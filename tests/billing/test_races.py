"""READ COMMITTED, and the order of locks."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from core.ids import OrganizationId
from metering.billing import prepaid
from metering.billing.prepaid import Credit
from metering.billing.projection import keep_subscription
from tests.harness.billing import PAGES, BillingPlace

_DOLLAR = 1_000_000_000


async def _keep(place: BillingPlace, session, subscription) -> None:
    read_at = await place.applier._read_at()
    await keep_subscription(session, subscription, place.plans, read_at=read_at, now=place.clock.now())


async def test_one_ends_while_another_begins(place: BillingPlace) -> None:
    """Two workers apply the two events at once: the organization has what it pays for, and no gate."""
    org = await place.subscriber()
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=500, source="a"), place.clock.now(), organization_id=org)
    old = await place.subscription_of(org)
    new = await place.second_subscription(org)
    await place.api.cancel_subscription(old)
    ended, begun = await place.api.get_subscription(old), await place.api.get_subscription(new)
    assert (ended.status, begun.status) == ("canceled", "active")
    async with place.database.transaction() as one:
        await _keep(place, one, begun)
        read_at = await place.applier._read_at()
        other = asyncio.create_task(place.applier.keep(ended, read_at))
        await place.held_up()
    await other
    # An hour later everything is read again.
    place.pass_time(hours=1)
    gate = "SELECT limit_nano_usd FROM budgets WHERE organization_id = :org AND scope = 'credit'"
    plan = await place.rows("SELECT plan FROM organizations WHERE id = :org", org=org)
    await place.applier.look_at_customers()
    assert await place.rows(gate, org=org) == []
    assert plan == [("pro",)]


async def test_an_old_subscription_that_is_read_again_takes_no_new_plan_away(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.customers.cancel(org, at_once=True)
    old = await place.subscription_of(org)
    page = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(page.id)
    new = next(one for one in place.twin.state.tables["subscription"] if one != old)
    look = place.applier.look_at_subscription
    await asyncio.gather(look(old), look(new), look(old), look(new), look(old))
    assert await place.rows("SELECT plan FROM organizations WHERE id = :org", org=org) == [("pro",)]


async def test_subscriptions_that_begin_and_end_and_top_ups_do_not_deadlock(place: BillingPlace) -> None:
    subscribers = [await place.subscriber() for _ in range(3)]
    for org in subscribers:
        async with place.database.transaction() as session:
            await prepaid.add_credit(session, Credit(cents=500, source=org), place.clock.now(), organization_id=org)

    async def top_up(org: OrganizationId, number: int) -> None:
        async with place.database.transaction() as session:
            credit = Credit(cents=500, source=f"{org}:{number}")
            await prepaid.add_credit(session, credit, place.clock.now(), organization_id=org)

    acts = [place.customers.cancel(org, at_once=True) for org in subscribers]
    await asyncio.gather(*acts, *(top_up(org, number) for org in subscribers for number in range(4)))
    for org in subscribers:
        async with place.database.transaction() as session:
            assert await prepaid.has_gate(session, organization_id=org)
            assert await prepaid.left(session, place.clock.now(), organization_id=org) == 25 * 1_000_000_000


async def test_a_gate_holds_after_credit_is_used_by_late_usage_of_a_final_period(place: BillingPlace) -> None:
    """What nobody can be charged for any more takes no credit either."""
    org = await place.subscriber()
    async with place.database.transaction() as session:
        await prepaid.add_credit(session, Credit(cents=500, source="a"), place.clock.now(), organization_id=org)
    late = place.clock.now() + timedelta(minutes=5)
    place.pass_time(hours=2)
    await place.customers.cancel(org, at_once=True)
    for _ in range(6):
        place.pass_time(hours=1)
        await place.hear()
        await place.export()
    await place.rows("UPDATE billing_periods SET is_closed = true RETURNING 1")
    await place.use(org, 3 * _DOLLAR, late)
    for _ in range(3):
        place.pass_time(days=1)
        await place.export()
    async with place.database.transaction() as session:
        left = await prepaid.left(session, place.clock.now(), organization_id=org)
        wallet_balance = await prepaid.wallet.balance(session, organization_id=org)
    assert left == wallet_balance
