"""Which mails are due: rows, written in the transaction of what they are about, and each only once.

A worker sends them (`metering/billing/mailing.py`); without an SMTP server they are written to the log.
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId, new_id
from metering.billing.stripe_objects import Invoice, Subscription
from metering.billing.tables import EmailRow

EmailKind = Literal[
    "payment_failed", "payment_recovered", "top_up_failed", "limit_near", "trial_ending", "webhook_failing"
]


async def note(
    session: AsyncSession, kind: EmailKind, reason: str, facts: dict[str, object], *, organization_id: OrganizationId
) -> bool:
    """Write down a mail; False where it was written down for that *reason* before."""
    made = await session.scalar(
        insert(EmailRow)
        .values(id=new_id("mail"), organization_id=organization_id, kind=kind, reason=reason, facts=facts)
        .on_conflict_do_nothing()
        .returning(EmailRow.id)
    )
    return made is not None


async def note_invoice(session: AsyncSession, invoice: Invoice, *, organization_id: OrganizationId) -> bool:
    """Tell of a payment that failed, once an invoice; and of its success, if the failure was told.

    Returns whether it is news that it failed.
    """
    facts: dict[str, object] = {
        "invoice": invoice.number or invoice.id,
        "due_cents": invoice.due_cents,
        "currency": invoice.currency,
        "page_url": invoice.page_url,
    }
    if invoice.status == "open" and invoice.attempts:
        return await note(session, "payment_failed", invoice.id, facts, organization_id=organization_id)
    if invoice.status == "paid" and await _was_noted(session, invoice.id, organization_id=organization_id):
        await note(session, "payment_recovered", invoice.id, facts, organization_id=organization_id)
    return False


async def note_trial_end(session: AsyncSession, subscription: Subscription, *, organization_id: OrganizationId) -> None:
    """Tell that a trial ends soon: once for each end that it was ever to have."""
    ends_at = subscription.trial_ends_at
    if subscription.status != "trialing" or ends_at is None:
        return
    facts: dict[str, object] = {"plan": subscription.plan or "", "ends_at": ends_at.isoformat()}
    reason = f"{subscription.id}:{int(ends_at.timestamp())}"
    await note(session, "trial_ending", reason, facts, organization_id=organization_id)


async def note_top_up(session: AsyncSession, top_up_id: str, cents: int, *, organization_id: OrganizationId) -> None:
    """Tell that credit could not be bought: the card was declined, or there is none."""
    await note(session, "top_up_failed", top_up_id, {"cents": cents}, organization_id=organization_id)


async def _was_noted(session: AsyncSession, invoice_id: str, *, organization_id: OrganizationId) -> bool:
    found = await session.scalar(
        select(EmailRow.id).where(
            EmailRow.organization_id == organization_id,
            EmailRow.kind == "payment_failed",
            EmailRow.reason == invoice_id,
        )
    )
    return found is not None
