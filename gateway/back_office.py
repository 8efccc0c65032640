"""The office's part of the worker process: mails, business metrics, plans' prices; also where there is no Stripe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog

from core.clock import Clock, SystemClock
from core.database import DOWN, Database
from core.mail import Mailer, mailer_for
from core.settings import Settings
from gateway.plan_file import PlanFile
from metering.billing import limit_mails, mailing, metrics, webhook_mails
from metering.billing.plan_prices import PlanPrices

_CONNECTIONS_MAX: Final = 3
_SEND_SECONDS: Final = 5.0
_LIMITS_SECONDS: Final = 15.0
_METRICS_SECONDS: Final = 900.0
_PRICES_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 30.0
_STATEMENT_SECONDS_MAX: Final = 120.0
"""A day's metrics look at every organization's month."""
_log = structlog.get_logger(__name__)


class BackOffice:
    """Sends mails, writes down those that thresholds call for, and keeps metrics. Any number of workers may run."""

    def __init__(self, database: Database, mailer: Mailer, clock: Clock) -> None:
        self._database = database
        self._mailer = mailer
        self._clock = clock

    async def run(self) -> None:
        """Work until cancelled. A store down costs a round."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_forever(self.send, _SEND_SECONDS))
            group.create_task(_forever(self.note_limits, _LIMITS_SECONDS))
            group.create_task(_forever(self.compute_metrics, _METRICS_SECONDS))

    async def send(self) -> int:
        """Send the mails that are due."""
        return await mailing.send_due(self._database, self._mailer)

    async def note_limits(self) -> int:
        """Write down mails for thresholds that were crossed, and for webhook endpoints that fail."""
        count = await limit_mails.note_limits(self._database)
        return count + await webhook_mails.note_webhooks(self._database)

    async def compute_metrics(self) -> int:
        """Compute yesterday's metrics, and what is missing or wrong of the weeks before."""
        days = await metrics.compute_due(self._database, self._clock)
        if days:
            _log.info("metrics.computed", days=days)
        return days


async def run(settings: Settings) -> None:
    """Work until cancelled."""
    assert settings.database_url is not None
    database = Database(
        settings.database_url, connections_max=_CONNECTIONS_MAX, statement_seconds_max=_STATEMENT_SECONDS_MAX
    )
    plans = PlanPrices(database, PlanFile(settings.config_path).known_plans)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(BackOffice(database, mailer_for(settings.mail), SystemClock()).run())
            group.create_task(_forever(plans.keep, _PRICES_SECONDS))
    finally:
        await database.close()


async def _forever(act: Callable[[], Awaitable[Any]], pause_seconds: float) -> None:
    while True:
        pause = pause_seconds
        try:
            await act()
        except DOWN as error:
            pause = max(pause_seconds, _RETRY_SECONDS)
            _log.warning("office.round_failed", act=act.__name__, error=type(error).__name__)
        except Exception:  # noqa: BLE001 - worker loops outlive a bug, and log it
            _log.exception("office.round_broke", act=act.__name__)
        await asyncio.sleep(pause)
