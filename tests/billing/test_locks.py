"""What takes the same rows takes them in the same order: a refusal is written down while late usage is moved."""

from __future__ import annotations

import asyncio

from sqlalchemy import text

from metering.billing.outbox import SendResult, claim, record
from tests.billing.test_moving import late_usage, move
from tests.harness.billing import DOLLAR, BillingPlace


async def test_a_refusal_while_late_usage_is_moved_locks_nobody_out(place: BillingPlace) -> None:
    org = await late_usage(place)
    # On its way: a report of the window that is moved, which Stripe refuses as too old.
    await place.use(org, DOLLAR)
    place.pass_time(hours=2)
    exporter = place.exporter
    async with place.database.transaction() as session:
        claimed = await claim(session, exporter._worker, place.clock.now(), limit=64)
    (batch,) = await exporter._prepared(claimed)
    report_id = batch.reports[0][0]
    ((moved,),) = await place.rows(
        "SELECT max(r.window_starts_at) FROM meter_reports r JOIN billing_periods p ON p.is_closed"
        " WHERE r.state = 'acked' AND r.event_at < p.ends_at"
    )
    await place.rows(
        "UPDATE meter_reports SET event_at = event_at - interval '35 days', window_starts_at = :window, revision = 99"
        " WHERE id = :id RETURNING 1",
        id=report_id,
        window=moved,
    )
    told = SendResult(outcomes={report_id: "refused"}, refusal=(report_id, "timestamp_too_far_in_past"))

    async def refuse() -> None:
        async with place.database.transaction() as session:
            await record(session, exporter._worker, batch, told, place.clock.now())

    async with place.database.transaction() as session:
        await session.execute(text("SELECT 1 FROM meter_windows WHERE starts_at = :at FOR UPDATE"), {"at": moved})
        moving = asyncio.create_task(move(place))
        await place.held_up(1)
        refusing = asyncio.create_task(refuse())
        await place.held_up(2)
    await asyncio.gather(moving, refusing)
    assert await place.rows("SELECT state FROM meter_reports WHERE id = :id", id=report_id) == [("refused",)]
