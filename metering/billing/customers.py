"""What an organization does about its billing: become a customer, subscribe, change, cancel, pay beforehand.

Every act asks Stripe first and keeps what Stripe answers, so that who acts sees the result at once; the event that
follows changes nothing then. Stripe down: BillingUnavailable, and nothing is changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime
from typing import Any, Final

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import Database, database_now
from core.ids import OrganizationId
from keys import tenants
from metering.billing import catalog
from metering.billing.account_status import LIVE
from metering.billing.apply import Applier
from metering.billing.catalog_ids import sold_at
from metering.billing.errors import (
    AlreadySubscribed,
    AutomaticTopUpInvalid,
    BillingMisconfigured,
    BillingUnavailable,
    NotSubscribed,
    PaymentRefused,
    PlanNotForSale,
    PlanUnknown,
    StripeFailed,
    StripeKeyRejected,
    StripeRefused,
    TopUpInvalid,
)
from metering.billing.export import Exporter
from metering.billing.outbox import open_work, request_flush
from metering.billing.ownership import keep_customer
from metering.billing.plans import Plan, Plans
from metering.billing.prepaid import TOP_UP_METADATA
from metering.billing.returning import ReturnPages, check_url
from metering.billing.stripe_api import StripeApi
from metering.billing.stripe_objects import ORGANIZATION_METADATA, Checkout, Subscription
from metering.billing.tables import BillingCustomerRow, SubscriptionRow

_REPORT_TRIES: Final = 20
_REPORT_PAUSE_SECONDS: Final = 0.25
TOP_UP_CENTS_MIN: Final = 500
TOP_UP_CENTS_MAX: Final = 99_999_999
"""Stripe takes eight digits."""
_log = structlog.get_logger(__name__)


class Customers:
    """Acts for organizations. Errors of every act: BillingUnavailable; those of `core.database.DOWN`."""

    def __init__(
        self,
        database: Database,
        api: StripeApi,
        clock: Clock,
        plans: Callable[[], Plans],
        *,
        test_clock: str | None = None,
    ) -> None:
        """New customers belong to *test_clock*, if there is one: their time is then what it says."""
        self._database = database
        self._api = api
        self._clock = clock
        self._plans = plans
        self._test_clock = test_clock

    @property
    def _applier(self) -> Applier:
        meters = catalog.meters_of(self._plans())
        return Applier(self._database, self._api, self._clock, self._plans, meters=meters)

    async def customer_of(self, organization_id: OrganizationId, *, email: str | None = None) -> str:
        """Return the organization's customer at Stripe, made now if there is none. Errors: TenantNotFound."""
        async with self._database.transaction() as session:
            organization = await tenants.get_organization(session, organization_id=organization_id)
            await session.execute(
                insert(BillingCustomerRow).values(organization_id=organization_id, email=email).on_conflict_do_nothing()
            )
            row = await session.get_one(BillingCustomerRow, organization_id)
            is_new_address = email is not None and row.email is None
            if is_new_address:
                row.email = email
            known, address = row.stripe_customer_id, row.email
        if known is not None:
            if is_new_address and address is not None:
                with _asking_stripe("set_address", organization_id):
                    await self._api.set_address(known, address)
            return known
        with _asking_stripe("customer_of", organization_id):
            made = await self._api.create_customer(
                organization_id, organization.name, email=address, test_clock=self._test_clock
            )
        async with self._database.transaction() as session:
            return await keep_customer(session, made, organization_id=organization_id)

    async def subscribe(
        self, organization_id: OrganizationId, plan_name: str, pages: ReturnPages, *, email: str | None = None
    ) -> Checkout:
        """Return a page where the organization buys a plan. Nothing changes before it has paid.

        Errors: PlanUnknown, PlanNotForSale, AlreadySubscribed, ReturnAddressInvalid, TenantNotFound.
        """
        pages.check()
        plan = self._sold(plan_name)
        async with self._database.transaction() as session:
            if await _live(session, organization_id=organization_id) is not None:
                raise AlreadySubscribed
            sold = await sold_at(session)
            bought_before = await _count_bought(session, organization_id=organization_id)
        price = sold.plans.get(plan.name)
        if price is None or sold.usage_price is None:
            raise PlanNotForSale(plan_name)
        customer_id = await self.customer_of(organization_id, email=email)
        metadata = {ORGANIZATION_METADATA: organization_id}
        items: list[Any] = [{"price": price, "quantity": 1}]
        if plan.bills_usage:
            items.append({"price": sold.usage_price})
        subscription: dict[str, Any] = {"metadata": metadata, "billing_mode": {"type": "flexible"}}
        if plan.trial_days and not bought_before:
            subscription["trial_period_days"] = plan.trial_days
        params: Any = {
            "mode": "subscription",
            "customer": customer_id,
            "client_reference_id": organization_id,
            "line_items": items,
            "subscription_data": subscription,
            "success_url": pages.success_url,
            "cancel_url": pages.cancel_url,
            "metadata": metadata,
        }
        async with self._database.transaction() as session:
            earlier = list((await session.get_one(BillingCustomerRow, organization_id)).checkout_ids)
        for page_id in earlier:
            await self._close(page_id, organization_id)
        with _asking_stripe("subscribe", organization_id):
            checkout = await self._api.create_checkout(params)
        await self._keep_one_page(checkout.id, earlier, organization_id)
        return checkout

    async def top_up(self, organization_id: OrganizationId, cents: int, pages: ReturnPages) -> Checkout:
        """Return a page where the organization buys credit. Errors: TopUpInvalid, ReturnAddressInvalid."""
        pages.check()
        if not TOP_UP_CENTS_MIN <= cents <= TOP_UP_CENTS_MAX:
            raise TopUpInvalid(TOP_UP_CENTS_MIN, TOP_UP_CENTS_MAX)
        customer_id = await self.customer_of(organization_id)
        metadata = {ORGANIZATION_METADATA: organization_id, TOP_UP_METADATA: "checkout"}
        product = {"currency": "usd", "unit_amount": cents, "product_data": {"name": "Credit"}}
        params: Any = {
            "mode": "payment",
            "customer": customer_id,
            "client_reference_id": organization_id,
            "line_items": [{"price_data": product, "quantity": 1}],
            # The card is kept for automatic top-ups, which happen while nobody is there.
            "payment_intent_data": {"metadata": metadata, "setup_future_usage": "off_session"},
            "success_url": pages.success_url,
            "cancel_url": pages.cancel_url,
            "metadata": metadata,
        }
        with _asking_stripe("top_up", organization_id):
            return await self._api.create_checkout(params)

    async def portal(self, organization_id: OrganizationId, return_url: str) -> str:
        """Return the address of the page where cards, plan and invoices are. Errors: ReturnAddressInvalid."""
        check_url(return_url, "return_url")
        customer_id = await self.customer_of(organization_id)
        with _asking_stripe("portal", organization_id):
            return await self._api.create_portal(customer_id, return_url)

    async def change_plan(self, organization_id: OrganizationId, plan_name: str) -> Subscription:
        """Give the organization another plan now: the rest of the period is settled to the day.

        Errors: PlanUnknown, PlanNotForSale, NotSubscribed, PaymentRefused.
        """
        plan = self._sold(plan_name)
        async with self._database.transaction() as session:
            row = await _require_live(session, organization_id=organization_id)
            sold = await sold_at(session)
            # What was used under the old plan is reported before the plan changes.
            await request_flush(session, self._clock.now(), organization_id=organization_id)
        price = sold.plans.get(plan.name)
        if price is None or sold.usage_price is None:
            raise PlanNotForSale(plan_name)
        items: list[Any] = [{"id": row.plan_item_id, "price": price, "quantity": 1}]
        if plan.bills_usage and row.usage_item_id is None:
            items.append({"price": sold.usage_price})
        elif not plan.bills_usage and row.usage_item_id is not None:
            # What was used until now is billed; what comes is included.
            await self._report_all(organization_id)
            items.append({"id": row.usage_item_id, "deleted": True})
        is_dearer = plan.price_cents_per_month > row.price_cents_per_month
        params: dict[str, Any] = {
            "items": items,
            "proration_behavior": "always_invoice" if is_dearer else "create_prorations",
            "cancel_at_period_end": False,
        }
        if is_dearer:
            # An upgrade that is not paid is none.
            params["payment_behavior"] = "error_if_incomplete"
        return await self._changed(organization_id, row.id, params)

    async def cancel(self, organization_id: OrganizationId, *, at_once: bool = False) -> Subscription:
        """End the subscription with its period, or *at_once* with an invoice for what was used by now.

        Errors: NotSubscribed.
        """
        async with self._database.transaction() as session:
            row = await _require_live(session, organization_id=organization_id)
            await request_flush(session, self._clock.now(), organization_id=organization_id)
        if not at_once:
            return await self._changed(organization_id, row.id, {"cancel_at_period_end": True})
        await self._report_all(organization_id)
        read_at = await self._read_at()
        async with self._if_live(organization_id, "cancel"):
            ended = await self._api.cancel_subscription(row.id)
        await self._applier.keep(ended, read_at)
        return ended

    async def resume(self, organization_id: OrganizationId) -> Subscription:
        """Take a cancellation back that has not happened yet. Errors: NotSubscribed."""
        async with self._database.transaction() as session:
            row = await _require_live(session, organization_id=organization_id)
        return await self._changed(organization_id, row.id, {"cancel_at_period_end": False})

    async def set_automatic_top_up(
        self, organization_id: OrganizationId, *, below_cents: int | None, cents: int | None
    ) -> None:
        """Charge the card for *cents* whenever less than *below_cents* is left; None for both: never.

        Errors: TopUpInvalid.
        """
        if (below_cents is None) != (cents is None):
            raise AutomaticTopUpInvalid("below_cents" if below_cents is None else "amount_cents")
        if below_cents is not None and cents is not None:
            # One charge has to be enough: else the card would be charged again and again.
            least = max(TOP_UP_CENTS_MIN, below_cents)
            if not least <= cents <= TOP_UP_CENTS_MAX:
                raise TopUpInvalid(least, TOP_UP_CENTS_MAX)
        await self.customer_of(organization_id)
        async with self._database.transaction() as session:
            await session.execute(
                update(BillingCustomerRow)
                .where(BillingCustomerRow.organization_id == organization_id)
                .values(top_up_below_cents=below_cents, top_up_cents=cents)
            )

    async def _changed(
        self, organization_id: OrganizationId, subscription_id: str, params: dict[str, Any]
    ) -> Subscription:
        read_at = await self._read_at()
        async with self._if_live(organization_id, "change"):
            changed = await self._api.update_subscription(subscription_id, params)  # type: ignore[arg-type]
        await self._applier.keep(changed, read_at)
        return changed

    @asynccontextmanager
    async def _if_live(self, organization_id: OrganizationId, act: str) -> AsyncGenerator[None]:
        """Ask Stripe to change a subscription; one that is over is read. Errors: NotSubscribed."""
        with _asking_stripe(act, organization_id):
            try:
                yield
            except StripeRefused as error:
                if not error.is_missing:
                    raise
                await self._applier.look_at_customers(organization_id)
                raise NotSubscribed from error

    async def _report_all(self, organization_id: OrganizationId) -> None:
        """Tell Stripe of everything that was used until now.

        Errors: BillingUnavailable where it does not hear of it within seconds; BillingMisconfigured where an operator
        has to look first.
        """
        exporter = Exporter(self._database, self._api, self._clock)
        for _ in range(_REPORT_TRIES):
            done = await exporter.round(only=organization_id)
            if done.problem is not None:
                raise BillingUnavailable
            async with self._database.transaction() as session:
                work = await open_work(session, organization_id=organization_id)
            if work.is_parked:
                raise BillingMisconfigured
            if not work.is_waiting:
                return
            # Another worker has its turn, and is done in a moment.
            await asyncio.sleep(_REPORT_PAUSE_SECONDS)
        raise BillingUnavailable

    def _sold(self, plan_name: str) -> Plan:
        plan = self._plans().find(plan_name)
        if plan is None:
            raise PlanUnknown(plan_name)
        if not plan.is_sold:
            raise PlanNotForSale(plan_name)
        return plan

    async def _close(self, checkout_id: str, organization_id: OrganizationId) -> None:
        """Close a page that was opened before: two that are paid would be two subscriptions.

        Errors: AlreadySubscribed where it was paid, also if the event of that is still on its way.
        """
        with _asking_stripe("close_page", organization_id):
            try:
                await self._api.close_checkout(checkout_id)
            except StripeRefused as error:
                _log.info("checkout.not_open", checkout_id=checkout_id, code=error.code)
                await self._applier.look_at_customers(organization_id)
        async with self._database.transaction() as session:
            if await _live(session, organization_id=organization_id) is not None:
                raise AlreadySubscribed

    async def _keep_one_page(self, checkout_id: str, closed: list[str], organization_id: OrganizationId) -> None:
        """Take a page for the one that is open, and close those that were asked for at the same time.

        Errors: AlreadySubscribed where one of them is paid; BillingUnavailable. Then ours is shown to nobody.
        """
        others = await self._remember_page(organization_id, checkout_id, closed)
        try:
            for page_id in others:
                await self._close(page_id, organization_id)
                await self._remember_page(organization_id, checkout_id, [page_id])
        except (AlreadySubscribed, BillingUnavailable):
            with suppress(AlreadySubscribed, BillingUnavailable):
                await self._close(checkout_id, organization_id)
            raise

    async def _remember_page(self, organization_id: OrganizationId, checkout_id: str, closed: list[str]) -> list[str]:
        """Write down a page that is open and those that are not any more; return what else may be open."""
        async with self._database.transaction() as session:
            row = await session.get_one(BillingCustomerRow, organization_id, with_for_update=True)
            others = [page_id for page_id in row.checkout_ids if page_id not in {checkout_id, *closed}]
            row.checkout_ids = [*others, checkout_id]
        return others

    async def _read_at(self) -> datetime:
        async with self._database.transaction() as session:
            return await database_now(session)


async def _live(session: AsyncSession, *, organization_id: OrganizationId) -> SubscriptionRow | None:
    return await session.scalar(
        select(SubscriptionRow)
        .where(SubscriptionRow.organization_id == organization_id, SubscriptionRow.status.in_(LIVE))
        .order_by(SubscriptionRow.started_at.desc())
        .limit(1)
    )


async def _count_bought(session: AsyncSession, *, organization_id: OrganizationId) -> int:
    """Return how many subscriptions the organization ever had."""
    statement = select(func.count()).where(SubscriptionRow.organization_id == organization_id)
    return await session.scalar(statement) or 0


async def _require_live(session: AsyncSession, *, organization_id: OrganizationId) -> SubscriptionRow:
    row = await _live(session, organization_id=organization_id)
    if row is None:
        raise NotSubscribed
    return row


@contextmanager
def _asking_stripe(act: str, organization_id: OrganizationId) -> Generator[None]:
    """Turn Stripe's failures into what a customer may hear; the rest is for the log."""
    try:
        yield
    except StripeRefused as error:
        if error.status == 402:
            raise PaymentRefused from error
        _log.error("stripe.refused", act=act, organization_id=organization_id, code=error.code, param=error.param)
        raise BillingMisconfigured from error
    except StripeKeyRejected as error:
        _log.error("stripe.key_rejected", act=act, organization_id=organization_id)
        raise BillingMisconfigured from error
    except StripeFailed as error:
        _log.warning("stripe.failed", act=act, organization_id=organization_id, error=type(error).__name__)
        raise BillingUnavailable from error
