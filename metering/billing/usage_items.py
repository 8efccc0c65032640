"""Which subscription bills an organization's usage: one, where it has several.

The meter is the customer's, so that each of two subscriptions with an item for it would bill all usage. Only the
dashboard can make a second one. The item of all but one is taken off at Stripe, and put back when that one is over.
Stripe down, or unwilling: nothing is changed, every look tries again, and `agreement` tells the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import structlog
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import Database, database_now
from core.ids import OrganizationId
from metering.billing.account_status import LIVE
from metering.billing.catalog_ids import sold_at
from metering.billing.errors import StripeFailed
from metering.billing.meters import Meter
from metering.billing.plans import Plans
from metering.billing.projection import keep_subscription
from metering.billing.stripe_api import StripeApi
from metering.billing.tables import SubscriptionRow

# Of several that could bill usage: one that is paid, or will be.
_BILLS_FIRST: Final = ("active", "past_due", "trialing", "unpaid", "paused")
_CHANGES_MAX: Final = 6
"""At one look. There are two where one subscription takes over from another."""
_log = structlog.get_logger(__name__)


class UsageItemChange(NamedTuple):
    """What is to be done next: take *item_id* off a subscription, or (None) put an item of *price_id* on."""

    subscription_id: str
    item_id: str | None
    is_forgotten: bool = False
    """Whether nothing of what the item counted is billed: another one counted it too, or it was a trial's."""
    price_id: str | None = None
    """None: the price that is sold."""


class UsageItems:
    """Keeps an organization's usage billed once. Errors: those of `core.database.DOWN`."""

    def __init__(
        self,
        database: Database,
        api: StripeApi,
        clock: Clock,
        plans: Callable[[], Plans],
        *,
        meters: tuple[Meter, ...],
    ) -> None:
        self._database = database
        self._api = api
        self._clock = clock
        self._plans = plans
        self._meters = meters

    async def settle(self, customer_id: str, organization_id: OrganizationId) -> None:
        """Have one subscription bill usage. What Stripe refuses, or cannot be asked, holds up nothing else."""
        async with self._database.transaction() as session:
            change = await next_change(session, self._plans(), organization_id=organization_id)
        try:
            for _ in range(_CHANGES_MAX):
                # Ours may be old: before anything is changed, all are read anew.
                if change is None or (change := await self._read_anew(customer_id, organization_id)) is None:
                    return
                if not await self._change(change, organization_id):
                    return
        except StripeFailed as error:
            _log.error("subscription.usage_item_stays", organization_id=organization_id, error=str(error))

    async def _read_anew(self, customer_id: str, organization_id: OrganizationId) -> UsageItemChange | None:
        async with self._database.transaction() as session:
            read_at = await database_now(session)
        found = [one async for one in self._api.list_subscriptions(customer_id)]
        async with self._database.transaction() as session:
            for one in found:
                await keep_subscription(
                    session, one, self._plans(), read_at=read_at, now=self._clock.now(), meters=self._meters
                )
            return await next_change(session, self._plans(), organization_id=organization_id)

    async def _change(self, change: UsageItemChange, organization_id: OrganizationId) -> bool:
        """Make one change at Stripe, and keep what it answers; False where there is no price to put on."""
        is_dropped = change.item_id is not None
        _log.error("subscription.doubled" if is_dropped else "subscription.bills_again", id=change.subscription_id)
        async with self._database.transaction() as session:
            read_at = await database_now(session)
            price_id = change.price_id or (await sold_at(session)).usage_price
            if is_dropped:
                # Before Stripe is asked: else nobody would know that it was us.
                await _mark(session, change, organization_id=organization_id)
        if not is_dropped and price_id is None:
            return False
        params: Any = {
            "items": [{"id": change.item_id, "deleted": True} if is_dropped else {"price": price_id}],
            "proration_behavior": "none" if change.is_forgotten or not is_dropped else "create_prorations",
        }
        changed = await self._api.update_subscription(change.subscription_id, params)
        async with self._database.transaction() as session:
            # Locks the account before the subscription, as all do.
            await keep_subscription(
                session, changed, self._plans(), read_at=read_at, now=self._clock.now(), meters=self._meters
            )
            if not is_dropped:
                await _mark(session, change, organization_id=organization_id)
        return True


async def next_change(
    session: AsyncSession, plans: Plans, *, organization_id: OrganizationId
) -> UsageItemChange | None:
    """Return what keeps usage from being billed twice, or by nobody; None where it is billed once.

    The subscription that is paid bills it; of equals the one that does so already, or else the oldest.
    """
    found = await session.scalars(
        select(SubscriptionRow).where(
            SubscriptionRow.organization_id == organization_id, SubscriptionRow.status.in_(LIVE)
        )
    )
    rows = list(found)
    for row in rows:
        # Under another plan since, which includes usage, it is to have none.
        row.has_dropped_usage = row.has_dropped_usage and _is_billed(row, plans)
    able = sorted(
        (row for row in rows if row.usage_item_id is not None or row.has_dropped_usage),
        key=lambda row: (_BILLS_FIRST.index(row.status), row.usage_item_id is None, row.started_at, row.id),
    )
    having = sorted(
        (row for row in able if row.usage_item_id is not None),
        key=lambda row: (row.usage_billed_since or row.started_at, row.id),
    )
    if len(having) > 1:
        # The older item has counted all that the newest one has. A trial's has counted what is free.
        tried = [row for row in having if row.status == "trialing" and row is not able[0]]
        loser = tried[0] if tried else having[-1]
        return UsageItemChange(loser.id, loser.usage_item_id, is_forgotten=True)
    if having and having[0] is not able[0]:
        return UsageItemChange(having[0].id, having[0].usage_item_id, is_forgotten=having[0].status == "trialing")
    if able and able[0].usage_item_id is None:
        return UsageItemChange(able[0].id, None, price_id=able[0].usage_price_id)
    return None


def _is_billed(row: SubscriptionRow, plans: Plans) -> bool:
    """Tell whether a subscription's usage is billed: also that of an agreement which no plan of ours describes."""
    plan = plans.find(row.plan)
    return plan is None or plan.bills_usage


async def _mark(session: AsyncSession, change: UsageItemChange, *, organization_id: OrganizationId) -> None:
    """Remember that it was us who took a subscription's usage item off, and how; or that it is back."""
    is_dropped = change.item_id is not None
    await session.execute(
        update(SubscriptionRow)
        .where(SubscriptionRow.organization_id == organization_id, SubscriptionRow.id == change.subscription_id)
        .values(has_dropped_usage=is_dropped, has_forgotten_usage=is_dropped and change.is_forgotten)
    )
