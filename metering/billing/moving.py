"""Usage that came too late for an invoice which we thought it would be on: it goes to the next one.

Stripe takes usage of a period whose invoice is final, counts it in its sums, and bills it never. Once the invoice says
less than was reported for its period, what is missing is taken back out of its hours (a report below zero, which no
invoice sees either), and planned anew, as of now. So sums and invoices both come to the ledger.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import structlog
from sqlalchemy import ColumnElement, exists, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId, new_id
from metering.billing.meters import USAGE
from metering.billing.ownership import lock_account
from metering.billing.planning import identifier_of
from metering.billing.tables import (
    BillingPeriodRow,
    InvoiceRow,
    MeterCheckRow,
    MeterCursorRow,
    MeterReportRow,
    MeterWindowRow,
)
from metering.billing.windows import HOUR

FINAL: Final = ("open", "paid", "uncollectible")
_COUNTED: Final = ("acked", "checked")
_UNDECIDED: Final = ("new", "sent", "unknown")
_BACK: Final = timedelta(days=34)
"""Stripe takes usage of the last 35 days."""
_log = structlog.get_logger(__name__)


async def move_unbilled(session: AsyncSession, now: datetime, *, only: OrganizationId | None = None) -> int:
    """Move what final invoices have not billed to the next ones; return how many invoices that were.

    Not where an invoice has lines that are neither the plan's nor usage: usage under an exchanged price stands on
    another line, and a person has to read it (`views.reconciliation` shows it).
    """
    statement = (
        select(InvoiceRow)
        .where(
            InvoiceRow.status.in_(FINAL),
            InvoiceRow.usage_micro_usd.is_not(None),
            InvoiceRow.usage_starts_at >= now - _BACK - timedelta(days=31),
            ~InvoiceRow.has_other_lines,
        )
        .order_by(InvoiceRow.issued_at)
    )
    if only is not None:
        statement = statement.where(InvoiceRow.organization_id == only)
    moved = 0
    for invoice in await session.scalars(statement):
        moved += await _move(session, invoice, now, organization_id=OrganizationId(invoice.organization_id))
    return moved


async def _move(session: AsyncSession, invoice: InvoiceRow, now: datetime, *, organization_id: OrganizationId) -> bool:
    reported = await reported_for(session, invoice, organization_id=organization_id)
    missing = reported - (invoice.usage_micro_usd or 0)
    if missing <= 0 or await _is_undecided(session, invoice, organization_id=organization_id):
        return False
    if not await _has_later_period(session, invoice, organization_id=organization_id):
        return False
    await lock_account(session, organization_id=organization_id)
    left = missing
    # What was taken last is what came too late.
    rows = await session.scalars(
        select(MeterReportRow)
        .where(
            *_of(invoice, organization_id),
            MeterReportRow.value > 0,
            MeterReportRow.state.in_(_COUNTED),
            MeterReportRow.event_at >= now - _BACK,
        )
        .order_by(MeterReportRow.acked_at.desc().nulls_last(), MeterReportRow.id.desc())
    )
    for row in rows:
        if left <= 0:
            break
        taken = min(row.value, left)
        left -= taken
        await _take_out(session, row, taken)
    await session.execute(
        update(MeterCursorRow)
        .where(MeterCursorRow.organization_id == organization_id, MeterCursorRow.meter == USAGE.event_name)
        .values(next_at=func.least(MeterCursorRow.next_at, now), scanned_at=None)
    )
    _log.warning(
        "invoice.usage_moved", organization_id=organization_id, invoice_id=invoice.id, micro_usd=missing - left
    )
    return missing > left


async def reported_for(session: AsyncSession, invoice: InvoiceRow, *, organization_id: OrganizationId) -> int:
    """Return what was reported for an invoice's period, less what was moved out of it."""
    total = await session.scalar(
        select(func.coalesce(func.sum(MeterReportRow.value), 0)).where(
            *_of(invoice, organization_id), MeterReportRow.kind != "repair", MeterReportRow.state != "refused"
        )
    )
    return int(total or 0)


def _of(invoice: InvoiceRow, organization_id: OrganizationId) -> tuple[ColumnElement[bool], ...]:
    return (
        MeterReportRow.organization_id == organization_id,
        MeterReportRow.meter == USAGE.event_name,
        MeterReportRow.event_at >= invoice.usage_starts_at,
        MeterReportRow.event_at < invoice.usage_ends_at,
    )


async def _is_undecided(session: AsyncSession, invoice: InvoiceRow, *, organization_id: OrganizationId) -> bool:
    """Tell whether something of the period is on its way, or Stripe's sums of it are not ours: lost is not late."""
    open_report = await session.scalar(
        select(MeterReportRow.id).where(*_of(invoice, organization_id), MeterReportRow.state.in_(_UNDECIDED)).limit(1)
    )
    differs = await session.scalar(
        select(MeterCheckRow.hour)
        .where(
            MeterCheckRow.organization_id == organization_id,
            MeterCheckRow.meter == USAGE.event_name,
            MeterCheckRow.hour > (invoice.usage_starts_at or invoice.issued_at) - HOUR,
            MeterCheckRow.hour < invoice.usage_ends_at,
            MeterCheckRow.state != "agrees",
        )
        .limit(1)
    )
    return open_report is not None or differs is not None


async def _has_later_period(session: AsyncSession, invoice: InvoiceRow, *, organization_id: OrganizationId) -> bool:
    """Tell whether there is an invoice to come that what is moved can be on."""
    later = exists().where(
        BillingPeriodRow.organization_id == organization_id,
        BillingPeriodRow.is_metered,
        ~BillingPeriodRow.is_closed,
        ~BillingPeriodRow.is_trial,
        BillingPeriodRow.ends_at > invoice.usage_ends_at,
    )
    return bool(await session.scalar(select(later)))


async def _take_out(session: AsyncSession, row: MeterReportRow, taken: int) -> None:
    """Report *taken* less for a report's hour, and have it planned anew."""
    window = await session.get_one(
        MeterWindowRow, (row.organization_id, row.meter, row.window_starts_at), with_for_update=True
    )
    window.revisions += 1
    window.planned -= taken * USAGE.per_unit
    session.add(
        MeterReportRow(
            id=new_id("mrep"),
            organization_id=row.organization_id,
            meter=row.meter,
            window_starts_at=row.window_starts_at,
            revision=window.revisions,
            kind="moved",
            follows=row.id,
            event_at=row.event_at,
            value=-taken,
            identifier=identifier_of(row.organization_id, row.meter, row.window_starts_at, window.revisions),
            state="new",
        )
    )
    await session.flush()
