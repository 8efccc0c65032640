"""Whether Stripe agrees with the ledger: what stands between the two, of all organizations, for the operator."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import msgspec
from sqlalchemy import exists, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from metering.billing import marks
from metering.billing.meters import USAGE
from metering.billing.moving import FINAL, reported_for_invoice
from metering.billing.tables import (
    BillingPeriodRow,
    InvoiceRow,
    MeterCheckRow,
    MeterCursorRow,
    MeterReportRow,
    StripeEventRow,
    UncollectedUsageRow,
)

_INVOICES_SHOWN: Final = timedelta(days=100)
_INVOICED_AFTER: Final = timedelta(days=2)
"""A draft is made when a period ends, or soon after; it is final an hour later."""
_STUCK_AFTER: Final = timedelta(hours=3)
"""An hour's usage is reported within an hour and some minutes of its beginning."""


class DifferenceView(msgspec.Struct, frozen=True, kw_only=True):
    """An hour in which Stripe's sum is not ours, in the meter's unit."""

    organization_id: str
    meter: str
    hour: datetime
    ours: int
    theirs: int
    state: str
    seen_at: datetime
    checked_at: datetime


class ParkedView(msgspec.Struct, frozen=True, kw_only=True):
    """A meter of an organization of which nothing is reported, and why."""

    organization_id: str
    meter: str
    reason: str


class UncollectedView(msgspec.Struct, frozen=True, kw_only=True):
    """Usage that no invoice takes any more, in nano-USD or tokens."""

    organization_id: str
    meter: str
    window_starts_at: datetime
    amount: int


class InvoiceDifferenceView(msgspec.Struct, frozen=True, kw_only=True):
    """A final invoice that does not bill what was reported for its period, in micro-USD."""

    organization_id: str
    invoice_id: str | None
    """None: the period is over, and there is no invoice of it."""
    reported: int
    invoiced: int


class ReconciliationView(msgspec.Struct, frozen=True, kw_only=True):
    """Whether Stripe agrees with the ledger, for the operator."""

    agrees: bool
    is_stuck: bool
    """Reports wait for longer than Stripe is ever out of reach: the worker's log says why."""
    reconciled_at: datetime | None
    reports: dict[str, int]
    """How many reports are in which state."""
    oldest_open_at: datetime | None
    events: dict[str, int]
    differences: list[DifferenceView]
    invoices: list[InvoiceDifferenceView]
    parked: list[ParkedView]
    uncollected: list[UncollectedView]


async def reconciliation(session: AsyncSession, now: datetime, limit: int = 100) -> ReconciliationView:
    """Return what stands between the ledger and Stripe, of all organizations: *limit* of each kind at most."""
    reports = await _by_state(session, MeterReportRow.state)
    events = await _by_state(session, StripeEventRow.state)
    oldest = await session.scalar(
        select(func.min(MeterReportRow.created_at)).where(MeterReportRow.state.in_(("new", "sent", "unknown")))
    )
    differences = await _differences(session, limit)
    invoices = await _invoice_differences(session, now, limit)
    parked = [
        ParkedView(organization_id=row.organization_id, meter=row.meter, reason=row.parked_for or "")
        for row in await session.scalars(
            select(MeterCursorRow).where(MeterCursorRow.parked_for.is_not(None)).limit(limit)
        )
    ]
    waiting = await session.scalar(
        select(func.min(func.coalesce(MeterReportRow.first_sent_at, MeterReportRow.created_at))).where(
            MeterReportRow.state.in_(("new", "sent", "unknown"))
        )
    )
    is_stuck = waiting is not None and now - waiting > _STUCK_AFTER
    uncollected = [
        UncollectedView(**{name: getattr(row, name) for name in UncollectedView.__struct_fields__})
        for row in await session.scalars(
            select(UncollectedUsageRow).order_by(UncollectedUsageRow.window_starts_at).limit(limit)
        )
    ]
    return ReconciliationView(
        agrees=not (differences or invoices or parked or uncollected or is_stuck or events.get("dead")),
        is_stuck=is_stuck,
        reconciled_at=await marks.moment(session, "reconciled"),
        reports=reports,
        oldest_open_at=oldest,
        events=events,
        differences=differences,
        invoices=invoices,
        parked=parked,
        uncollected=uncollected,
    )


async def _by_state(session: AsyncSession, state: InstrumentedAttribute[str]) -> dict[str, int]:
    rows = await session.execute(select(state, func.count()).group_by(state))
    return {name: int(count) for name, count in rows}


async def _differences(session: AsyncSession, limit: int) -> list[DifferenceView]:
    rows = await session.scalars(
        select(MeterCheckRow)
        .where(MeterCheckRow.state != "agrees")
        .order_by(MeterCheckRow.state, MeterCheckRow.hour)
        .limit(limit)
    )
    return [DifferenceView(**{name: getattr(row, name) for name in DifferenceView.__struct_fields__}) for row in rows]


async def _invoice_differences(session: AsyncSession, now: datetime, limit: int) -> list[InvoiceDifferenceView]:
    """Return final invoices whose usage is not what was reported for their period, and periods without an invoice."""
    reported = reported_for_invoice()
    rows = await session.execute(
        select(InvoiceRow.organization_id, InvoiceRow.id, reported, InvoiceRow.usage_micro_usd)
        .where(
            InvoiceRow.usage_micro_usd.is_not(None),
            InvoiceRow.status.in_(FINAL),
            InvoiceRow.issued_at >= now - _INVOICES_SHOWN,
            InvoiceRow.usage_micro_usd != reported,
        )
        .order_by(InvoiceRow.issued_at.desc())
        .limit(limit)
    )
    found = [
        InvoiceDifferenceView(
            organization_id=organization_id, invoice_id=invoice_id, reported=int(told), invoiced=int(invoiced or 0)
        )
        for organization_id, invoice_id, told, invoiced in rows
    ]
    return [*found, *await _without_invoice(session, now, limit)]


async def _without_invoice(session: AsyncSession, now: datetime, limit: int) -> list[InvoiceDifferenceView]:
    """Return what was reported for periods that ended days ago and that no invoice has a line for, not even a draft."""
    period = BillingPeriodRow
    reported = (
        select(func.coalesce(func.sum(MeterReportRow.value), 0))
        .where(
            MeterReportRow.organization_id == period.organization_id,
            MeterReportRow.meter == USAGE.event_name,
            MeterReportRow.event_at >= period.starts_at,
            MeterReportRow.event_at < period.ends_at,
            MeterReportRow.state != "refused",
        )
        .correlate(period)
        .scalar_subquery()
    )
    has_invoice = exists().where(
        InvoiceRow.organization_id == period.organization_id,
        InvoiceRow.subscription_id == period.subscription_id,
        InvoiceRow.usage_starts_at < period.ends_at,
        InvoiceRow.usage_ends_at > period.starts_at,
    )
    rows = await session.execute(
        select(period.organization_id, reported)
        .where(
            period.is_metered,
            ~period.is_trial,
            ~period.is_closed,
            period.ends_at.between(now - _INVOICES_SHOWN, now - _INVOICED_AFTER),
            reported != 0,
            ~has_invoice,
        )
        .limit(limit)
    )
    return [
        InvoiceDifferenceView(organization_id=organization_id, invoice_id=None, reported=int(told), invoiced=0)
        for organization_id, told in rows
    ]
