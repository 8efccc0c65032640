"""What an API process needs for billing. Imported only where Stripe is configured: its package takes 40 MB."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from core.clock import Clock
from core.database import Database
from core.settings import StripeSettings
from metering.billing.customers import Customers
from metering.billing.inbox import EventUnsigned, Inbox
from metering.billing.plans import Plans
from metering.billing.stripe_api import StripeApi, is_signed

_log = structlog.get_logger(__name__)


class BillingParts:
    """The acts of organizations, and the inbox. Either is there only where its secret is."""

    def __init__(self, settings: StripeSettings, database: Database, clock: Clock, plans: Callable[[], Plans]) -> None:
        self._secrets = settings.webhook_secrets
        self._api = StripeApi(settings, clock) if settings.api_key is not None else None
        self._inbox = Inbox(database)
        self.customers = (
            None if self._api is None else Customers(database, self._api, clock, plans, test_clock=settings.test_clock)
        )

    async def receive(self, body: bytes, signature: str) -> None:
        """Store the event in *body* if Stripe signed it. Errors: EventUnsigned, EventUnreadable; DOWN."""
        if not is_signed(body, signature, self._secrets):
            _log.warning("stripe_event.unsigned", bytes=len(body))
            raise EventUnsigned
        await self._inbox.receive(body)

    async def close(self) -> None:
        """Close the connections to Stripe."""
        if self._api is not None:
            await self._api.close()
