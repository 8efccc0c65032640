"""Credit that is paid beforehand: what a payment adds, what is left, and the budget that keeps spending below it.

An organization with credit and no subscription may spend what is left and no more: a hard budget says so, to the call
(`keys/quota.lua`). With a subscription credit is used first, and the rest is invoiced.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import msgspec
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from core.money import NanoUsd
from keys.dimensions import BUDGET_LIMIT_MAX
from keys.errors import TenantNotFound
from metering import budgets
from metering.billing import emails, wallet
from metering.billing.meters import USAGE
from metering.billing.ownership import owner_of_customer
from metering.billing.planning import open_cursors
from metering.billing.standing import LIVE
from metering.billing.stripe_objects import Payment
from metering.billing.tables import BillingCustomerRow, MeterWindowRow, SubscriptionRow, TopUpRow
from metering.billing.windows import hour_of
from metering.tables import SpendWindowRow

NANO_USD_PER_CENT: Final = 10_000_000
TOP_UP_METADATA: Final = "aap_top_up"
"""The key in a payment's metadata that says it buys credit: `checkout`, or the id of a top-up of ours."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


async def keep_payment(session: AsyncSession, payment: Payment, now: datetime) -> bool:
    """Add what a payment bought to its organization's credit, once. False: it bought none, or is not ours.

    What was received counts, not what was asked for (QuantumNous/new-api#4319).
    """
    bought_by = payment.metadata.get(TOP_UP_METADATA)
    if bought_by is None or payment.customer_id is None or payment.currency != "usd":
        return False
    organization_id = await owner_of_customer(session, payment.customer_id)
    if organization_id is None:
        return False
    if payment.status == "succeeded":
        credit = Credit(cents=payment.received_cents, source=payment.id, kind="top_up")
        await add_credit(session, credit, now, organization_id=organization_id)
    await _end_top_up(session, bought_by, payment, now, organization_id=organization_id)
    return True


class Credit(msgspec.Struct, frozen=True, kw_only=True):
    """Credit to be added. *source* is what it is for, and makes it happen once."""

    cents: int
    source: str
    kind: wallet.TransferKind = "adjustment"
    note: str | None = None


async def add_credit(session: AsyncSession, credit: Credit, now: datetime, *, organization_id: OrganizationId) -> bool:
    """Add credit, and let it be spent. False: its source did so before."""
    await session.execute(insert(BillingCustomerRow).values(organization_id=organization_id).on_conflict_do_nothing())
    await session.execute(
        update(BillingCustomerRow)
        .where(BillingCustomerRow.organization_id == organization_id, BillingCustomerRow.wallet_opened_at.is_(None))
        .values(wallet_opened_at=now)
    )
    await open_cursors(session, (USAGE,), organization_id=organization_id)
    is_new = await wallet.transfer(
        session,
        credit.kind,
        credit.cents * NANO_USD_PER_CENT,
        source=credit.source,
        organization_id=organization_id,
        note=credit.note,
    )
    if is_new:
        await settle_gate(session, organization_id=organization_id)
    return is_new


async def _end_top_up(
    session: AsyncSession, top_up_id: str, payment: Payment, now: datetime, *, organization_id: OrganizationId
) -> None:
    """Write down how a top-up of ours ended, if it was one and has."""
    state = {"succeeded": "paid", "requires_payment_method": "failed", "canceled": "failed"}.get(payment.status)
    if state is None:
        return
    ended = await session.scalar(
        update(TopUpRow)
        .where(TopUpRow.organization_id == organization_id, TopUpRow.id == top_up_id, TopUpRow.state == "open")
        .values(state=state, payment_intent_id=payment.id, ended_at=now)
        .returning(TopUpRow.id)
    )
    if ended is not None and state == "failed":
        await emails.note(session, "payment_failed", top_up_id, {"top_up": top_up_id}, organization_id=organization_id)


async def left(session: AsyncSession, *, organization_id: OrganizationId) -> int:
    """Return the credit that is left in nano-USD, after usage that is not drawn yet."""
    opened_at = await session.scalar(
        select(BillingCustomerRow.wallet_opened_at).where(BillingCustomerRow.organization_id == organization_id)
    )
    credit = await wallet.balance(session, organization_id=organization_id)
    if opened_at is None:
        return credit
    used = await _charged_since(session, hour_of(opened_at), organization_id=organization_id)
    planned = await session.scalar(
        select(func.coalesce(func.sum(MeterWindowRow.planned), 0)).where(
            MeterWindowRow.organization_id == organization_id,
            MeterWindowRow.meter == USAGE.event_name,
            MeterWindowRow.starts_at >= hour_of(opened_at),
        )
    )
    return credit - used + int(planned or 0)


async def _charged_since(session: AsyncSession, since: datetime, *, organization_id: OrganizationId) -> int:
    total = await session.scalar(
        select(func.coalesce(func.sum(SpendWindowRow.charge_nano_usd), 0)).where(
            SpendWindowRow.organization_id == organization_id,
            SpendWindowRow.seconds == 3600,
            SpendWindowRow.starts_at >= since,
        )
    )
    return int(total or 0)


async def is_gated(session: AsyncSession, *, organization_id: OrganizationId) -> bool:
    """Tell whether an organization may spend its credit only: it has some, and no subscription that bills usage."""
    opened = await session.scalar(
        select(BillingCustomerRow.wallet_opened_at).where(BillingCustomerRow.organization_id == organization_id)
    )
    if opened is None:
        return False
    billed = await session.scalar(
        select(func.count()).where(
            SubscriptionRow.organization_id == organization_id,
            SubscriptionRow.status.in_(LIVE),
            SubscriptionRow.usage_item_id.is_not(None),
        )
    )
    return not billed


async def settle_gate(session: AsyncSession, *, organization_id: OrganizationId) -> None:
    """Set the budget that credit comes to, or take it away from an organization that is invoiced.

    It is the organization's total budget: everything that it ever spent, and what it may still.
    """
    if await is_gated(session, organization_id=organization_id):
        spent = await _charged_since(session, _EPOCH, organization_id=organization_id)
        limit = spent + await left(session, organization_id=organization_id)
        await budgets.set_budget(
            session,
            ("organization", organization_id),
            "total",
            limit=NanoUsd(min(max(limit, 0), BUDGET_LIMIT_MAX)),
            is_hard=True,
            organization_id=organization_id,
        )
        return
    opened = await session.scalar(
        select(BillingCustomerRow.wallet_opened_at).where(BillingCustomerRow.organization_id == organization_id)
    )
    if opened is None:
        return
    try:
        await budgets.delete_budget(
            session, ("organization", organization_id), "total", organization_id=organization_id
        )
    except TenantNotFound:
        return
