"""What an organization's webhooks tell of its billing, written in the transaction in which our rows change."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from metering.billing.stripe_objects import Invoice
from metering.billing.tables import SubscriptionRow
from webhooks.events import InvoicePaid, InvoicePaymentFailed, SubscriptionUpdated
from webhooks.publish import publish


class SubscriptionShown(NamedTuple):
    """What is told of a subscription: when it is the same, there is no news."""

    plan: str
    status: str
    starts_at: datetime
    ends_at: datetime
    trial_ends_at: datetime | None
    cancel_at: datetime | None


def shown(row: SubscriptionRow) -> SubscriptionShown:
    """Return what is told of a subscription as it is now."""
    return SubscriptionShown(
        row.plan, row.status, row.period_starts_at, row.period_ends_at, row.trial_ends_at, row.cancel_at
    )


async def tell_subscription(
    session: AsyncSession, row: SubscriptionRow, before: SubscriptionShown, *, organization_id: OrganizationId
) -> None:
    """Tell that a subscription is another than *before*; of one that is the same, nothing."""
    now = shown(row)
    if now == before:
        return
    updated = SubscriptionUpdated(
        id=row.id,
        plan=now.plan or None,
        status=now.status,
        current_period_start=int(now.starts_at.timestamp()),
        current_period_end=int(now.ends_at.timestamp()),
        trial_end=_seconds(now.trial_ends_at),
        cancel_at=_seconds(now.cancel_at),
    )
    await publish(session, updated, organization_id=organization_id)


async def tell_invoice(
    session: AsyncSession,
    invoice: Invoice,
    *,
    is_newly_paid: bool,
    is_newly_failed: bool,
    organization_id: OrganizationId,
) -> None:
    """Tell that an invoice was paid, or, once an invoice, that it could not be."""
    facts: dict[str, Any] = {
        "id": invoice.id,
        "number": invoice.number,
        "currency": invoice.currency,
        "total_cents": invoice.total_cents,
        "paid_cents": invoice.paid_cents,
        "due_cents": invoice.due_cents,
        "page_url": invoice.page_url,
    }
    if is_newly_paid:
        await publish(session, InvoicePaid(**facts), organization_id=organization_id)
    if is_newly_failed:
        await publish(session, InvoicePaymentFailed(**facts), organization_id=organization_id)


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
