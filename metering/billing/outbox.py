"""The outbox's rows: who may send for whom, what is to be sent, and what came of it. No network here."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Literal, NamedTuple

import msgspec
from sqlalchemy import exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from metering.billing.meters import METERS, USAGE
from metering.billing.ownership import lock_account
from metering.billing.planning import plan_reports
from metering.billing.stripe_objects import MeterEvent
from metering.billing.tables import (
    OPEN_STATES,
    BillingPeriodRow,
    InvoiceRow,
    MeterCursorRow,
    MeterReportRow,
    MeterWindowRow,
)
from metering.billing.windows import PAST_MAX, until_next_hour

RESEND_MAX: Final = timedelta(hours=23)
"""Stripe knows an identifier for 24 hours at least: an hour is left for clocks that differ and what is on its way."""
LEASE: Final = timedelta(minutes=2)
REPORTS_AT_ONCE: Final = 100
_BACK_OFF_MAX: Final = timedelta(minutes=5)
_SPREAD_SECONDS: Final = 180
_DRAFT_TURNS: Final = timedelta(minutes=3)
"""How often an organization has its turn while an invoice of its waits to be final."""
_PAST_CODES: Final = frozenset({"timestamp_too_far_in_past", "meter_event_timestamp_too_far_in_past"})

Outcome = Literal["acked", "open", "not sent", "refused"]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """The reports of one organization and meter that are to be sent now, in order."""

    organization_id: OrganizationId
    meter: str
    reports: tuple[tuple[str, MeterEvent], ...]
    has_more: bool
    send_before: datetime
    """A process that stood still finds its lease another's, and its reports older than they may be."""
    next_at: datetime
    """When this turn was due: another time by its end is somebody's wish for a further one."""
    is_draft_open: bool
    """An invoice waits for late usage."""


class SendResult(msgspec.Struct, kw_only=True):
    """What came of a batch: by report what Stripe said, and why the rest waits."""

    outcomes: dict[str, Outcome] = {}
    refusal: tuple[str, str] | None = None
    """Which report was refused, and Stripe's code for why."""
    refusal_code: str | None = None
    failure: str | None = None
    is_stripes: bool = False
    """Whether the failure is all of Stripe's, and no other batch would fare better."""


class OpenWork(NamedTuple):
    """What keeps an organization's usage from being known at Stripe."""

    is_parked: bool
    """An operator has to look."""
    is_waiting: bool
    """Another worker is at it, or Stripe has not answered."""


async def claim(
    session: AsyncSession, worker: str, now: datetime, *, limit: int, only: OrganizationId | None = None
) -> list[tuple[OrganizationId, str]]:
    """Lease cursors that are due (of one organization) to *worker*; those of others stay theirs until a lease ends."""
    chosen = [] if only is None else [MeterCursorRow.organization_id == only]
    due = (
        select(MeterCursorRow.organization_id, MeterCursorRow.meter)
        .where(
            *chosen,
            MeterCursorRow.next_at <= now,
            MeterCursorRow.parked_for.is_(None),
            or_(MeterCursorRow.leased_until.is_(None), MeterCursorRow.leased_until < now),
        )
        .order_by(MeterCursorRow.next_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    rows = await session.execute(
        update(MeterCursorRow)
        .where(MeterCursorRow.organization_id == due.c.organization_id, MeterCursorRow.meter == due.c.meter)
        .values(leased_until=now + LEASE, leased_by=worker)
        .returning(MeterCursorRow.organization_id, MeterCursorRow.meter)
    )
    return [(OrganizationId(organization_id), meter) for organization_id, meter in rows]


async def count_due(session: AsyncSession, now: datetime, *, only: OrganizationId | None = None) -> int:
    """Return how many cursors (of one organization) wait for their turn."""
    statement = select(func.count()).where(MeterCursorRow.next_at <= now, MeterCursorRow.parked_for.is_(None))
    if only is not None:
        statement = statement.where(MeterCursorRow.organization_id == only)
    return await session.scalar(statement) or 0


async def prepare(
    session: AsyncSession, worker: str, now: datetime, *, meter: str, organization_id: OrganizationId
) -> Batch | None:
    """Plan what is not planned, mark what is to be sent as sent, and return it. None: the lease is another's now.

    What may be older at Stripe than it knows identifiers is not sent any more, and waits for `reconcile`.
    """
    account = await lock_account(session, organization_id=organization_id)
    cursor = await _held(session, worker, meter=meter, organization_id=organization_id)
    if cursor is None:
        return None
    cursor.leased_until = now + LEASE
    await _take_back_late(session, meter=meter, organization_id=organization_id)
    has_more = await plan_reports(session, cursor, now, limit=REPORTS_AT_ONCE)
    own = (MeterReportRow.organization_id == organization_id, MeterReportRow.meter == meter)
    await session.execute(
        update(MeterReportRow)
        .where(*own, MeterReportRow.state == "sent", MeterReportRow.first_sent_at <= now - RESEND_MAX)
        .values(state="unknown")
    )
    rows = list(
        await session.scalars(
            select(MeterReportRow)
            .where(*own, MeterReportRow.state.in_(OPEN_STATES))
            .order_by(MeterReportRow.window_starts_at, MeterReportRow.revision)
            .limit(REPORTS_AT_ONCE)
        )
    )
    customer_id = None if account is None else account.stripe_customer_id
    if customer_id is None:
        rows = []
    for row in rows:
        row.state, row.attempts = "sent", row.attempts + 1
        row.first_sent_at, row.last_sent_at = row.first_sent_at or now, now
    return Batch(
        organization_id=organization_id,
        meter=meter,
        reports=tuple((row.id, _event(row, customer_id or "")) for row in rows),
        has_more=has_more or len(rows) >= REPORTS_AT_ONCE,
        send_before=now + LEASE / 2,
        next_at=cursor.next_at,
        is_draft_open=await _is_draft_open(session, organization_id=organization_id),
    )


async def record(session: AsyncSession, worker: str, batch: Batch, result: SendResult, now: datetime) -> None:
    """Write down what came of a batch, and when the next turn is. What Stripe said counts, whoever has the lease."""
    by_outcome: dict[str, list[str]] = {}
    for report_id, _ in batch.reports:
        by_outcome.setdefault(result.outcomes.get(report_id, "not sent"), []).append(report_id)
    own = (MeterReportRow.organization_id == batch.organization_id, MeterReportRow.meter == batch.meter)
    reports = update(MeterReportRow).where(*own)
    await session.execute(
        reports.where(
            MeterReportRow.id.in_(by_outcome.get("acked", [])), MeterReportRow.state.in_((*OPEN_STATES, "unknown"))
        ).values(state="acked", acked_at=now)
    )
    await _put_back(session, by_outcome.get("not sent", []), own)
    cursor = await _held(session, worker, meter=batch.meter, organization_id=batch.organization_id)
    if result.refusal is not None:
        await _refuse(session, batch, result.refusal, cursor, now)
    if cursor is None:
        return
    cursor.leased_until = cursor.leased_by = None
    if result.failure is not None:
        cursor.failures += 1
        cursor.next_at = now + min(timedelta(seconds=2.0 ** min(cursor.failures, 16)), _BACK_OFF_MAX)
    else:
        cursor.failures = 0
        is_wanted = cursor.is_flush_due or cursor.next_at != batch.next_at
        if batch.has_more or result.refusal is not None or is_wanted:
            cursor.next_at = now
        else:
            pause = until_next_hour(now) + _spread(batch.organization_id)
            cursor.next_at = min(pause, now + _DRAFT_TURNS) if batch.is_draft_open else pause


async def _is_draft_open(session: AsyncSession, *, organization_id: OrganizationId) -> bool:
    found = await session.scalar(
        select(InvoiceRow.id)
        .where(InvoiceRow.organization_id == organization_id, InvoiceRow.status == "draft")
        .limit(1)
    )
    return found is not None


async def _take_back_late(session: AsyncSession, *, meter: str, organization_id: OrganizationId) -> None:
    """Take the usage of reports back that were never sent and whose invoice is final by now: it is planned anew."""
    closed = exists().where(
        BillingPeriodRow.organization_id == organization_id,
        BillingPeriodRow.is_closed,
        BillingPeriodRow.starts_at <= MeterReportRow.event_at,
        BillingPeriodRow.ends_at > MeterReportRow.event_at,
    )
    rows = await session.scalars(
        select(MeterReportRow).where(
            MeterReportRow.organization_id == organization_id,
            MeterReportRow.meter == meter,
            MeterReportRow.state == "new",
            # What takes usage out of such a period is meant for it.
            MeterReportRow.kind != "moved",
            closed,
        )
    )
    for row in rows:
        row.state, row.problem = "refused", "its invoice is final"
        if row.kind != "repair":
            await _take_back(session, row)


async def _take_back(session: AsyncSession, row: MeterReportRow) -> None:
    """Count a report's usage as not planned; what the wallet paid of it stays paid."""
    await session.execute(
        update(MeterWindowRow)
        .where(
            MeterWindowRow.organization_id == row.organization_id,
            MeterWindowRow.meter == row.meter,
            MeterWindowRow.starts_at == row.window_starts_at,
        )
        .values(planned=MeterWindowRow.planned - row.value * METERS[row.meter].per_unit)
    )


async def _put_back(session: AsyncSession, report_ids: Sequence[str], own: Sequence[object]) -> None:
    """Undo the mark of reports that were not sent after all: what was never sent cannot be unknown."""
    if report_ids:
        rows = await session.scalars(
            select(MeterReportRow).where(*own, MeterReportRow.id.in_(report_ids), MeterReportRow.state == "sent")  # type: ignore[arg-type]
        )
        for row in rows:
            row.attempts -= 1
            if not row.attempts:
                row.state, row.first_sent_at, row.last_sent_at = "new", None, None
    await session.flush()


async def _refuse(
    session: AsyncSession, batch: Batch, refusal: tuple[str, str], cursor: MeterCursorRow | None, now: datetime
) -> None:
    """Take a refused report's usage back into its window, to be planned anew; or stop, where that would not help."""
    report_id, code = refusal
    row = await session.scalar(
        select(MeterReportRow).where(
            MeterReportRow.organization_id == batch.organization_id, MeterReportRow.id == report_id
        )
    )
    if row is None:
        return
    row.problem = code
    if code in _PAST_CODES and now - row.event_at >= PAST_MAX and row.kind != "repair":
        row.state = "refused"
        await _take_back(session, row)
    else:
        if row.attempts <= 1:
            # Sent before, it may have arrived then: its day goes on.
            row.state, row.first_sent_at, row.last_sent_at = "new", None, None
        if cursor is not None:
            cursor.parked_for = code


async def _held(
    session: AsyncSession, worker: str, *, meter: str, organization_id: OrganizationId
) -> MeterCursorRow | None:
    """Return the cursor, locked, if *worker* has its lease."""
    return await session.scalar(
        select(MeterCursorRow)
        .where(
            MeterCursorRow.organization_id == organization_id,
            MeterCursorRow.meter == meter,
            MeterCursorRow.leased_by == worker,
        )
        .with_for_update()
    )


def _event(row: MeterReportRow, customer_id: str) -> MeterEvent:
    return MeterEvent(
        event_name=row.meter,
        customer_id=customer_id,
        identifier=row.identifier,
        value=row.value,
        occurred_at=row.event_at,
    )


def _spread(organization_id: str) -> timedelta:
    """Return a pause that keeps all organizations from coming at once: the same for one, whenever."""
    return timedelta(seconds=zlib.crc32(organization_id.encode()) % _SPREAD_SECONDS)


async def bring_forward(
    session: AsyncSession, now: datetime, *, is_flush: bool, only: OrganizationId | None = None
) -> None:
    """Make everything due now, or that of one organization; with *is_flush* the present hour's usage too."""
    statement = update(MeterCursorRow).values(next_at=func.least(MeterCursorRow.next_at, now))
    if only is not None:
        statement = statement.where(MeterCursorRow.organization_id == only)
    await session.execute(statement.values(is_flush_due=True) if is_flush else statement)


async def open_work(session: AsyncSession, *, organization_id: OrganizationId) -> OpenWork:
    """Return what stands between what is billed and Stripe, after a turn that was to report all of it."""
    open_report = select(MeterReportRow.id).where(
        MeterReportRow.organization_id == organization_id,
        MeterReportRow.meter == USAGE.event_name,
        MeterReportRow.state.in_(OPEN_STATES),
    )
    has_reports = await session.scalar(open_report.limit(1)) is not None
    rows = await session.execute(
        select(MeterCursorRow.parked_for, MeterCursorRow.is_flush_due, MeterCursorRow.leased_by).where(
            MeterCursorRow.organization_id == organization_id, MeterCursorRow.meter == USAGE.event_name
        )
    )
    cursors = list(rows)
    return OpenWork(
        is_parked=any(parked_for is not None for parked_for, _, _ in cursors),
        is_waiting=has_reports or any(is_due or leased_by is not None for _, is_due, leased_by in cursors),
    )


async def request_flush(session: AsyncSession, now: datetime, *, organization_id: OrganizationId) -> None:
    """Have everything of an organization reported now: an invoice is being drawn up."""
    await session.execute(
        update(MeterCursorRow)
        .where(MeterCursorRow.organization_id == organization_id)
        .values(is_flush_due=True, next_at=now)
    )


async def resume(session: AsyncSession, now: datetime, *, organization_id: OrganizationId) -> int:
    """Go on with what was parked; return how many meters that is."""
    rows = await session.execute(
        update(MeterCursorRow)
        .where(MeterCursorRow.organization_id == organization_id, MeterCursorRow.parked_for.is_not(None))
        .values(parked_for=None, next_at=now)
        .returning(MeterCursorRow.meter)
    )
    return len(rows.all())
