"""Automatic top-ups: the card is charged when credit runs low, once for each time that it does.

A top-up is a row before it is a payment, and one at a time is open. Its id is the idempotency key at Stripe, so that a
retry within a day is the same payment; what is open for longer is looked for, and never tried again. Stripe down: tried
again in the next round. After one that failed there is none for a day: a card that was declined is not asked every
minute.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import Database
from core.ids import OrganizationId, new_id
from core.money import NANO_USD_PER_CENT
from metering.billing import emails, prepaid
from metering.billing.errors import StripeRefused
from metering.billing.ownership import lock_account
from metering.billing.prepaid import TOP_UP_METADATA
from metering.billing.stripe_api import StripeApi
from metering.billing.stripe_objects import ORGANIZATION_METADATA
from metering.billing.tables import BillingCustomerRow, TopUpRow

_RETRY_MAX: Final = timedelta(hours=23)
_AFTER_FAILURE: Final = timedelta(days=1)
_log = structlog.get_logger(__name__)


class TopUps:
    """Charges cards. Errors: StripeFailed; those of `core.database.DOWN`."""

    def __init__(self, database: Database, api: StripeApi, clock: Clock) -> None:
        self._database = database
        self._api = api
        self._clock = clock

    async def round(self) -> int:
        """Open top-ups for those whose credit is low, and see all open ones through; return how many were paid.

        What Stripe refuses of one holds up no other.
        """
        async with self._database.transaction() as session:
            candidates = await session.scalars(
                select(BillingCustomerRow.organization_id).where(
                    BillingCustomerRow.top_up_below_cents.is_not(None),
                    BillingCustomerRow.stripe_customer_id.is_not(None),
                    BillingCustomerRow.wallet_opened_at.is_not(None),
                )
            )
            organizations = [OrganizationId(found) for found in candidates]
        for organization_id in organizations:
            async with self._database.transaction() as session:
                await self._open_if_low(session, organization_id=organization_id)
        async with self._database.transaction() as session:
            waiting = list(await session.scalars(select(TopUpRow).where(TopUpRow.state == "open")))
        paid = 0
        for row in waiting:
            try:
                paid += await self._see_through(row)
            except StripeRefused as error:
                await self._fail(row, error.code or "refused")
        return paid

    async def _open_if_low(self, session: AsyncSession, *, organization_id: OrganizationId) -> None:
        """Open a top-up if credit is low and none is open, while nothing else changes what is left."""
        account = await lock_account(session, organization_id=organization_id)
        if account is None or account.top_up_below_cents is None or account.top_up_cents is None:
            return
        left = await prepaid.left(session, self._clock.now(), organization_id=organization_id)
        if left >= account.top_up_below_cents * NANO_USD_PER_CENT:
            return
        if await self._failed_lately(session, organization_id=organization_id):
            return
        await session.execute(
            insert(TopUpRow)
            .values(
                id=new_id("topup"),
                organization_id=organization_id,
                cents=account.top_up_cents,
                created_at=self._clock.now(),
            )
            .on_conflict_do_nothing()
        )

    async def _failed_lately(self, session: AsyncSession, *, organization_id: OrganizationId) -> bool:
        since: datetime = self._clock.now() - _AFTER_FAILURE
        failed = await session.scalar(
            select(TopUpRow.id)
            .where(TopUpRow.organization_id == organization_id, TopUpRow.state == "failed", TopUpRow.ended_at > since)
            .limit(1)
        )
        return failed is not None

    async def _see_through(self, row: TopUpRow) -> bool:
        """Charge the card, or look what became of it; tell whether it was paid."""
        organization_id = OrganizationId(row.organization_id)
        async with self._database.transaction() as session:
            customer_id = await session.scalar(
                select(BillingCustomerRow.stripe_customer_id).where(
                    BillingCustomerRow.organization_id == organization_id
                )
            )
        assert customer_id is not None
        if self._clock.now() - row.created_at >= _RETRY_MAX:
            return await self._look_for(row, customer_id)
        method = row.payment_method_id or await self._api.payment_method_of(customer_id)
        if method is not None:
            method = await self._keep_method(row, method)
        if method is None:
            await self._fail(row, "there is no payment method")
            return False
        params: Any = {
            "amount": row.cents,
            "currency": "usd",
            "customer": customer_id,
            "payment_method": method,
            "confirm": True,
            "off_session": True,
            "metadata": {ORGANIZATION_METADATA: organization_id, TOP_UP_METADATA: row.id},
        }
        payment = await self._api.create_payment(params, idempotency_key=row.id)
        async with self._database.transaction() as session:
            await prepaid.keep_payment(session, payment, self._clock.now())
        return payment.status == "succeeded"

    async def _keep_method(self, row: TopUpRow, method: str) -> str | None:
        """Write down which card is charged, before it is; return the one that was written down first."""
        async with self._database.transaction() as session:
            return await session.scalar(
                update(TopUpRow)
                .where(TopUpRow.organization_id == row.organization_id, TopUpRow.id == row.id)
                .values(payment_method_id=func.coalesce(TopUpRow.payment_method_id, method))
                .returning(TopUpRow.payment_method_id)
            )

    async def _look_for(self, row: TopUpRow, customer_id: str) -> bool:
        """Find the payment of a top-up whose answer never came; Stripe may have forgotten the key by now."""
        for payment in await self._api.list_payments(customer_id, row.created_at - timedelta(minutes=5)):
            if payment.metadata.get(TOP_UP_METADATA) == row.id:
                async with self._database.transaction() as session:
                    await prepaid.keep_payment(session, payment, self._clock.now())
                return payment.status == "succeeded"
        await self._fail(row, "no answer within a day, and no payment")
        return False

    async def _fail(self, row: TopUpRow, problem: str) -> None:
        _log.warning("top_up.failed", organization_id=row.organization_id, problem=problem)
        async with self._database.transaction() as session:
            await session.execute(
                update(TopUpRow)
                .where(TopUpRow.organization_id == row.organization_id, TopUpRow.id == row.id, TopUpRow.state == "open")
                .values(state="failed", problem=problem, ended_at=self._clock.now())
            )
            organization_id = OrganizationId(row.organization_id)
            await emails.note_top_up(session, row.id, row.cents, organization_id=organization_id)
