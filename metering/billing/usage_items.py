"""Which subscription bills an organization's usage: one, where it has several.

The meter is the customer's, so that each of two subscriptions with an item for it would bill all usage. Only the
dashboard can make a second one. The item of all but one is taken off at Stripe, and put back when that one is over.
Stripe down, or unwilling: nothing is changed, every look tries again, and `agreement` tells the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
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
from metering.billing.stripe_objects import Subscription
from metering.billing.tables import SubscriptionRow

# Of several that could bill usage. One that is past due is still tried for its money; a trial's usage is free, and
# would be given away although another one is paid.
_BILLS_FIRST: Final = ("active", "past_due", "trialing", "unpaid", "paused")
_CHANGES_MAX: Final = 6
"""At one look. There are two where one subscription takes over from another."""
_log = structlog.get_logger(__name__)


class TakeOff(NamedTuple):
    """A usage item that is to be taken off a subscription."""

    subscription_id: str
    item_id: str
    is_forgotten: bool
    """Whether nothing of what the item counted is billed: another one counted it too, or it was a trial's."""


class PutOn(NamedTuple):
    """A subscription that is to have a usage item."""

    subscription_id: str
    price_id: str | None
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
            change = await next_change(session, organization_id=organization_id)
        try:
            for _ in range(_CHANGES_MAX):
                # Ours may be old: before anything is changed, all are read anew.
                if change is None or (change := await self._read_anew(customer_id, organization_id)) is None:
                    return
                if isinstance(change, TakeOff):
                    await self._take_off(change, organization_id)
                elif not await self._put_on(change, organization_id):
                    return
        except StripeFailed as error:
            _log.error("subscription.usage_item_stays", organization_id=organization_id, error=str(error))

    async def _read_anew(self, customer_id: str, organization_id: OrganizationId) -> TakeOff | PutOn | None:
        async with self._database.transaction() as session:
            read_at = await database_now(session)
        found = [one async for one in self._api.list_subscriptions(customer_id)]
        async with self._database.transaction() as session:
            for one in found:
                await self._keep(session, one, read_at)
            return await next_change(session, organization_id=organization_id)

    async def _take_off(self, change: TakeOff, organization_id: OrganizationId) -> None:
        _log.error("subscription.doubled", id=change.subscription_id, organization_id=organization_id)
        async with self._database.transaction() as session:
            read_at = await database_now(session)
            # Before Stripe is asked: else nobody would know that it was us.
            await _mark(
                session,
                change.subscription_id,
                is_dropped=True,
                is_forgotten=change.is_forgotten,
                organization_id=organization_id,
            )
        params: Any = {
            "items": [{"id": change.item_id, "deleted": True}],
            "proration_behavior": "none" if change.is_forgotten else "create_prorations",
        }
        changed = await self._api.update_subscription(change.subscription_id, params)
        async with self._database.transaction() as session:
            await self._keep(session, changed, read_at)

    async def _put_on(self, change: PutOn, organization_id: OrganizationId) -> bool:
        """Tell whether there was a price to put on: before `aap stripe sync` there is none."""
        async with self._database.transaction() as session:
            read_at = await database_now(session)
            price_id = change.price_id or (await sold_at(session)).usage_price
        if price_id is None:
            return False
        _log.warning("subscription.bills_again", id=change.subscription_id, organization_id=organization_id)
        params: Any = {"items": [{"price": price_id}], "proration_behavior": "none"}
        changed = await self._api.update_subscription(change.subscription_id, params)
        async with self._database.transaction() as session:
            # Locks the account before the subscription, as all do.
            await self._keep(session, changed, read_at)
            await _mark(
                session, change.subscription_id, is_dropped=False, is_forgotten=False, organization_id=organization_id
            )
        return True

    async def _keep(self, session: AsyncSession, subscription: Subscription, read_at: datetime) -> None:
        await keep_subscription(
            session, subscription, self._plans(), read_at=read_at, now=self._clock.now(), meters=self._meters
        )


async def next_change(session: AsyncSession, *, organization_id: OrganizationId) -> TakeOff | PutOn | None:
    """Return what keeps usage from being billed twice, or by nobody; None where it is billed once.

    The subscription that is paid bills it; of equals the one that does so already, or else the oldest.
    """
    found = await session.scalars(
        select(SubscriptionRow).where(
            SubscriptionRow.organization_id == organization_id, SubscriptionRow.status.in_(LIVE)
        )
    )
    able = sorted(
        (row for row in found if row.usage_item_id is not None or row.has_dropped_usage),
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
        return TakeOff(loser.id, loser.usage_item_id or "", is_forgotten=True)
    if having and having[0] is not able[0]:
        return TakeOff(having[0].id, having[0].usage_item_id or "", is_forgotten=having[0].status == "trialing")
    if able and able[0].usage_item_id is None:
        return PutOn(able[0].id, able[0].usage_price_id)
    return None


async def _mark(
    session: AsyncSession,
    subscription_id: str,
    *,
    is_dropped: bool,
    is_forgotten: bool,
    organization_id: OrganizationId,
) -> None:
    """Remember that it was us who took a subscription's usage item off, and how; or that it is back."""
    await session.execute(
        update(SubscriptionRow)
        .where(SubscriptionRow.organization_id == organization_id, SubscriptionRow.id == subscription_id)
        .values(has_dropped_usage=is_dropped, has_forgotten_usage=is_forgotten)
    )
