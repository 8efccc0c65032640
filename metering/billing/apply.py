"""What follows from Stripe's events: the object is read anew, and our rows are made what it says.

An event only says where to look. So one that comes twice, late or out of order changes nothing that the object itself
does not say, and one that never comes is made up for by the next look (`catch_up`, `look_at_customers`). A reading
never undoes a later one: each has the time, by PostgreSQL's clock, at which it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Final

import structlog
from sqlalchemy import func, select

from core.clock import Clock
from core.database import Database, database_now
from core.ids import OrganizationId
from metering.billing import emails, inbox, marks, prepaid
from metering.billing.account_status import end_grace, overdue_organizations
from metering.billing.errors import StripeFailed, StripeRefused
from metering.billing.meters import Meter
from metering.billing.ownership import keep_address
from metering.billing.plans import Plans
from metering.billing.projection import drafts_of, forget_draft, keep_invoice, keep_subscription
from metering.billing.reconcile import mark_suspect
from metering.billing.stripe_api import StripeApi
from metering.billing.stripe_objects import Invoice, Subscription
from metering.billing.tables import BillingCustomerRow, StripeEventRow, SubscriptionRow
from metering.billing.usage_items import UsageItems

_LEASE: Final = timedelta(minutes=2)
_CAUGHT_UP: Final = "events"
_OVERLAP: Final = timedelta(minutes=10)
"""Events are listed by when they were made, and may appear a little later."""
_INVOICES_BACK: Final = timedelta(days=70)
_ASKED_LATELY: Final = timedelta(seconds=30)
_FAILURES_MAX: Final = 3
"""Of single subscriptions, until it is Stripe that is taken to be down."""
_KEPT: Final = timedelta(days=30)
"""How long Stripe lists events."""
_log = structlog.get_logger(__name__)


class Applier:
    """Applies events and looks at objects. Errors of every method: StripeFailed; those of `core.database.DOWN`."""

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

    async def apply_due(self) -> int:
        """Apply all events that are due; return how many. One that fails waits, and holds up no other."""
        applied = 0
        while True:
            async with self._database.transaction() as session:
                event = await inbox.claim(session, _LEASE)
            if event is None or not await self._apply_one(event):
                return applied
            applied += 1

    async def _apply_one(self, event: StripeEventRow) -> bool:
        """Apply an event, or write down why not. False: Stripe cannot be asked, so that others need not be tried."""
        state, problem, is_stripes = "applied", "", False
        try:
            state = "applied" if await self._apply(event) else "ignored"
        except StripeRefused as error:
            # What is gone at Stripe can be read no more: there is nothing to follow.
            state, problem = ("ignored", "") if error.is_missing else ("", f"{error.code}: {error}")
        except StripeFailed as error:
            state, problem, is_stripes = "", f"{type(error).__name__}: {error}", True
        except Exception as error:  # noqa: BLE001 - one event that cannot be applied holds up no other
            state, problem = "", type(error).__name__
            _log.exception("stripe_event.failed", event_id=event.id, type=event.type)
        async with self._database.transaction() as session:
            if state:
                await inbox.finish(session, event.id, state)
            elif await inbox.fail(session, event.id, problem, is_stripes=is_stripes):
                _log.error("stripe_event.given_up", event_id=event.id, type=event.type, problem=problem)
        return not is_stripes

    async def _apply(self, event: StripeEventRow) -> bool:
        """Look at what the event is about; tell whether it is ours."""
        if event.type.startswith("customer.subscription."):
            is_ending = event.type.endswith("trial_will_end")
            return await self.look_at_subscription(event.object_id, is_trial_ending=is_ending) is not None
        if event.type.startswith("invoice."):
            return await self.look_at_invoice(event.object_id) is not None
        if event.type.startswith("checkout.session."):
            return await self._look_at_checkout(event.object_id)
        if event.type.startswith("payment_intent."):
            return await self.look_at_payment(event.object_id)
        return await self._look_at_meter(event)

    async def look_at_subscription(
        self, subscription_id: str, *, is_trial_ending: bool = False
    ) -> OrganizationId | None:
        """Read a subscription and keep it. None: it is not ours."""
        read_at = await self._read_at()
        subscription = await self._api.get_subscription(subscription_id)
        owner = await self.keep(subscription, read_at)
        if owner is not None and is_trial_ending:
            async with self._database.transaction() as session:
                await emails.note_trial_end(session, subscription, organization_id=owner)
        return owner

    async def keep(self, subscription: Subscription, read_at: datetime) -> OrganizationId | None:
        """Keep a subscription that was asked for at *read_at*."""
        async with self._database.transaction() as session:
            owner = await keep_subscription(
                session,
                subscription,
                self._plans(),
                read_at=read_at,
                now=self._clock.now(),
                meters=self._meters,
            )
        if owner is not None:
            await self._usage_items.settle(subscription.customer_id, owner)
        return owner

    @property
    def _usage_items(self) -> UsageItems:
        return UsageItems(self._database, self._api, self._clock, self._plans, meters=self._meters)

    async def look_at_invoice(self, invoice_id: str) -> OrganizationId | None:
        """Read an invoice and its subscription, and keep both. None: it is not ours."""
        if not invoice_id.startswith("in_"):
            return None  # an upcoming one is none yet
        read_at = await self._read_at()
        try:
            invoice = await self._api.get_invoice(invoice_id)
        except StripeRefused as error:
            if not error.is_missing:
                raise
            async with self._database.transaction() as session:
                return await forget_draft(session, invoice_id)
        return await self._keep_invoice(invoice, read_at)

    async def _keep_invoice(self, invoice: Invoice, read_at: datetime) -> OrganizationId | None:
        if invoice.subscription_id is not None:
            # First, so that its periods and items are known.
            await self.look_at_subscription(invoice.subscription_id)
        async with self._database.transaction() as session:
            return await keep_invoice(session, invoice, read_at=read_at, now=self._clock.now())

    async def _look_at_checkout(self, session_id: str) -> bool:
        checkout = await self._api.get_checkout(session_id)
        if checkout.customer_id is not None and checkout.email is not None:
            async with self._database.transaction() as session:
                await keep_address(session, checkout.customer_id, checkout.email)
        if checkout.subscription_id is not None:
            return await self.look_at_subscription(checkout.subscription_id) is not None
        if checkout.payment_intent_id is not None:
            return await self.look_at_payment(checkout.payment_intent_id)
        return False

    async def look_at_payment(self, payment_intent_id: str) -> bool:
        """Read a payment, and add what it bought to its organization's credit. False: it is not ours."""
        payment = await self._api.get_payment(payment_intent_id)
        async with self._database.transaction() as session:
            return await prepaid.keep_payment(session, payment, self._clock.now())

    async def _look_at_meter(self, event: StripeEventRow) -> bool:
        errors = await self._api.meter_errors(event.id)
        _log.error("meter_events.refused_later", meter=errors.meter_id, codes=errors.codes)
        async with self._database.transaction() as session:
            return await mark_suspect(session, errors.starts_at, errors.ends_at, self._clock.now()) > 0

    async def catch_up(self) -> int:
        """Store what happened since the last time and was not told; return how many events that is."""
        now = self._clock.now()
        async with self._database.transaction() as session:
            since = await marks.moment(session, _CAUGHT_UP)
        since = max(since - _OVERLAP, now - _KEPT) if since is not None else now - _KEPT
        stored = 0
        events = [event async for event in self._api.list_events(since, inbox.KINDS)]
        for start in range(0, len(events), 500):
            async with self._database.transaction() as session:
                stored += await inbox.store(session, events[start : start + 500], source="catch_up")
        thin = await self._api.list_thin_events(since, inbox.THIN_KINDS)
        async with self._database.transaction() as session:
            stored += await inbox.store(session, thin, source="catch_up")
            await marks.set_moment(session, _CAUGHT_UP, now)
        return stored

    async def look_at_customers(self, only: OrganizationId | None = None, *, with_invoices: bool = False) -> int:
        """Read the subscriptions of all customers, or of one; return how many there are.

        *with_invoices* reads those of the last weeks too: events tell of them, and Stripe keeps events for 30 days.
        """
        statement = select(BillingCustomerRow.stripe_customer_id).where(
            BillingCustomerRow.stripe_customer_id.is_not(None)
        )
        if only is not None:
            statement = statement.where(BillingCustomerRow.organization_id == only)
        async with self._database.transaction() as session:
            customers = [customer_id or "" for customer_id in await session.scalars(statement)]
        found = 0
        # Everybody's come a hundred at a time; those of one are asked for by name.
        for customer_id in customers if only is not None else [None]:
            read_at = await self._read_at()
            async for subscription in self._api.list_subscriptions(customer_id):
                with _passing_over("subscription", subscription.id):
                    found += await self.keep(subscription, read_at) is not None
        for customer_id in customers if with_invoices else []:
            with _passing_over("invoices", customer_id):
                await self._look_at_invoices(customer_id)
        return found

    async def _look_at_invoices(self, customer_id: str) -> None:
        read_at = await self._read_at()
        found = await self._api.list_invoices(customer_id, self._clock.now() - _INVOICES_BACK)
        async with self._database.transaction() as session:
            drafts = await drafts_of(session, customer_id)
        # A draft that was deleted is in no list.
        for invoice_id in drafts - {invoice.id for invoice in found}:
            await self.look_at_invoice(invoice_id)
        for invoice in found:
            whole = await self._api.get_invoice(invoice.id) if invoice.has_more_lines else invoice
            async with self._database.transaction() as session:
                await keep_invoice(session, whole, read_at=read_at, now=self._clock.now())

    async def look_at_overdue(self) -> int:
        """Do what only time brings: periods that are over are read anew, days of grace end. Returns how many."""
        now = self._clock.now()
        async with self._database.transaction() as session:
            over = list(
                await session.scalars(
                    select(SubscriptionRow.id).where(
                        SubscriptionRow.ended_at.is_(None),
                        SubscriptionRow.period_ends_at <= now,
                        # One whose period does not go on, such as a paused one, need not be asked every minute.
                        SubscriptionRow.read_at <= func.now() - _ASKED_LATELY,
                    )
                )
            )
            overdue = await overdue_organizations(session, self._plans(), now)
        failures: list[StripeFailed] = []
        for subscription_id in over:
            try:
                with _passing_over("subscription", subscription_id):
                    await self.look_at_subscription(subscription_id)
            except StripeFailed as error:
                failures.append(error)
                if len(failures) == _FAILURES_MAX:
                    break
        for organization_id in overdue:
            async with self._database.transaction() as session:
                await end_grace(session, self._plans(), now, organization_id=organization_id)
        if failures:
            raise failures[0]
        return len(over) + len(overdue)

    async def _read_at(self) -> datetime:
        async with self._database.transaction() as session:
            return await database_now(session)


@contextmanager
def _passing_over(kind: str, identifier: str) -> Generator[None]:
    """Let what Stripe refuses of one, such as a customer that was deleted there, hold up no other."""
    try:
        yield
    except StripeRefused as error:
        _log.warning("stripe.refused", kind=kind, id=identifier, code=error.code)
