"""Usage that came too late for an invoice is moved to the next one: once, and with all that was repaired."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from core.ids import OrganizationId
from metering.billing import agreement
from metering.billing.export import Exported
from metering.billing.moving import move_unbilled, short_invoices
from metering.billing.outbox import claim
from metering.billing.ownership import lock_account
from tests.harness.billing import DOLLAR, BillingPlace


async def late_usage(place: BillingPlace) -> OrganizationId:
    """A final invoice that has not billed three dollars of what was reported for it."""
    org = await place.subscriber()
    ((ends_at,),) = await place.rows("SELECT ends_at FROM billing_periods")
    place.pass_time(seconds=(ends_at - timedelta(hours=3) - place.clock.now()).total_seconds())
    await place.use(org, 10 * DOLLAR)
    await place.export()
    place.pass_time(seconds=(ends_at - place.clock.now()).total_seconds() + 10)
    await place.hear()
    await place.export()
    place.pass_time(minutes=62)
    await place.use(org, 3 * DOLLAR, ends_at - timedelta(minutes=5))
    await place.rows("UPDATE meter_cursors SET next_at = 'epoch' RETURNING 1")
    await place.export()
    await place.hear()
    place.pass_time(minutes=11)
    return org


async def _go_on(place: BillingPlace) -> None:
    for _ in range(33):
        place.pass_time(days=1)
        await place.hear()
        await place.reconciler.round(is_doubt_only=True)
        await place.export()


async def _billed(place: BillingPlace) -> int:
    rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
    return sum(int(row[0]) for row in rows)


async def move(place: BillingPlace) -> int:
    async with place.database.transaction() as session:
        short = await short_invoices(session, place.clock.now())
    moved = 0
    for organization_id, invoice_id in short:
        async with place.database.transaction() as session:
            moved += await move_unbilled(session, invoice_id, place.clock.now(), organization_id=organization_id)
    return moved


async def test_two_rounds_at_once_move_late_usage_once(place: BillingPlace) -> None:
    """The hourly round and the one of doubts, in two workers or in one: both see that something is missing."""
    org = await late_usage(place)
    async with place.database.transaction() as session:
        await lock_account(session, organization_id=org)
        rounds = [asyncio.create_task(move(place)) for _ in range(2)]
        await place.held_up(2)
    assert sorted(await asyncio.gather(*rounds)) == [0, 1]
    assert await place.rows("SELECT value FROM meter_reports WHERE kind = 'moved'") == [(-3_000_000,)]
    await _go_on(place)
    assert await _billed(place) == await place.ledger_total(org) // 1_000


async def test_many_rounds_at_once_bill_late_usage_once(place: BillingPlace) -> None:
    org = await late_usage(place)
    await asyncio.gather(*(place.reconciler.round(is_doubt_only=True) for _ in range(6)))
    await _go_on(place)
    assert await _billed(place) == await place.ledger_total(org) // 1_000


async def test_a_repair_that_comes_late_is_moved_too(place: BillingPlace) -> None:
    """The hour is cut, so that the repair's hour is no window."""
    org = await place.subscriber()  # 12:20:30
    ((ends_at,),) = await place.rows("SELECT ends_at FROM billing_periods")
    await place.use(org, 5 * DOLLAR, place.clock.now() + timedelta(minutes=5))  # window 12:20
    place.pass_time(hours=2)
    await place.export()
    place.pass_time(seconds=(ends_at - timedelta(minutes=40) - place.clock.now()).total_seconds())
    await place.export()
    for usages in place.twin.state.usage._events.values():
        usages.clear()  # Stripe lost it
    await place.reconciler.round(since=ends_at - timedelta(days=32))
    place.pass_time(minutes=11)
    found = await place.reconciler.round(since=ends_at - timedelta(days=32))
    assert found.repaired == 1
    place.pass_time(seconds=(ends_at - place.clock.now()).total_seconds() + 3_590)
    exporter = place.exporter
    async with place.database.transaction() as session:
        claimed = await claim(session, exporter._worker, place.clock.now(), limit=64)
    batches = await exporter._prepared(claimed)
    assert [len(one.reports) for one in batches] == [1]
    place.pass_time(seconds=30)  # final meanwhile
    await exporter._recorded(batches, await exporter._sent(batches), Exported())
    await place.hear()
    assert await place.rows("SELECT 1 FROM billing_periods WHERE is_closed")
    place.pass_time(minutes=11)
    await place.reconciler.round(is_doubt_only=True)
    await _go_on(place)
    assert await _billed(place) == await place.ledger_total(org) // 1_000


async def test_status_is_calm_while_late_usage_is_moved(place: BillingPlace) -> None:
    await late_usage(place)
    await place.reconciler.round(is_doubt_only=True)
    async with place.database.transaction() as session:
        found = await agreement.reconciliation(session, place.clock.now())
    assert not found.invoices
    assert not found.is_stuck


async def test_a_metered_price_that_was_exchanged_is_billed_once(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.use(org, 4 * DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(days=10)
    await place.export()
    ((subscription_id, item_id),) = await place.rows("SELECT id, usage_item_id FROM subscriptions")
    item = next(
        one for one in place.twin.state.tables["subscription"][subscription_id]["items"]["data"] if one["id"] == item_id
    )
    old = item["price"]
    price = await place.api._client.v1.prices.create_async(
        {
            "currency": "usd",
            "product": old["product"],
            "unit_amount_decimal": "0.0002",
            "recurring": {"interval": "month", "usage_type": "metered", "meter": old["recurring"]["meter"]},
        }
    )
    await place.api.update_subscription(
        subscription_id, {"items": [{"id": item_id, "price": price.id}], "proration_behavior": "create_prorations"}
    )
    await place.hear()
    place.pass_time(hours=2)
    await place.use(org, DOLLAR, place.clock.now() - timedelta(minutes=30))
    for _ in range(65):
        place.pass_time(days=1)
        await place.hear()
        await place.export()
        await place.reconciler.round()
        await place.reconciler.round(is_doubt_only=True)
    lines = [
        line
        for invoice in place.twin.state.tables["invoice"].values()
        for line in invoice["lines"]["data"]
        if line.get("_usage_final")
    ]
    assert sum(line["quantity"] for line in lines) == await place.ledger_total(org) // 1_000
