"""What an organization, and the operator, see of billing: our own rows, which can be read while Stripe is down."""

from __future__ import annotations

from datetime import datetime

import msgspec
from sqlalchemy import and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from core.money import usd_text
from keys.budgets import period_bounds
from metering.billing import prepaid, wallet
from metering.billing.account_status import LIVE
from metering.billing.meters import USAGE
from metering.billing.stripe_objects import Subscription
from metering.billing.tables import (
    BillingCustomerRow,
    InvoiceRow,
    MeterWindowRow,
    SubscriptionRow,
    WalletPostingRow,
    WalletTransferRow,
)
from metering.billing.windows import HOUR, hour_of, minute_of
from metering.tables import SpendWindowRow


class SubscriptionView(msgspec.Struct, frozen=True, kw_only=True):
    """A subscription as Stripe last described it, at *read_at*."""

    id: str
    plan: str
    status: str
    price_cents_per_month: int
    bills_usage: bool
    current_period_start: datetime
    current_period_end: datetime
    trial_end: datetime | None
    cancel_at: datetime | None
    ended_at: datetime | None
    read_at: datetime


class InvoiceView(msgspec.Struct, frozen=True, kw_only=True):
    """An invoice as Stripe last described it, at *read_at*. *usage_micro_usd* is what it bills of the ledger."""

    id: str
    number: str | None
    status: str
    currency: str
    total_cents: int
    paid_cents: int
    due_cents: int
    usage_micro_usd: int | None
    usage_start: datetime | None
    usage_end: datetime | None
    page_url: str | None
    pdf_url: str | None
    created: datetime
    read_at: datetime


class TransferView(msgspec.Struct, frozen=True, kw_only=True):
    """A movement of credit, in nano-USD; below zero it was used."""

    id: str
    kind: str
    nano_usd: int
    note: str | None
    created: datetime


class WalletView(msgspec.Struct, frozen=True, kw_only=True):
    """Credit in nano-USD: what is booked, and what is left after usage that is not booked yet."""

    balance_nano_usd: int
    available_nano_usd: int
    is_prepaid: bool
    """Whether calls are refused when nothing is left."""
    top_up_below_cents: int | None
    top_up_cents: int | None
    transfers: list[TransferView]


class PresentCharge(msgspec.Struct, frozen=True, kw_only=True):
    """What was charged in a period so far."""

    charge_usd: str
    starts_at: datetime
    ends_at: datetime


async def current_subscription(session: AsyncSession, *, organization_id: OrganizationId) -> SubscriptionView | None:
    """Return the subscription that holds, or the last one that did."""
    row = await session.scalar(
        select(SubscriptionRow)
        .where(SubscriptionRow.organization_id == organization_id)
        .order_by(SubscriptionRow.status.in_(LIVE).desc(), SubscriptionRow.started_at.desc())
        .limit(1)
    )
    if row is None:
        return None
    return SubscriptionView(
        id=row.id,
        plan=row.plan,
        status=row.status,
        price_cents_per_month=row.price_cents_per_month,
        bills_usage=row.usage_item_id is not None,
        current_period_start=row.period_starts_at,
        current_period_end=row.period_ends_at,
        trial_end=row.trial_ends_at,
        cancel_at=row.cancel_at,
        ended_at=row.ended_at,
        read_at=row.read_at,
    )


def view_of(subscription: Subscription, read_at: datetime) -> SubscriptionView:
    """Return a subscription as Stripe has just described it."""
    return SubscriptionView(
        id=subscription.id,
        plan=subscription.plan or "",
        status=subscription.status,
        price_cents_per_month=subscription.price_cents_per_month,
        bills_usage=bool(subscription.metered),
        current_period_start=subscription.period_starts_at,
        current_period_end=subscription.period_ends_at,
        trial_end=subscription.trial_ends_at,
        cancel_at=subscription.cancel_at,
        ended_at=subscription.ended_at,
        read_at=read_at,
    )


async def list_invoices(
    session: AsyncSession, limit: int, *, organization_id: OrganizationId, after: str | None = None
) -> list[InvoiceView]:
    """Return an organization's invoices, newest first, from behind the one with the id *after* on."""
    statement = select(InvoiceRow).where(InvoiceRow.organization_id == organization_id)
    if after is not None:
        marker = select(InvoiceRow.issued_at).where(
            InvoiceRow.organization_id == organization_id, InvoiceRow.id == after
        )
        statement = statement.where(
            (InvoiceRow.issued_at < marker.scalar_subquery())
            | ((InvoiceRow.issued_at == marker.scalar_subquery()) & (InvoiceRow.id < after))
        )
    rows = await session.scalars(statement.order_by(InvoiceRow.issued_at.desc(), InvoiceRow.id.desc()).limit(limit))
    return [
        InvoiceView(
            id=row.id,
            number=row.number,
            status=row.status,
            currency=row.currency,
            total_cents=row.total_cents,
            paid_cents=row.paid_cents,
            due_cents=row.due_cents,
            usage_micro_usd=row.usage_micro_usd,
            usage_start=row.usage_starts_at,
            usage_end=row.usage_ends_at,
            page_url=row.page_url,
            pdf_url=row.pdf_url,
            created=row.issued_at,
            read_at=row.read_at,
        )
        for row in rows
    ]


async def wallet_of(session: AsyncSession, limit: int, now: datetime, *, organization_id: OrganizationId) -> WalletView:
    """Return an organization's credit and its last movements, newest first."""
    customer = await session.scalar(
        select(BillingCustomerRow).where(BillingCustomerRow.organization_id == organization_id)
    )
    rows = await session.execute(
        select(WalletTransferRow, WalletPostingRow.nano_usd)
        .join(
            WalletPostingRow,
            and_(WalletPostingRow.transfer_id == WalletTransferRow.id, WalletPostingRow.account == "credit"),
        )
        .where(WalletTransferRow.organization_id == organization_id)
        .order_by(WalletTransferRow.id.desc())
        .limit(limit)
    )
    transfers = [
        TransferView(id=row.id, kind=row.kind, nano_usd=int(amount), note=row.note, created=row.created_at)
        for row, amount in rows
    ]
    return WalletView(
        balance_nano_usd=await wallet.balance(session, organization_id=organization_id),
        available_nano_usd=await prepaid.left(session, now, organization_id=organization_id),
        is_prepaid=await prepaid.is_gated(session, organization_id=organization_id),
        top_up_below_cents=None if customer is None else customer.top_up_below_cents,
        top_up_cents=None if customer is None else customer.top_up_cents,
        transfers=transfers,
    )


async def present_charge(session: AsyncSession, now: datetime, *, organization_id: OrganizationId) -> PresentCharge:
    """Return what was charged since the present period began: the subscription's, or else the calendar month."""
    row = await session.scalar(
        select(SubscriptionRow)
        .where(SubscriptionRow.organization_id == organization_id, SubscriptionRow.status.in_(LIVE))
        .order_by(SubscriptionRow.started_at.desc())
        .limit(1)
    )
    starts_at, ends_at = period_bounds("month", now)
    if row is not None and row.period_starts_at <= now:
        starts_at, ends_at = row.period_starts_at, row.period_ends_at
    charge = func.coalesce(func.sum(SpendWindowRow.charge_nano_usd), 0)
    total = await session.scalar(
        select(charge).where(
            SpendWindowRow.organization_id == organization_id,
            SpendWindowRow.seconds == 3600,
            SpendWindowRow.starts_at >= hour_of(starts_at),
        )
    )
    before = await _before(session, starts_at, organization_id=organization_id)
    return PresentCharge(charge_usd=usd_text(int(total or 0) - before), starts_at=starts_at, ends_at=ends_at)


async def _before(session: AsyncSession, starts_at: datetime, *, organization_id: OrganizationId) -> int:
    """Return what was charged before a period in the hour in which it began, in nano-USD."""
    first, own = hour_of(starts_at), SpendWindowRow.organization_id == organization_id
    charge = func.coalesce(func.sum(SpendWindowRow.charge_nano_usd), 0)
    minutes = select(charge).where(
        own, SpendWindowRow.seconds == 60, SpendWindowRow.starts_at >= first, SpendWindowRow.starts_at < first + HOUR
    )
    hour = select(charge).where(own, SpendWindowRow.seconds == 3600, SpendWindowRow.starts_at == first)
    before = minutes.where(SpendWindowRow.starts_at < minute_of(starts_at))
    # Minutes are kept for a week; by then the hour is planned, in windows that are cut where the period begins.
    planned = select(func.coalesce(func.sum(MeterWindowRow.planned), 0)).where(
        MeterWindowRow.organization_id == organization_id,
        MeterWindowRow.meter == USAGE.event_name,
        MeterWindowRow.starts_at >= first,
        MeterWindowRow.starts_at < minute_of(starts_at),
    )
    has_minutes = await session.scalar(select(minutes.scalar_subquery() == hour.scalar_subquery()))
    return int(await session.scalar(before if has_minutes else planned) or 0)
