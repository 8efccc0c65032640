"""What recurs a month: a row for each change, from which business metrics are made (`metering/billing/mrr.py`)."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId, new_id
from metering.billing.account_status import PAYING
from metering.billing.tables import SubscriptionChangeRow, SubscriptionRow


async def keep_revenue(
    session: AsyncSession, row: SubscriptionRow, now: datetime, *, organization_id: OrganizationId
) -> None:
    """Write down what recurs a month, if that has changed."""
    mrr_cents = row.price_cents_per_month if row.status in PAYING else 0
    last = await session.scalar(
        select(SubscriptionChangeRow)
        .where(
            SubscriptionChangeRow.organization_id == organization_id, SubscriptionChangeRow.subscription_id == row.id
        )
        .order_by(SubscriptionChangeRow.id.desc())
        .limit(1)
    )
    if last is not None and (last.plan, last.status, last.mrr_cents) == (row.plan, row.status, mrr_cents):
        return
    occurred_at = now
    if last is None:
        occurred_at = row.started_at
    elif row.ended_at is not None:
        occurred_at = row.ended_at
    session.add(
        SubscriptionChangeRow(
            id=new_id("sch"),
            organization_id=organization_id,
            subscription_id=row.id,
            plan=row.plan,
            status=row.status,
            mrr_cents=mrr_cents,
            occurred_at=occurred_at,
        )
    )
