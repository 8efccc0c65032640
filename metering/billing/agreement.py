"""Whether Stripe agrees with the ledger: what stands between the two, of all organizations, for the operator."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import msgspec
from sqlalchemy import ColumnElement, ScalarSelect, and_, exists, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from metering.billing import marks
from metering.billing.account_status import LIVE, RENEWED
from metering.billing.meters import USAGE
from metering.billing.moving import FINAL, reported_for_invoice
from metering.billing.tables import (
    BillingPeriodRow,
    InvoiceRow,
    MeterCheckRow,
    MeterCursorRow,
    MeterReportRow,
    StripeEventRow,
    SubscriptionRow,
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


class UsageItemView(msgspec.Struct, frozen=True):
    """Usage that Stripe bills twice, not at all, or although the plan includes it."""

    organization_id: str
    subscription_id: str | None
    """None: it is all of its subscriptions together."""
    reason: str


class ReconciliationView(msgspec.Struct, frozen=True, kw_only=True):
    """Whether Stripe agrees with the ledger, for the operator."""

    agrees: bool
    is_stuck: bool
    """Reports wait, or a period is over and the next one is unknown, for longer than Stripe is ever out of reach: the
    worker's log says why."""
    reconciled_at: datetime | None
    reports: dict[str, int]
    """How many reports are in which state."""
    oldest_open_at: datetime | None
    events: dict[str, int]
    differences: list[DifferenceView]
    invoices: list[InvoiceDifferenceView]
    parked: list[ParkedView]
    uncollected: list[UncollectedView]
    usage_items: list[UsageItemView]


async def reconciliation(
    session: AsyncSession, now: datetime, limit: int = 100, *, only: OrganizationId | None = None
) -> ReconciliationView:
    """Return what stands between the ledger and Stripe, of all organizations or of *only* one.

    *limit* of each kind at most. Events are nobody's until they are applied, and are left out of one's.
    """
    is_open = (MeterReportRow.state.in_(("new", "sent", "unknown")), *_of(MeterReportRow, only))
    oldest = await session.scalar(select(func.min(MeterReportRow.created_at)).where(*is_open))
    waiting = await session.scalar(
        select(func.min(func.coalesce(MeterReportRow.first_sent_at, MeterReportRow.created_at))).where(*is_open)
    )
    has_waited = waiting is not None and now - waiting > _STUCK_AFTER
    is_stuck = has_waited or await _has_unread_period(session, now, organization_id=only)
    events = await _events_by_state(session) if only is None else {}
    differences = await _differences(session, limit, organization_id=only)
    invoices = [
        *await _invoice_differences(session, now, limit, organization_id=only),
        *await _without_invoice(session, now, limit, organization_id=only),
    ]
    parked = await _parked(session, limit, organization_id=only)
    uncollected = await _uncollected(session, limit, organization_id=only)
    usage_items = await _usage_items(session, limit, organization_id=only)
    return ReconciliationView(
        agrees=not (differences or invoices or parked or uncollected or usage_items or is_stuck or events.get("dead")),
        is_stuck=is_stuck,
        reconciled_at=await marks.moment(session, "reconciled"),
        reports=await _reports_by_state(session, organization_id=only),
        oldest_open_at=oldest,
        events=events,
        differences=differences,
        invoices=invoices,
        parked=parked,
        uncollected=uncollected,
        usage_items=usage_items,
    )


_Rows = (
    type[MeterReportRow]
    | type[MeterCheckRow]
    | type[MeterCursorRow]
    | type[InvoiceRow]
    | type[BillingPeriodRow]
    | type[SubscriptionRow]
    | type[UncollectedUsageRow]
)


def _of(rows: _Rows, organization_id: OrganizationId | None) -> list[ColumnElement[bool]]:
    return [] if organization_id is None else [rows.organization_id == organization_id]


async def _has_unread_period(session: AsyncSession, now: datetime, *, organization_id: OrganizationId | None) -> bool:
    """Tell whether usage waits for a subscription's next period, of which we should have heard long since."""
    unread = await session.scalar(
        select(SubscriptionRow.id)
        .where(
            *_of(SubscriptionRow, organization_id),
            SubscriptionRow.status.in_(RENEWED),
            SubscriptionRow.ended_at.is_(None),
            SubscriptionRow.period_ends_at < now - _STUCK_AFTER,
        )
        .limit(1)
    )
    return unread is not None


async def _reports_by_state(session: AsyncSession, *, organization_id: OrganizationId | None) -> dict[str, int]:
    rows = await session.execute(
        select(MeterReportRow.state, func.count())
        .where(*_of(MeterReportRow, organization_id))
        .group_by(MeterReportRow.state)
    )
    return {state: int(count) for state, count in rows}


async def _events_by_state(session: AsyncSession) -> dict[str, int]:
    rows = await session.execute(select(StripeEventRow.state, func.count()).group_by(StripeEventRow.state))
    return {state: int(count) for state, count in rows}


async def _parked(session: AsyncSession, limit: int, *, organization_id: OrganizationId | None) -> list[ParkedView]:
    rows = await session.scalars(
        select(MeterCursorRow)
        .where(MeterCursorRow.parked_for.is_not(None), *_of(MeterCursorRow, organization_id))
        .order_by(MeterCursorRow.organization_id)
        .limit(limit)
    )
    return [
        ParkedView(organization_id=row.organization_id, meter=row.meter, reason=row.parked_for or "") for row in rows
    ]


async def _uncollected(
    session: AsyncSession, limit: int, *, organization_id: OrganizationId | None
) -> list[UncollectedView]:
    rows = await session.scalars(
        select(UncollectedUsageRow)
        .where(UncollectedUsageRow.accepted_at.is_(None), *_of(UncollectedUsageRow, organization_id))
        .order_by(UncollectedUsageRow.window_starts_at)
        .limit(limit)
    )
    return [UncollectedView(**{name: getattr(row, name) for name in UncollectedView.__struct_fields__}) for row in rows]


async def _differences(
    session: AsyncSession, limit: int, *, organization_id: OrganizationId | None
) -> list[DifferenceView]:
    rows = await session.scalars(
        select(MeterCheckRow)
        .where(MeterCheckRow.state.not_in(("agrees", "accepted")), *_of(MeterCheckRow, organization_id))
        .order_by(MeterCheckRow.state, MeterCheckRow.hour)
        .limit(limit)
    )
    return [DifferenceView(**{name: getattr(row, name) for name in DifferenceView.__struct_fields__}) for row in rows]


async def _invoice_differences(
    session: AsyncSession, now: datetime, limit: int, *, organization_id: OrganizationId | None
) -> list[InvoiceDifferenceView]:
    """Return final invoices whose usage is not the sum of what was reported for their period."""
    rows = await session.execute(
        select(InvoiceRow.organization_id, InvoiceRow.id, reported_for_invoice(), InvoiceRow.usage_micro_usd)
        .where(*is_other(now), *_of(InvoiceRow, organization_id))
        .order_by(InvoiceRow.issued_at.desc())
        .limit(limit)
    )
    return [
        InvoiceDifferenceView(
            organization_id=organization_id, invoice_id=invoice_id, reported=int(told), invoiced=int(invoiced or 0)
        )
        for organization_id, invoice_id, told, invoiced in rows
    ]


async def _without_invoice(
    session: AsyncSession, now: datetime, limit: int, *, organization_id: OrganizationId | None
) -> list[InvoiceDifferenceView]:
    """Return what was reported for periods that ended days ago and is within no invoice's line, not even a draft's."""
    rows = await session.execute(
        select(BillingPeriodRow.organization_id, uninvoiced_of_period())
        .where(*is_uninvoiced(now), *_of(BillingPeriodRow, organization_id))
        .order_by(BillingPeriodRow.ends_at.desc())
        .limit(limit)
    )
    return [
        InvoiceDifferenceView(organization_id=organization_id, invoice_id=None, reported=int(told), invoiced=0)
        for organization_id, told in rows
    ]


def uninvoiced_of_period() -> ScalarSelect[int]:
    """Return, for a statement about periods, what was reported for each at times that no invoice bills."""
    is_invoiced = exists().where(
        InvoiceRow.organization_id == MeterReportRow.organization_id,
        InvoiceRow.status != "deleted",
        InvoiceRow.usage_spans.contains(MeterReportRow.event_at),
    )
    return (
        select(func.coalesce(func.sum(MeterReportRow.value), 0))
        .where(
            MeterReportRow.organization_id == BillingPeriodRow.organization_id,
            MeterReportRow.meter == USAGE.event_name,
            MeterReportRow.event_at >= BillingPeriodRow.starts_at,
            MeterReportRow.event_at < BillingPeriodRow.ends_at,
            MeterReportRow.kind != "repair",
            MeterReportRow.state != "refused",
            ~is_invoiced,
        )
        .correlate(BillingPeriodRow)
        .scalar_subquery()
    )


def is_uninvoiced(now: datetime) -> tuple[ColumnElement[bool], ...]:
    """Return what makes a period one that is over for days, and of which there is usage that no invoice bills."""
    period = BillingPeriodRow
    is_whole = exists().where(
        InvoiceRow.organization_id == period.organization_id,
        InvoiceRow.status != "deleted",
        InvoiceRow.usage_spans.contains(func.tstzrange(period.starts_at, period.ends_at)),
    )
    # A part that a change of the plan cut off is billed with the rest of the subscription's period.
    is_to_come = exists().where(
        SubscriptionRow.organization_id == period.organization_id,
        SubscriptionRow.id == period.subscription_id,
        SubscriptionRow.ended_at.is_(None),
        SubscriptionRow.period_starts_at <= period.starts_at,
        SubscriptionRow.period_ends_at > now - _INVOICED_AFTER,
    )
    return (
        period.is_metered.is_(True),
        ~period.is_trial,
        period.ends_at.between(now - _INVOICES_SHOWN, now - _INVOICED_AFTER),
        ~is_whole,
        ~is_to_come,
        uninvoiced_of_period() != period.accepted_micro_usd,
    )


async def _usage_items(
    session: AsyncSession, limit: int, *, organization_id: OrganizationId | None
) -> list[UsageItemView]:
    """Return whose usage is billed by two subscriptions, by none that should, or otherwise than the plan says."""
    billing = func.count(SubscriptionRow.usage_item_id)
    several = await session.execute(
        select(SubscriptionRow.organization_id, billing)
        .where(SubscriptionRow.status.in_(LIVE), *_of(SubscriptionRow, organization_id))
        .group_by(SubscriptionRow.organization_id)
        .having(or_(billing > 1, and_(billing == 0, func.bool_or(SubscriptionRow.has_dropped_usage))))
        .limit(limit)
    )
    single = await session.execute(
        select(SubscriptionRow.organization_id, SubscriptionRow.id, SubscriptionRow.usage_problem)
        .where(*is_usage_problem(), *_of(SubscriptionRow, organization_id))
        .limit(limit)
    )
    return [
        *(
            UsageItemView(owner, None, "two subscriptions bill usage" if count else "no subscription bills usage")
            for owner, count in several
        ),
        *(UsageItemView(owner, subscription_id, problem or "") for owner, subscription_id, problem in single),
    ]


def is_usage_problem() -> tuple[ColumnElement[bool], ...]:
    """Return what makes a subscription one that bills usage otherwise than it should."""
    return (
        SubscriptionRow.status.in_(LIVE),
        SubscriptionRow.usage_problem.is_not(None),
        SubscriptionRow.usage_problem.is_distinct_from(SubscriptionRow.accepted_usage_problem),
    )


def is_other(now: datetime) -> tuple[ColumnElement[bool], ...]:
    """Return what makes a final invoice one that bills other than what was reported for its period."""
    return (
        InvoiceRow.usage_micro_usd.is_not(None),
        InvoiceRow.status.in_(FINAL),
        InvoiceRow.issued_at >= now - _INVOICES_SHOWN,
        InvoiceRow.usage_micro_usd + InvoiceRow.accepted_micro_usd != reported_for_invoice(),
    )
