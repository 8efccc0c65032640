"""What an organization may do, by what it pays: plan and status follow its subscriptions, whatever order they came in.

Only what billing did is undone by billing: an organization that an operator suspended stays so, and one that never had
a subscription keeps the plan that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from keys import tenants
from keys.errors import BILLING_PREFIX
from metering.billing.ownership import lock_account
from metering.billing.plans import Plans
from metering.billing.tables import SubscriptionRow

SERVED: Final = frozenset({"trialing", "active", "past_due"})
ENDED: Final = frozenset({"canceled", "incomplete_expired"})
LIVE: Final = SERVED | {"unpaid", "paused"}
RENEWED: Final = LIVE - {"paused"}
"""One period follows the other. A paused one's goes on when its owner says so."""
PAYING: Final = frozenset({"active", "past_due"})
"""What recurs counts as revenue."""
# Whichever comes first says what holds where there are several: an unpaid one takes nothing from one that is paid.
_ORDER: Final = ("active", "trialing", "past_due", "unpaid", "paused")
_REASONS: Final = {
    "past_due": f"{BILLING_PREFIX}payment_failed",
    "unpaid": f"{BILLING_PREFIX}payment_failed",
    "paused": f"{BILLING_PREFIX}subscription_paused",
}
_ENDED_FOR: Final = f"{BILLING_PREFIX}subscription_ended"


class AccountStatus(NamedTuple):
    """A plan's name, or None for no change of it; and why the organization is suspended, or None."""

    plan: str | None
    suspended_for: str | None


def account_status_of(subscriptions: Sequence[SubscriptionRow], plans: Plans, now: datetime) -> AccountStatus:
    """Return what *subscriptions*, all that an organization ever had, come to.

    One that could not be paid from the start (incomplete) gives nothing. After the last has ended, the default plan
    holds; where there is none, nothing does.
    """
    live = [row for row in subscriptions if row.status in LIVE]
    if not live:
        has_ended = any(row.status == "canceled" for row in subscriptions)
        default = plans.billing.default_plan
        return AccountStatus(default if has_ended else None, _ENDED_FOR if has_ended and default is None else None)
    best = min(live, key=lambda row: (_ORDER.index(row.status), -row.started_at.timestamp()))
    if best.status == "past_due" and not is_overdue(best, plans, now):
        return AccountStatus(best.plan or None, None)
    return AccountStatus(best.plan or None, _REASONS.get(best.status))


def is_overdue(row: SubscriptionRow, plans: Plans, now: datetime) -> bool:
    """Tell whether the days of grace after a failed payment are over."""
    since = row.past_due_since
    return since is not None and now - since >= timedelta(days=plans.billing.grace_days)


async def settle_account_status(
    session: AsyncSession, plans: Plans, now: datetime, *, organization_id: OrganizationId
) -> bool:
    """Give an organization the plan and status that its subscriptions come to; tell whether anything changed.

    Gateways read of it within two seconds (`keys/revocation.py`). Running calls finish, and are metered.
    """
    if not plans.by_name:
        # No plans, or a file that could not be read: nothing follows from what is not there.
        return False
    status = await _account_status(session, plans, now, organization_id=organization_id)
    organization = await tenants.get_organization(session, organization_id=organization_id)
    has_changed = False
    if status.plan is not None and status.plan != organization.plan:
        await tenants.set_plan(session, status.plan, organization_id=organization_id)
        has_changed = True
    return await _settle_suspension(session, status, organization) or has_changed


async def overdue_organizations(session: AsyncSession, plans: Plans, now: datetime) -> list[OrganizationId]:
    """Return whose days of grace are over, and of whom nothing followed from that yet."""
    if not plans.by_name:
        return []
    rows = await session.scalars(
        select(SubscriptionRow.organization_id)
        .where(
            SubscriptionRow.status == "past_due",
            ~SubscriptionRow.is_grace_over,
            SubscriptionRow.past_due_since <= now - timedelta(days=plans.billing.grace_days),
        )
        .distinct()
    )
    return [OrganizationId(organization_id) for organization_id in rows]


async def end_grace(session: AsyncSession, plans: Plans, now: datetime, *, organization_id: OrganizationId) -> None:
    """Suspend an organization that did not pay, unless another subscription serves it: once, at the end of the grace.

    What an operator gives or lifts afterwards stays, until something changes at Stripe.
    """
    await lock_account(session, organization_id=organization_id)
    status = await _account_status(session, plans, now, organization_id=organization_id)
    organization = await tenants.get_organization(session, organization_id=organization_id)
    await _settle_suspension(session, status, organization)
    await session.execute(
        update(SubscriptionRow)
        .where(
            SubscriptionRow.organization_id == organization_id,
            SubscriptionRow.past_due_since <= now - timedelta(days=plans.billing.grace_days),
        )
        .values(is_grace_over=True)
    )


async def _account_status(
    session: AsyncSession, plans: Plans, now: datetime, *, organization_id: OrganizationId
) -> AccountStatus:
    rows = await session.scalars(select(SubscriptionRow).where(SubscriptionRow.organization_id == organization_id))
    return account_status_of(list(rows), plans, now)


async def _settle_suspension(session: AsyncSession, status: AccountStatus, organization: tenants.Organization) -> bool:
    """Suspend an organization or let it go on, unless an operator suspended it; tell whether that changed anything."""
    is_ours = organization.status == "active" or (organization.status_reason or "").startswith(BILLING_PREFIX)
    wanted = "active" if status.suspended_for is None else "suspended"
    if not is_ours or (wanted, status.suspended_for) == (organization.status, organization.status_reason):
        return False
    await tenants.set_status(session, wanted, status.suspended_for, organization_id=organization.id)
    return True
