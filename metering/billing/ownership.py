"""Whose a customer at Stripe is."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from metering.billing.tables import BillingCustomerRow


async def owner_of_customer(session: AsyncSession, customer_id: str) -> OrganizationId | None:
    """Return whose customer that is. None: not one that we made, so that nothing follows from it.

    What an object says of itself, such as an organization in its metadata, is not asked: whoever can write there could
    pay with another's subscription.
    """
    found = await session.scalar(
        select(BillingCustomerRow.organization_id).where(BillingCustomerRow.stripe_customer_id == customer_id)
    )
    return None if found is None else OrganizationId(found)


async def lock_account(session: AsyncSession, *, organization_id: OrganizationId) -> BillingCustomerRow | None:
    """Return an organization's account when nobody else works on it: its credit, its subscriptions, its plan.

    The first lock that a transaction takes, before a cursor's, the budgets' and that of key changes.
    """
    return await session.scalar(
        select(BillingCustomerRow)
        .where(BillingCustomerRow.organization_id == organization_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )


async def keep_customer(session: AsyncSession, customer_id: str, *, organization_id: OrganizationId) -> str:
    """Note an organization's customer at Stripe, unless it has one; return the one that it has."""
    await session.execute(
        update(BillingCustomerRow)
        .where(BillingCustomerRow.organization_id == organization_id, BillingCustomerRow.stripe_customer_id.is_(None))
        .values(stripe_customer_id=customer_id)
    )
    kept = await session.scalar(
        select(BillingCustomerRow.stripe_customer_id).where(BillingCustomerRow.organization_id == organization_id)
    )
    return kept or customer_id


async def keep_address(session: AsyncSession, customer_id: str, email: str) -> None:
    """Note where a customer's mails go, as it was said at a checkout, unless that is known."""
    await session.execute(
        update(BillingCustomerRow)
        .where(BillingCustomerRow.stripe_customer_id == customer_id, BillingCustomerRow.email.is_(None))
        .values(email=email)
    )


async def set_address(session: AsyncSession, email: str, *, organization_id: OrganizationId) -> None:
    """Say where an organization's mails go, whatever was said before."""
    await session.execute(
        insert(BillingCustomerRow)
        .values(organization_id=organization_id, email=email)
        .on_conflict_do_update(index_elements=[BillingCustomerRow.organization_id], set_={"email": email})
    )
