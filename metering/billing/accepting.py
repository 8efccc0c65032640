"""What an operator has decided about: differences between the ledger and Stripe that will not go by themselves.

Nothing is changed at Stripe or in the ledger. What is accepted is what stands now: another number counts again.
"""

from __future__ import annotations

from datetime import datetime

import msgspec
import structlog
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from metering.billing.agreement import is_other, is_uninvoiced, is_usage_problem, uninvoiced_of_period
from metering.billing.moving import reported_for_invoice
from metering.billing.ownership import lock_account
from metering.billing.tables import (
    BillingPeriodRow,
    InvoiceRow,
    MeterCheckRow,
    MeterWindowRow,
    SubscriptionRow,
    UncollectedUsageRow,
)

_log = structlog.get_logger(__name__)


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """How many differences of each kind do not count any more."""

    hours: int
    invoices: int
    periods: int
    """That are over, and of which no invoice bills something."""
    windows: int
    """Of usage that no invoice takes."""
    subscriptions: int
    """That bill usage otherwise than their plan says."""


async def accept_differences(session: AsyncSession, now: datetime, *, organization_id: OrganizationId) -> Accepted:
    """Take an organization's alerts, its invoices' differences and its uncollected usage as decided about."""
    await lock_account(session, organization_id=organization_id)
    hours = await session.execute(
        update(MeterCheckRow)
        .where(MeterCheckRow.organization_id == organization_id, MeterCheckRow.state == "alert")
        .values(state="accepted", checked_at=now)
        .returning(MeterCheckRow.hour)
    )
    invoices = await session.execute(
        update(InvoiceRow)
        .where(InvoiceRow.organization_id == organization_id, *is_other(now))
        .values(accepted_micro_usd=reported_for_invoice() - InvoiceRow.usage_micro_usd)
        .returning(InvoiceRow.id)
        .execution_options(synchronize_session=False)
    )
    periods = await session.execute(
        update(BillingPeriodRow)
        .where(BillingPeriodRow.organization_id == organization_id, *is_uninvoiced(now))
        .values(accepted_micro_usd=uninvoiced_of_period())
        .returning(BillingPeriodRow.starts_at)
        .execution_options(synchronize_session=False)
    )
    subscriptions = await session.execute(
        update(SubscriptionRow)
        .where(SubscriptionRow.organization_id == organization_id, *is_usage_problem())
        .values(accepted_usage_problem=SubscriptionRow.usage_problem)
        .returning(SubscriptionRow.id)
        .execution_options(synchronize_session=False)
    )
    accepted = Accepted(
        hours=len(hours.all()),
        invoices=len(invoices.all()),
        periods=len(periods.all()),
        windows=await _write_off(session, now, organization_id=organization_id),
        subscriptions=len(subscriptions.all()),
    )
    _log.warning("billing.differences_accepted", organization_id=organization_id, **msgspec.structs.asdict(accepted))
    return accepted


async def _write_off(session: AsyncSession, now: datetime, *, organization_id: OrganizationId) -> int:
    """Count uncollected usage as planned, so that nobody is to pay it; return of how many windows."""
    rows = list(
        await session.scalars(
            select(UncollectedUsageRow).where(
                UncollectedUsageRow.organization_id == organization_id, UncollectedUsageRow.accepted_at.is_(None)
            )
        )
    )
    for row in rows:
        row.accepted_at = now
        await session.execute(
            insert(MeterWindowRow)
            .values(
                organization_id=organization_id,
                meter=row.meter,
                starts_at=row.window_starts_at,
                planned=row.amount,
                revisions=0,
            )
            .on_conflict_do_update(
                index_elements=[MeterWindowRow.organization_id, MeterWindowRow.meter, MeterWindowRow.starts_at],
                set_={"planned": MeterWindowRow.planned + row.amount},
            )
        )
    return len(rows)
