"""Usage that came too late for an invoice which we thought it would be on: it goes to the next one.

Stripe takes usage of a period whose invoice is final, counts it in its sums, and bills it never. Once the invoice says
less than was reported for its period, what is missing is taken back out of its hours (a report below zero, which no
invoice sees either), and planned anew, as of now. So sums and invoices both come to the ledger.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import structlog
from sqlalchemy import ColumnElement, ScalarSelect, and_, exists, func, or_, select, update
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
_DECIDED: Final = ("alert", "accepted")
"""Of hours: nothing will be found out about them by itself any more."""
_UNDECIDED: Final = ("new", "sent", "unknown")
_BACK: Final = timedelta(days=34)
"""Stripe takes usage of the last 35 days."""
_log = structlog.get_logger(__name__)


async def short_invoices(
    session: AsyncSession, now: datetime, *, only: OrganizationId | None = None
) -> list[tuple[OrganizationId, str]]:
    """Return the final invoices, and whose they are, that bill less than was reported for their period.

    Not where an invoice has lines that are neither the plan's nor usage: usage under an exchanged price stands on
    another line, and a person has to read it (`agreement.reconciliation` shows it).
    """
    statement = (
        select(InvoiceRow.organization_id, InvoiceRow.id)
        .where(
            InvoiceRow.status.in_(FINAL),
            InvoiceRow.usage_micro_usd.is_not(None),
            InvoiceRow.usage_starts_at >= now - _BACK - timedelta(days=31),
            ~InvoiceRow.has_other_lines,
            InvoiceRow.usage_micro_usd + InvoiceRow.accepted_micro_usd < reported_for_invoice(),
        )
        .order_by(InvoiceRow.issued_at)
    )
    if only is not None:
        statement = statement.where(InvoiceRow.organization_id == only)
    return [
        (OrganizationId(organization_id), invoice_id)
        for organization_id, invoice_id in await session.execute(statement)
    ]


async def move_unbilled(
    session: AsyncSession, invoice_id: str, now: datetime, *, organization_id: OrganizationId
) -> bool:
    """Move what a final invoice has not billed to the next one; tell whether there was anything to move."""
    # First: whoever else moves it, plans or ends the subscription has done so by then, or waits.
    await lock_account(session, organization_id=organization_id)
    invoice = await session.scalar(
        select(InvoiceRow).where(InvoiceRow.organization_id == organization_id, InvoiceRow.id == invoice_id)
    )
    if invoice is None or not await _has_later_period(session, invoice, organization_id=organization_id):
        return False
    missing = await _missing(session, invoice, organization_id=organization_id)
    if missing <= 0:
        return False
    # The cursor before its windows, as whoever writes down a refusal has them.
    await session.execute(
        update(MeterCursorRow)
        .where(MeterCursorRow.organization_id == organization_id, MeterCursorRow.meter == USAGE.event_name)
        .values(next_at=func.least(MeterCursorRow.next_at, now), scanned_at=None)
    )
    left = missing
    # What was taken last is what came too late.
    rows = await session.scalars(
        select(MeterReportRow)
        .where(
            *_of(invoice, organization_id),
            MeterReportRow.value > 0,
            MeterReportRow.kind != "repair",
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
        await _take_out(session, row, taken, now)
    _log.warning(
        "invoice.usage_moved", organization_id=organization_id, invoice_id=invoice.id, micro_usd=missing - left
    )
    return missing > left


def reported_for_invoice() -> ScalarSelect[int]:
    """Return, for a statement about invoices, what was reported for each one's period less what was moved out of it."""
    return (
        select(func.coalesce(func.sum(MeterReportRow.value), 0))
        .where(
            MeterReportRow.organization_id == InvoiceRow.organization_id,
            MeterReportRow.meter == USAGE.event_name,
            InvoiceRow.usage_spans.contains(MeterReportRow.event_at),
            MeterReportRow.kind != "repair",
            MeterReportRow.state != "refused",
        )
        .correlate(InvoiceRow)
        .scalar_subquery()
    )


def _of(invoice: InvoiceRow, organization_id: OrganizationId) -> tuple[ColumnElement[bool], ...]:
    return (
        MeterReportRow.organization_id == organization_id,
        MeterReportRow.meter == USAGE.event_name,
        or_(
            *(
                and_(MeterReportRow.event_at >= span.lower, MeterReportRow.event_at < span.upper)
                for span in invoice.usage_spans or ()
            )
        ),
    )


async def _missing(session: AsyncSession, invoice: InvoiceRow, *, organization_id: OrganizationId) -> int:
    """Return how much came too late for an invoice: nothing as long as something of its period is undecided.

    What Stripe has lost is not late: it is in no sum of Stripe's, and a person decides about it. So has one about what
    was accepted, which may be the same.
    """
    open_report = await session.scalar(
        select(MeterReportRow.id).where(*_of(invoice, organization_id), MeterReportRow.state.in_(_UNDECIDED)).limit(1)
    )
    differing = await session.execute(
        select(MeterCheckRow.state, MeterCheckRow.ours - MeterCheckRow.theirs).where(
            MeterCheckRow.organization_id == organization_id,
            MeterCheckRow.meter == USAGE.event_name,
            MeterCheckRow.hour > (invoice.usage_starts_at or invoice.issued_at) - HOUR,
            MeterCheckRow.hour < invoice.usage_ends_at,
            MeterCheckRow.state != "agrees",
        )
    )
    hours = [(state, int(difference)) for state, difference in differing]
    if open_report is not None or any(state not in _DECIDED for state, _ in hours):
        return 0
    reported = await session.scalar(
        select(reported_for_invoice()).where(InvoiceRow.organization_id == organization_id, InvoiceRow.id == invoice.id)
    )
    lost = sum(max(difference, 0) for _, difference in hours)
    return int(reported or 0) - (invoice.usage_micro_usd or 0) - max(lost, invoice.accepted_micro_usd)


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


async def _take_out(session: AsyncSession, row: MeterReportRow, taken: int, now: datetime) -> None:
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
            created_at=now,
        )
    )
    await session.flush()
