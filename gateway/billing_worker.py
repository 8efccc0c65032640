"""Billing's part of the worker process. Imported only where Stripe is configured: its package takes 40 MB."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from core.clock import SystemClock
from core.database import Database
from core.settings import Settings
from metering.billing.plans import Plans
from metering.billing.stripe_api import StripeApi
from metering.billing.worker import BillingWorker

_CONNECTIONS_MAX: Final = 6


async def run(settings: Settings, plans: Callable[[], Plans]) -> None:
    """Work until cancelled."""
    assert settings.database_url is not None
    clock = SystemClock()
    database = Database(settings.database_url, connections_max=_CONNECTIONS_MAX)
    api = StripeApi(settings.stripe, clock)
    try:
        await BillingWorker(database, api, clock, plans, stream_above=settings.stripe.stream_above).run()
    finally:
        await api.close()
        await database.close()
