"""The budget that credit comes to lets be spent what is left, whatever was corrected, settled late or ended."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from metering.billing import views
from metering.billing.outbox import bring_forward
from tests.harness.billing import DOLLAR, PAGES, BillingPlace


async def _room(place: BillingPlace, org: str) -> int | None:
    """What calls may still spend."""
    rows = await place.rows(
        "SELECT limit_nano_usd FROM budgets WHERE organization_id = :org AND scope = 'credit'", org=org
    )
    return int(rows[0][0]) - await place.ledger_total(org) if rows else None


async def test_credit_a_subscription_and_usage_in_one_hour(place: BillingPlace) -> None:
    org = await place.organization()
    await place.use(org, 2 * DOLLAR, place.clock.now() - timedelta(minutes=5))
    await place.add_credit(org, 1_000, "a")
    place.pass_time(minutes=2)
    await place.use(org, 3 * DOLLAR)
    assert await _room(place, org) == await place.credit_left(org) == 7 * DOLLAR
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    assert await _room(place, org) is None
    place.pass_time(minutes=5)
    await place.use(org, 1 * DOLLAR)
    place.pass_time(minutes=5)
    await place.customers.cancel(org, at_once=True)
    await place.hear()
    assert await _room(place, org) == await place.credit_left(org) == 6 * DOLLAR
    place.pass_time(minutes=5)
    await place.use(org, 1 * DOLLAR)
    assert await _room(place, org) == await place.credit_left(org) == 5 * DOLLAR
    await place.pass_hours(5)
    assert await _room(place, org) == await place.credit_left(org) == 5 * DOLLAR
    await place.add_credit(org, -200, "b")
    assert await _room(place, org) == await place.credit_left(org) == 3 * DOLLAR
    await place.add_credit(org, -500, "c")
    assert await place.credit_left(org) == -2 * DOLLAR
    assert (await _room(place, org) or 0) <= 0
    await place.add_credit(org, 500, "d")
    assert await _room(place, org) == await place.credit_left(org) == 3 * DOLLAR


async def test_a_correction_of_what_an_invoice_paid_lets_no_credit_be_spent_twice(place: BillingPlace) -> None:
    org = await place.subscriber()
    place.pass_time(minutes=5)
    await place.use(org, 8 * DOLLAR)
    paid = place.clock.now()
    await place.pass_hours(2)
    await place.customers.cancel(org, at_once=True)
    await place.pass_hours(5)
    await place.add_credit(org, 1_000, "a")
    assert await _room(place, org) == await place.credit_left(org) == 10 * DOLLAR
    await place.use(org, -5 * DOLLAR, paid)  # corrected
    await place.pass_hours(3)
    assert await _room(place, org) == await place.credit_left(org)


async def test_a_call_settled_late_takes_no_credit_that_is_there(place: BillingPlace) -> None:
    org = await place.subscriber()
    place.pass_time(minutes=5)
    await place.use(org, 8 * DOLLAR)
    paid = place.clock.now()
    await place.pass_hours(2)
    await place.customers.cancel(org, at_once=True)
    await place.pass_hours(5)
    await place.add_credit(org, 1_000, "a")
    await place.use(org, 2 * DOLLAR, paid)
    await place.pass_hours(3)
    assert await _room(place, org) == await place.credit_left(org)


async def test_a_correction_of_before_the_credit_gives_no_credit(place: BillingPlace) -> None:
    org = await place.organization()
    free = place.clock.now()
    await place.use(org, 8 * DOLLAR, free)
    await place.pass_hours(2)
    await place.add_credit(org, 1_000, "a")
    await place.use(org, -5 * DOLLAR, free)
    await place.pass_hours(3)
    assert await _room(place, org) == await place.credit_left(org)


async def test_a_flush_of_all_makes_no_loop(place: BillingPlace) -> None:
    """Of an organization whose credit or periods are not there."""
    await place.subscriber()
    await place.rows("DELETE FROM billing_periods RETURNING 1")
    async with place.database.transaction() as session:
        await bring_forward(session, place.clock.now(), is_flush=True)
    async with asyncio.timeout(5):
        await place.export()


@pytest.mark.parametrize("rounds", range(4))
async def test_the_room_is_what_is_left_while_everything_happens_at_once(place: BillingPlace, rounds: int) -> None:
    org = await place.organization()
    await place.add_credit(org, 5_000, "a")
    for number in range(4):
        checkout = await place.customers.subscribe(org, "pro", PAGES)
        place.twin.complete_checkout(checkout.id)
        place.pass_time(minutes=3)
        await place.use(org, DOLLAR)
        await asyncio.gather(place.hear(), place.add_credit(org, 100, f"b{number}"), place.export())
        await place.hear()
        assert await _room(place, org) is None
        place.pass_time(minutes=3)
        await place.use(org, DOLLAR)
        ((subscription_id,),) = await place.rows("SELECT id FROM subscriptions WHERE ended_at IS NULL")
        await place.api.cancel_subscription(subscription_id)
        place.pass_time(minutes=3)
        await place.use(org, DOLLAR)
        await asyncio.gather(place.hear(), place.add_credit(org, 100, f"c{number}"), place.export())
        await place.hear()
        assert await _room(place, org) == await place.credit_left(org)
        place.pass_time(minutes=13)
    await place.pass_hours(4)
    assert await _room(place, org) == await place.credit_left(org) == (50 + 8 - 12) * DOLLAR


async def test_what_a_subscription_used_before_its_end_takes_no_more_than_the_credit(place: BillingPlace) -> None:
    org = await place.subscriber()
    place.pass_time(minutes=5)
    await place.use(org, 8 * DOLLAR)
    await place.pass_hours(3)
    await place.add_credit(org, 500, "a")
    ((subscription_id,),) = await place.rows("SELECT id FROM subscriptions")
    await place.use(org, 7 * DOLLAR)
    place.pass_time(minutes=4)
    await place.api.cancel_subscription(subscription_id)  # in the dashboard
    await place.hear()
    await place.export()
    await place.pass_hours(5)
    assert await place.credit_left(org) == 0
    assert (await _room(place, org) or 0) <= 0
    await place.add_credit(org, 500, "b")
    assert await _room(place, org) == await place.credit_left(org) == 5 * DOLLAR


async def test_credit_pays_what_came_too_late_for_the_last_invoice(place: BillingPlace) -> None:
    """A worker did not run for two hours around the end of a subscription; there is credit for all of it."""
    org = await place.organization()
    await place.add_credit(org, 5_000, "a")
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    place.pass_time(minutes=5)
    await place.use(org, 3 * DOLLAR)
    place.pass_time(minutes=5)
    ((subscription_id,),) = await place.rows("SELECT id FROM subscriptions")
    await place.api.cancel_subscription(subscription_id)
    place.pass_time(hours=2)
    await place.hear()
    await place.pass_hours(3)
    assert await place.rows("SELECT amount FROM uncollected_usage") == []
    assert await _room(place, org) == await place.credit_left(org) == 47 * DOLLAR


async def test_the_present_charge_leaves_out_what_was_before_the_period_after_a_week_too(place: BillingPlace) -> None:
    org = await place.organization()
    await place.use(org, 5 * DOLLAR, place.clock.now() - timedelta(minutes=10))
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    await place.use(org, DOLLAR, place.clock.now() + timedelta(minutes=10))
    place.pass_time(days=1)
    await place.export()
    place.pass_time(days=7)
    await place.rows(
        "DELETE FROM spend_windows WHERE seconds = 60 AND starts_at < CAST(:at AS timestamptz) RETURNING 1",
        at=place.clock.now() - timedelta(days=7),
    )
    async with place.database.transaction() as session:
        found = await views.present_charge(session, place.clock.now(), organization_id=org)
    assert float(found.charge_usd) == 1.0
