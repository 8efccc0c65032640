"""What Stripe's objects come to in our rows. Takes what was read anew, writes it if it is newer than what is there."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import Range
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from keys import tenants
from metering.billing import emails, news, prepaid
from metering.billing.account_status import ENDED, settle_account_status
from metering.billing.catalog_ids import meter_ids
from metering.billing.meters import USAGE, Meter
from metering.billing.outbox import request_flush
from metering.billing.ownership import lock_account, owner_of_customer
from metering.billing.planning import open_cursors
from metering.billing.plans import Plan, Plans
from metering.billing.revenue import keep_revenue
from metering.billing.stripe_objects import Invoice, Subscription, UsageLine
from metering.billing.tables import (
    BillingPeriodRow,
    InvoiceRow,
    SubscriptionRow,
)

_NEVER_BEGAN: Final = frozenset({"incomplete", "incomplete_expired"})
"""Of subscriptions whose first payment has not come, or not yet."""
_FINAL: Final = frozenset({"open", "paid", "void", "uncollectible"})


async def keep_subscription(
    session: AsyncSession,
    subscription: Subscription,
    plans: Plans,
    *,
    read_at: datetime,
    now: datetime,
    meters: tuple[Meter, ...] = (USAGE,),
) -> OrganizationId | None:
    """Write down a subscription and what follows from it: periods, plan, status, revenue. None: it is not ours.

    One that names no plan, such as an agreement that was made by hand, changes none; its status counts.

    *read_at* is when it was asked for, by PostgreSQL's clock: an older reading changes nothing.
    """
    organization_id = await owner_of_customer(session, subscription.customer_id)
    if organization_id is None:
        return None
    # One at a time for each organization: what holds for it is made of all of its subscriptions.
    await lock_account(session, organization_id=organization_id)
    row = await session.get(SubscriptionRow, subscription.id, with_for_update=True, populate_existing=True)
    if row is None:
        row = SubscriptionRow(id=subscription.id, organization_id=organization_id, read_at=read_at)
        session.add(row)
    elif row.read_at >= read_at or row.organization_id != organization_id:
        return organization_id
    before, told_before = (row.status, row.plan), news.shown(row)
    _fill(row, subscription, read_at, now)
    await _keep_usage_item(session, row, subscription, plans, had_plan=before[1])
    await session.flush()
    if row.status not in _NEVER_BEGAN:
        await _keep_period(session, row, now, organization_id=organization_id)
    if row.usage_item_id is not None:
        await open_cursors(session, meters, organization_id=organization_id)
    await keep_revenue(session, row, now, organization_id=organization_id)
    if row.status in ENDED and before[0] not in ENDED:
        await request_flush(session, now, organization_id=organization_id)
    # Whoever gives a plan locks the organization, and then key changes; the gate takes the budgets' lock, which is in
    # between.
    await tenants.lock_organization(session, organization_id=organization_id)
    if await prepaid.is_gated(session, organization_id=organization_id) != await prepaid.has_gate(
        session, organization_id=organization_id
    ):
        await prepaid.settle_gate(session, now, organization_id=organization_id)
    if before != (row.status, row.plan):
        # Only then: what an operator has given since stays.
        await settle_account_status(session, plans, now, organization_id=organization_id)
    await news.tell_subscription(session, row, told_before, organization_id=organization_id)
    return organization_id


def _fill(row: SubscriptionRow, subscription: Subscription, read_at: datetime, now: datetime) -> None:
    row.plan = subscription.plan or row.plan or ""
    row.price_cents_per_month = subscription.price_cents_per_month
    row.plan_item_id = subscription.plan_item_id
    row.started_at = subscription.started_at
    row.trial_ends_at = subscription.trial_ends_at
    row.cancel_at = subscription.cancel_at
    row.ended_at = subscription.ended_at
    row.period_starts_at = subscription.period_starts_at
    row.period_ends_at = subscription.period_ends_at
    # Collection that is paused in the dashboard looks active: the operator chose not to charge, and to go on serving.
    is_past_due = subscription.status == "past_due"
    row.past_due_since = (row.past_due_since or now) if is_past_due else None
    row.is_grace_over = is_past_due and bool(row.is_grace_over)
    row.status = subscription.status
    row.read_at = read_at


async def _keep_usage_item(
    session: AsyncSession, row: SubscriptionRow, subscription: Subscription, plans: Plans, *, had_plan: str | None
) -> None:
    """Write down the item that bills usage, by its meter whatever its price is, and all prices there ever were."""
    meter_id = (await meter_ids(session)).get(USAGE.event_name)
    items = [item for item in subscription.metered if item.meter_id == meter_id]
    row.usage_item_id = items[0].id if items else None
    row.usage_price_id = items[0].price_id if items else row.usage_price_id
    row.usage_billed_since = (items[0].created_at or row.started_at) if items else None
    row.usage_price_ids = sorted({*(row.usage_price_ids or ()), *(item.price_id for item in items)})
    plan = plans.find(row.plan)
    if plan is not None and not plan.bills_usage:
        row.has_dropped_usage = False
    elif plan is not None and not items and had_plan and had_plan != row.plan:
        # The portal exchanges the plan's price alone.
        row.has_dropped_usage = True
    row.usage_problem = _usage_problem(row, plan, len(items))
    row.plan_price_ids = sorted({*(row.plan_price_ids or ()), *subscription.plan_price_ids})


def _usage_problem(row: SubscriptionRow, plan: Plan | None, items: int) -> str | None:
    """Return what is wrong with so many *items* that bill usage. An agreement that is no plan of ours may have one."""
    if items > 1:
        return "two items bill usage"
    if plan is None:
        return None
    if items and not plan.bills_usage:
        return "the plan includes usage, and an item bills it"
    if plan.bills_usage and not items and not row.has_dropped_usage:
        return "the plan bills usage, and no item does"
    return None


async def _keep_period(
    session: AsyncSession, row: SubscriptionRow, now: datetime, *, organization_id: OrganizationId
) -> None:
    """Keep the present period; one in which usage begins or ceases to be billed is cut there.

    By Stripe's time where it begins, which the item has; as of now where it ceases, since nothing tells when that was.
    """
    ends_at = min(row.period_ends_at, row.ended_at or row.period_ends_at)
    is_metered = row.usage_item_id is not None
    kind = (is_metered, row.status == "trialing", row.has_dropped_usage and not is_metered)
    last = await _last_part(session, row, organization_id=organization_id)
    starts_at = row.period_starts_at
    if last is not None:
        is_same = kind == (last.is_metered, last.is_trial, last.is_handed_over)
        if last.is_closed and is_same:
            return
        if is_same or row.status in ENDED:
            last.ends_at = max(ends_at, last.starts_at)
            return
        if last.is_metered and not is_metered and row.has_forgotten_usage and not last.is_closed:
            # From its beginning: what was counted in it is another's to bill, or was a trial's.
            last.is_metered, last.is_handed_over = False, True
            return
        cut_at = now.replace(microsecond=0)
        if not last.is_metered:
            # By Stripe's clock, which says from when on it bills.
            cut_at = row.usage_billed_since or cut_at
        if cut_at >= ends_at:
            # It is over: what it was is what it stays.
            return
        if cut_at <= last.starts_at:
            last.is_metered, last.is_trial, last.is_handed_over = kind
            return
        last.ends_at, starts_at = cut_at, cut_at
    if starts_at < ends_at:
        await _end_earlier(session, row, starts_at, organization_id=organization_id)
        session.add(
            BillingPeriodRow(
                subscription_id=row.id,
                starts_at=starts_at,
                ends_at=ends_at,
                organization_id=organization_id,
                is_metered=kind[0],
                is_trial=kind[1],
                is_handed_over=kind[2],
                is_closed=False,
            )
        )
        await session.flush()


async def _last_part(
    session: AsyncSession, row: SubscriptionRow, *, organization_id: OrganizationId
) -> BillingPeriodRow | None:
    """Return the latest part of the subscription's present period."""
    return await session.scalar(
        select(BillingPeriodRow)
        .where(
            BillingPeriodRow.organization_id == organization_id,
            BillingPeriodRow.subscription_id == row.id,
            BillingPeriodRow.starts_at >= row.period_starts_at,
        )
        .order_by(BillingPeriodRow.starts_at.desc())
        .limit(1)
    )


async def _end_earlier(
    session: AsyncSession, row: SubscriptionRow, starts_at: datetime, *, organization_id: OrganizationId
) -> None:
    """End periods that another one cuts short, such as a trial's that was ended early: none reaches into the next."""
    await session.execute(
        update(BillingPeriodRow)
        .where(
            BillingPeriodRow.organization_id == organization_id,
            BillingPeriodRow.subscription_id == row.id,
            BillingPeriodRow.starts_at < starts_at,
            BillingPeriodRow.ends_at > starts_at,
        )
        .values(ends_at=starts_at)
    )


async def keep_invoice(
    session: AsyncSession, invoice: Invoice, *, read_at: datetime, now: datetime
) -> OrganizationId | None:
    """Write down an invoice and what follows from it: a draft is waited for, a final one closes its period."""
    organization_id = await owner_of_customer(session, invoice.customer_id)
    if organization_id is None:
        return None
    subscription = await session.scalar(
        select(SubscriptionRow).where(
            SubscriptionRow.organization_id == organization_id, SubscriptionRow.id == invoice.subscription_id
        )
    )
    usage = _usage_of(invoice, subscription)
    row = await session.get(InvoiceRow, invoice.id, with_for_update=True)
    if row is None:
        row = InvoiceRow(id=invoice.id, organization_id=organization_id)
        session.add(row)
    elif row.read_at >= read_at:
        return organization_id
    was_paid = row.status == "paid"
    row.subscription_id, row.number, row.status = invoice.subscription_id, invoice.number, invoice.status
    row.currency, row.issued_at, row.read_at = invoice.currency, invoice.issued_at, read_at
    row.total_cents, row.paid_cents, row.due_cents = invoice.total_cents, invoice.paid_cents, invoice.due_cents
    row.page_url, row.pdf_url = invoice.page_url, invoice.pdf_url
    row.has_other_lines = _has_other_lines(invoice, subscription)
    if usage is not None:
        row.usage_micro_usd = usage.quantity
        row.usage_starts_at, row.usage_ends_at = usage.starts_at, usage.ends_at
        row.usage_spans = usage.spans
    await session.flush()
    if invoice.status == "draft":
        await request_flush(session, now, organization_id=organization_id)
    elif usage is not None and invoice.status in _FINAL and invoice.subscription_id is not None:
        await _close_period(session, invoice.subscription_id, usage, organization_id=organization_id)
    is_newly_failed = await emails.note_invoice(session, invoice, organization_id=organization_id)
    is_newly_paid = invoice.status == "paid" and not was_paid
    await news.tell_invoice(
        session,
        invoice,
        is_newly_paid=is_newly_paid,
        is_newly_failed=is_newly_failed,
        organization_id=organization_id,
    )
    return organization_id


class _InvoicedUsage(NamedTuple):
    """Usage that an invoice bills, in the meter's unit, and the time that it is of."""

    quantity: int
    starts_at: datetime
    ends_at: datetime
    spans: list[Range[datetime]]
    """Without what is between its lines."""


def _usage_of(invoice: Invoice, subscription: SubscriptionRow | None) -> _InvoicedUsage | None:
    """Return what an invoice bills of usage: the sum of its lines at prices that ever billed it.

    There may be several of one period, where the price was exchanged or usage was included for a while. A first invoice
    may have one of nothing too, for the period that begins: it closes nothing.
    """
    if subscription is None:
        return None
    lines = [
        line
        for line in invoice.lines
        if _bills_usage(line, subscription) and line.starts_at < line.ends_at <= invoice.issued_at
    ]
    if not lines:
        return None
    return _InvoicedUsage(
        sum(line.quantity for line in lines),
        min(line.starts_at for line in lines),
        max(line.ends_at for line in lines),
        [Range(line.starts_at, line.ends_at) for line in lines],
    )


def _bills_usage(line: UsageLine, subscription: SubscriptionRow) -> bool:
    if line.subscription_item_id is not None and line.subscription_item_id == subscription.usage_item_id:
        return True
    return line.price_id in subscription.usage_price_ids


def _has_other_lines(invoice: Invoice, subscription: SubscriptionRow | None) -> bool:
    """Tell whether there are lines of neither the plan nor usage, such as of a price that we never saw."""
    if subscription is None:
        return bool(invoice.lines)
    known = {subscription.plan_item_id, *subscription.plan_price_ids} - {None}
    return any(
        not (_bills_usage(line, subscription) or line.subscription_item_id in known or line.price_id in known)
        for line in invoice.lines
    )


async def _close_period(
    session: AsyncSession, subscription_id: str, usage: _InvoicedUsage, *, organization_id: OrganizationId
) -> None:
    """Write down that what is told of a period does not count any more."""
    closed = await session.execute(
        update(BillingPeriodRow)
        .where(
            BillingPeriodRow.organization_id == organization_id,
            BillingPeriodRow.subscription_id == subscription_id,
            BillingPeriodRow.is_metered,
            BillingPeriodRow.ends_at > usage.starts_at,
            BillingPeriodRow.starts_at < usage.ends_at,
        )
        .values(is_closed=True)
        .returning(BillingPeriodRow.starts_at)
    )
    if closed.all():
        return
    # One that we never saw: it was over when we heard of it, or usage was not billed in it any more.
    period = BillingPeriodRow(
        subscription_id=subscription_id,
        starts_at=usage.starts_at,
        ends_at=usage.ends_at,
        organization_id=organization_id,
        is_metered=True,
        is_closed=True,
    )
    seen = await session.get(BillingPeriodRow, (subscription_id, usage.starts_at))
    if seen is not None and seen.ends_at > usage.ends_at:
        session.add(
            BillingPeriodRow(
                subscription_id=subscription_id,
                starts_at=usage.ends_at,
                ends_at=seen.ends_at,
                organization_id=organization_id,
                is_metered=False,
                is_handed_over=seen.is_handed_over,
                is_closed=False,
            )
        )
    await session.merge(period)
    await session.flush()


async def drafts_of(session: AsyncSession, customer_id: str) -> set[str]:
    """Return the customer's invoices that are drafts as far as we know."""
    owner = await owner_of_customer(session, customer_id)
    rows = await session.scalars(
        select(InvoiceRow.id).where(InvoiceRow.organization_id == owner, InvoiceRow.status == "draft")
    )
    return set(rows)


async def forget_draft(session: AsyncSession, invoice_id: str) -> OrganizationId | None:
    """Write down that a draft was deleted at Stripe; return whose it was."""
    row = await session.get(InvoiceRow, invoice_id, with_for_update=True)
    if row is None:
        return None
    if row.status == "draft":
        row.status = "deleted"
    return OrganizationId(row.organization_id)
