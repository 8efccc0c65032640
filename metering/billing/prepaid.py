"""Credit that is paid beforehand: what a payment adds, what is left, and the budget that keeps spending below it.

An organization with credit and no subscription may spend what is left and no more: a hard budget says so, to the call
(`keys/quota.lua`). With a subscription credit is used first, and the rest is invoiced.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from core.money import NANO_USD_PER_CENT, NanoUsd
from keys.dimensions import BUDGET_LIMIT_MAX
from keys.tables import BudgetRow
from metering import budgets
from metering.billing import emails, wallet
from metering.billing.account_status import LIVE
from metering.billing.meters import USAGE
from metering.billing.ownership import lock_account, owner_of_customer
from metering.billing.planning import open_cursors, owed
from metering.billing.stripe_objects import Payment
from metering.billing.tables import BillingCustomerRow, SubscriptionRow, TopUpRow
from metering.tables import SpendWindowRow

TOP_UP_METADATA: Final = "aap_top_up"
"""The key in a payment's metadata that says it buys credit: `checkout`, or the id of a top-up of ours."""
_ENDS: Final = {
    "succeeded": "paid",
    "requires_payment_method": "failed",
    "requires_action": "failed",
    "canceled": "failed",
}


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
    account = await lock_account(session, organization_id=organization_id)
    assert account is not None
    if account.wallet_opened_at is None:
        account.wallet_opened_at = now
        await session.flush()
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
        await settle_gate(session, now, organization_id=organization_id)
    return is_new


async def _end_top_up(
    session: AsyncSession, top_up_id: str, payment: Payment, now: datetime, *, organization_id: OrganizationId
) -> None:
    """Write down how a top-up of ours ended, if it was one and has."""
    # One that needs its owner to be there is none that happens by itself; if it is paid after all, it counts.
    state = _ENDS.get(payment.status)
    if state is None:
        return
    # One that was given up and is paid after all is paid.
    was_open = TopUpRow.state == "open" if state == "failed" else TopUpRow.state != "paid"
    ended = await session.scalar(
        update(TopUpRow)
        .where(TopUpRow.organization_id == organization_id, TopUpRow.id == top_up_id, was_open)
        .values(state=state, payment_intent_id=payment.id, ended_at=now)
        .returning(TopUpRow.cents)
    )
    if ended is not None and state == "failed":
        await emails.note_top_up(session, top_up_id, ended, organization_id=organization_id)


async def left(session: AsyncSession, now: datetime, *, organization_id: OrganizationId) -> int:
    """Return the credit that is left in nano-USD, after usage that is not drawn yet."""
    credit = await wallet.balance(session, organization_id=organization_id)
    if not await _has_wallet(session, organization_id=organization_id):
        return credit
    return credit - await owed(session, now, credit=credit, organization_id=organization_id)


async def is_gated(session: AsyncSession, *, organization_id: OrganizationId) -> bool:
    """Tell whether an organization may spend its credit only: it has some, and no subscription."""
    if not await _has_wallet(session, organization_id=organization_id):
        return False
    live = await session.scalar(
        select(func.count()).where(SubscriptionRow.organization_id == organization_id, SubscriptionRow.status.in_(LIVE))
    )
    return not live


async def settle_gate(session: AsyncSession, now: datetime, *, organization_id: OrganizationId) -> None:
    """Set the budget that credit comes to, or take it away from an organization that has a subscription.

    It holds everything that the organization ever spent, and what it may still. The account is locked by this
    transaction; settlements wait until it ends, so that none falls between what was spent and what is left.
    """
    if not await is_gated(session, organization_id=organization_id):
        await open_gate(session, organization_id=organization_id)
        return
    await budgets.hold_settlements(session)
    await budgets.set_budget(
        session,
        ("credit", organization_id),
        "total",
        limit=await _limit(session, now, organization_id=organization_id),
        is_hard=True,
        organization_id=organization_id,
    )


async def _limit(session: AsyncSession, now: datetime, *, organization_id: OrganizationId) -> NanoUsd:
    spent = await session.scalar(
        select(func.coalesce(func.sum(SpendWindowRow.charge_nano_usd), 0)).where(
            SpendWindowRow.organization_id == organization_id, SpendWindowRow.seconds == 3600
        )
    )
    limit = int(spent or 0) + await left(session, now, organization_id=organization_id)
    return NanoUsd(min(max(limit, 0), BUDGET_LIMIT_MAX))


async def correct_gate(session: AsyncSession, now: datetime, *, organization_id: OrganizationId) -> None:
    """Set the budget anew where it is not what credit comes to: what an invoice paid was corrected, or came late.

    Changes nothing, and holds up no settlement, where the two agree.
    """
    await lock_account(session, organization_id=organization_id)
    limit = await session.scalar(
        select(BudgetRow.limit_nano_usd).where(
            BudgetRow.organization_id == organization_id, BudgetRow.scope == "credit"
        )
    )
    if limit is not None and limit != await _limit(session, now, organization_id=organization_id):
        await settle_gate(session, now, organization_id=organization_id)


async def open_gate(session: AsyncSession, *, organization_id: OrganizationId) -> None:
    """Let an organization spend more than its credit. Changes nothing where it may."""
    if await has_gate(session, organization_id=organization_id):
        await budgets.delete_budget(session, ("credit", organization_id), "total", organization_id=organization_id)


async def has_gate(session: AsyncSession, *, organization_id: OrganizationId) -> bool:
    """Tell whether an organization is held to its credit now."""
    found = await session.scalar(
        select(BudgetRow.id).where(BudgetRow.organization_id == organization_id, BudgetRow.scope == "credit")
    )
    return found is not None


async def _has_wallet(session: AsyncSession, *, organization_id: OrganizationId) -> bool:
    opened = await session.scalar(
        select(BillingCustomerRow.wallet_opened_at).where(BillingCustomerRow.organization_id == organization_id)
    )
    return opened is not None
