"""Reports that come too late, twice, or of what is nobody's to pay."""

from __future__ import annotations

import tomllib
from datetime import timedelta

import msgspec

from metering.billing import agreement
from metering.billing.errors import StripeRefused
from metering.billing.export import Exported
from metering.billing.outbox import claim, request_flush, resume
from metering.billing.plans import EXAMPLE, build_plans
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import PAGES, BillingPlace, billing_place

_DOLLAR = 1_000_000_000
_FLAT = (
    EXAMPLE
    + '\n[plans.flat]\ntitle = "Flat"\nprice_usd_per_month = 20\n[plans.flattop]\ntitle = "FlatTop"\nprice_usd_per_month = 200\n'
)


async def _in_flight(place: BillingPlace):
    exporter = place.exporter
    async with place.database.transaction() as session:
        claimed = await claim(session, exporter._worker, place.clock.now(), limit=64)
    return exporter, await exporter._prepared(claimed)


async def test_a_flush_asked_for_while_reports_are_on_their_way_is_not_put_off(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    await place.use(org, _DOLLAR)  # in the present hour
    exporter, batches = await _in_flight(place)
    async with place.database.transaction() as session:  # invoice.created is applied meanwhile
        await request_flush(session, place.clock.now(), organization_id=org)
    await exporter._recorded(batches, await exporter._sent(batches), Exported())
    ((is_flush_due, next_at),) = await place.rows("SELECT is_flush_due, next_at FROM meter_cursors")
    assert is_flush_due
    assert next_at <= place.clock.now()


async def test_a_repair_made_while_reports_are_on_their_way_is_not_put_off(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    await place.export()
    place.twin.settle()
    # Stripe lost it.
    for usages in place.twin.state.usage._events.values():
        usages.clear()
    place.pass_time(minutes=20)
    await place.reconciler.round()
    place.pass_time(minutes=51)
    exporter, batches = await _in_flight(place)
    assert batches
    assert (await place.reconciler.round()).repaired == 1
    await exporter._recorded(batches, await exporter._sent(batches), Exported())
    ((next_at,),) = await place.rows("SELECT next_at FROM meter_cursors")
    assert next_at <= place.clock.now()


async def test_a_plan_that_includes_usage_bills_none(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("pro")
    place.pass_time(hours=5)
    await place.customers.change_plan(org, "flattop")
    await place.export()
    place.pass_time(hours=1)
    await place.use(org, 5 * _DOLLAR)
    place.pass_time(hours=3)
    await place.export()
    assert await place.stripe_total(org) == 0


async def test_what_was_included_is_not_billed_after_an_upgrade(place: BillingPlace) -> None:
    place.plans = build_plans(tomllib.loads(_FLAT))
    await place.synchronise()
    org = await place.subscriber("flat")
    place.pass_time(hours=5)
    await place.use(org, 5 * _DOLLAR)
    place.pass_time(days=5)
    await place.export()
    await place.customers.change_plan(org, "pro")
    await place.export()
    place.pass_time(hours=3)
    await place.export()
    for _ in range(30):
        place.pass_time(days=1)
        await place.hear()
        await place.export()
    assert await place.stripe_total(org) == 0


async def test_a_late_correction_of_a_cut_hour_does_not_bill_what_was_before_the_subscription(
    place: BillingPlace,
) -> None:
    org = await place.organization()
    await place.use(org, 5 * _DOLLAR, place.clock.now() - timedelta(minutes=10))  # free
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=10))
    late = place.clock.now() + timedelta(minutes=11)
    place.pass_time(hours=2)
    await place.export()
    assert await place.stripe_total(org) == 1_000_000
    place.pass_time(days=8)
    # metering/worker.py keep_house
    await place.rows(
        "DELETE FROM spend_windows WHERE seconds = 60 AND starts_at < CAST(:at AS timestamptz) RETURNING 1",
        at=place.clock.now() - timedelta(days=7),
    )
    await place.use(org, 1_000, late)  # a call is settled late, or corrected
    place.pass_time(days=1)
    await place.export()
    assert await place.stripe_total(org) == 1_000_001


async def test_half_forgotten_minutes_of_a_cut_hour_bill_nothing_anew(place: BillingPlace) -> None:
    org = await place.organization()
    await place.use(org, 5 * _DOLLAR, place.clock.now() - timedelta(minutes=10))  # free
    checkout = await place.customers.subscribe(org, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    subscribed = place.clock.now()
    await place.use(org, _DOLLAR, subscribed + timedelta(minutes=10))
    place.pass_time(hours=2)
    await place.export()
    place.pass_time(days=8)
    # The hourly housekeeping of metering/worker.py deletes to the second, not to the hour: here up to the boundary.
    await place.rows(
        "DELETE FROM spend_windows WHERE seconds = 60 AND starts_at < CAST(:at AS timestamptz) RETURNING 1",
        at=subscribed,
    )
    await place.export()
    assert await place.stripe_total(org) == 1_000_000


async def test_what_cannot_be_collected_is_told(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    late = place.clock.now() + timedelta(minutes=5)
    place.pass_time(hours=2)
    await place.export()
    await place.customers.cancel(org, at_once=True)
    await place.export()
    for _ in range(6):
        place.pass_time(hours=1)
        await place.hear()
        await place.export()
    assert await place.rows("SELECT 1 FROM billing_periods WHERE is_closed")
    await place.use(org, 7 * _DOLLAR, late)
    for _ in range(3):
        place.pass_time(hours=12)
        await place.export()
    assert await place.stripe_total(org) == 1_000_000
    async with place.database.transaction() as session:
        assert not (await agreement.reconciliation(session, place.clock.now())).agrees


async def test_the_stream_does_not_send_what_stood_still_for_a_day(books, stores) -> None:
    async with billing_place(books, stores.pepper, stream_above=0) as place:
        org = await place.subscriber()
        await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
        place.pass_time(hours=2)
        slow, batches = await _in_flight(place)  # and its machine is suspended
        place.pass_time(minutes=5)
        await place.export()  # by another worker, whose reports are taken
        assert await place.stripe_total(org) == 1_000_000
        place.pass_time(hours=26)
        await slow._recorded(batches, await slow._streamed(batches), Exported())
        assert await place.stripe_total(org) == 1_000_000


async def test_a_report_of_unknown_outcome_that_is_refused_later_is_not_sent_again_after_a_day(
    place: BillingPlace, monkeypatch
) -> None:
    org = await place.subscriber()
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    place.twin.faults.add(FaultPlan(kind="drop_after_commit", method="POST", path="/v1/billing/meter_events"))
    await place.export()  # Stripe took it, we do not know
    place.pass_time(minutes=10)

    async def refused(_: object) -> None:
        raise StripeRefused("archived", code="archived_meter", param=None, status=400)

    with monkeypatch.context() as patched:
        patched.setattr(place.api, "send_meter_event", refused)
        await place.export()
    assert await place.rows("SELECT parked_for FROM meter_cursors") == [("archived_meter",)]
    place.pass_time(hours=26)
    async with place.database.transaction() as session:
        await resume(session, place.clock.now(), organization_id=org)
    await place.export()
    assert await place.stripe_total(org) == 1_000_000


async def test_more_than_a_hundred_windows_are_all_reported_at_once(place: BillingPlace) -> None:
    org = await place.subscriber()
    start = place.clock.now() + timedelta(minutes=1)
    for hour in range(150):
        await place.use(org, 500 if hour in (3, 50) else 2_000, start + timedelta(hours=hour))
    place.pass_time(hours=151)
    await place.export()
    assert await place.stripe_total(org) == await place.ledger_total(org) // 1_000


async def _late_settled(place: BillingPlace, minutes: int, hear_every: int = 1) -> tuple[int, int]:
    """A call begins before the period ends and is settled minutes after; what is billed, and what was used."""
    org = await place.subscriber()
    ((ends_at,),) = await place.rows("SELECT ends_at FROM billing_periods")
    place.pass_time(seconds=(ends_at - timedelta(hours=3) - place.clock.now()).total_seconds())
    await place.use(org, _DOLLAR)
    await place.export()
    place.pass_time(seconds=(ends_at - place.clock.now()).total_seconds())
    for minute in range(180):
        place.pass_time(minutes=1)
        if minute == minutes:
            await place.use(org, 3 * _DOLLAR, ends_at - timedelta(minutes=5))
        if minute % hear_every == 5 % hear_every:
            await place.hear()
        await place.export()
        if minute % 10 == 0:
            await place.reconciler.round(is_doubt_only=True)
    for _ in range(33):
        place.pass_time(days=1)
        await place.hear()
        await place.export()
    rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
    return sum(int(row[0]) for row in rows), await place.ledger_total(org) // 1_000


async def test_usage_settled_within_the_draft_is_invoiced(place: BillingPlace) -> None:
    """The period ends at the beginning of an hour."""
    place.pass_time(minutes=39, seconds=40)  # 13:00:10
    billed, used = await _late_settled(place, 10)
    assert billed == used


async def test_usage_settled_within_the_draft_is_invoiced_without_webhooks(place: BillingPlace) -> None:
    """Events are listed every ten minutes, as docs/billing.md says; the period ends at the beginning of an hour."""
    place.pass_time(minutes=39, seconds=40)  # 13:00:10
    billed, used = await _late_settled(place, 10, hear_every=10)
    assert billed == used


async def test_usage_settled_within_the_draft_is_invoiced_mid_hour(place: BillingPlace) -> None:
    billed, used = await _late_settled(place, 10)
    assert billed == used


async def test_usage_settled_about_when_the_invoice_is_final(place: BillingPlace) -> None:
    """Told with the old time after Stripe's finalisation and before we know of it."""
    org = await place.subscriber()
    ((ends_at,),) = await place.rows("SELECT ends_at FROM billing_periods")
    place.pass_time(seconds=(ends_at - timedelta(hours=3) - place.clock.now()).total_seconds())
    await place.use(org, _DOLLAR)
    await place.export()
    place.pass_time(seconds=(ends_at - place.clock.now()).total_seconds() + 10)
    await place.hear()
    await place.export()
    place.pass_time(minutes=62)  # final at Stripe by now; the event comes a little later
    await place.use(org, 3 * _DOLLAR, ends_at - timedelta(minutes=5))
    await place.rows("UPDATE meter_cursors SET next_at = 'epoch' RETURNING 1")  # its turn happens to be now
    await place.export()
    await place.hear()
    place.pass_time(minutes=11)
    await place.reconciler.round(is_doubt_only=True)
    for _ in range(33):
        place.pass_time(days=1)
        await place.hear()
        await place.reconciler.round(is_doubt_only=True)
        await place.export()
    rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
    assert sum(int(row[0]) for row in rows) == await place.ledger_total(org) // 1_000


async def test_a_period_in_which_no_worker_ran_is_billed_in_the_end(place: BillingPlace) -> None:
    org = await place.subscriber()
    start = place.clock.now()
    await place.use(org, _DOLLAR, start + timedelta(days=10))
    await place.use(org, 2 * _DOLLAR, start + timedelta(days=40))
    place.pass_time(days=66)
    for _ in range(35):
        await place.hear()
        await place.applier.look_at_customers(with_invoices=True)
        await place.export()
        place.pass_time(days=1)
    rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
    assert sum(int(row[0]) for row in rows) == 3_000_000


async def test_what_is_unknown_of_a_final_invoice_is_settled_some_day(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    place.twin.faults.add(FaultPlan(kind="error_before_commit", method="POST", path="/v1/billing/meter_events"))
    await place.export()
    place.pass_time(hours=25)
    await place.export()
    assert await place.rows("SELECT state FROM meter_reports") == [("unknown",)]
    await place.rows("UPDATE billing_periods SET is_closed = true RETURNING 1")  # the invoice was final by then
    for _ in range(5):
        await place.reconciler.round()
        place.pass_time(minutes=11)
    assert await place.rows("SELECT state FROM meter_checks") == [("alert",)]
    assert await place.rows("SELECT state FROM meter_reports") != [("unknown",)]


async def test_usage_within_the_grace_of_a_trial_converted_is_billed(place: BillingPlace) -> None:
    """What is carried from a final period into a free trial is never paid."""
    place.plans = build_plans(
        tomllib.loads(
            EXAMPLE + '\n[plans.try]\ntitle = "Try"\nprice_usd_per_month = 20\nbills_usage = true\ntrial_days = 7\n'
        )
    )
    await place.synchronise()
    org = await place.subscriber("pro")
    late = place.clock.now() + timedelta(minutes=5)
    place.pass_time(hours=2)
    await place.customers.cancel(org, at_once=True)
    for _ in range(6):
        place.pass_time(hours=1)
        await place.hear()
        await place.export()
    checkout = await place.customers.subscribe(org, "try", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    await place.use(org, 7 * _DOLLAR, late)
    for _ in range(45):
        place.pass_time(days=1)
        await place.hear()
        await place.export()
    rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
    assert sum(int(row[0]) for row in rows) == 7_000_000


async def test_one_report_that_is_refused_holds_up_no_others_of_its_stream(books, stores) -> None:
    async with billing_place(books, stores.pepper, stream_above=0) as place:
        good, wrong = await place.subscriber(), await place.subscriber()
        for org in (good, wrong):
            await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=1))
        place.pass_time(hours=2)
        worker, batches = await _in_flight(place)
        for index, batch in enumerate(batches):
            if batch.organization_id == wrong:
                ((report_id, event),) = batch.reports
                bad = (report_id, msgspec.structs.replace(event, identifier="x" * 101))
                batches[index] = msgspec.structs.replace(batch, reports=(bad,))
        await worker._recorded(batches, await worker._streamed(batches), Exported())
        assert (await place.stripe_total(good), await place.stripe_total(wrong)) == (1_000_000, 0)
        parked = await place.rows("SELECT organization_id FROM meter_cursors WHERE parked_for IS NOT NULL")
        assert parked == [(wrong,)]
