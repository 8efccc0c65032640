"""Mail's part of the worker process: also where Stripe is not configured, for limits are told of as well."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog

from core.database import DOWN, Database
from core.mail import Mailer, mailer_for
from core.settings import Settings
from metering.billing import limit_mails, mailing

_CONNECTIONS_MAX: Final = 2
_SEND_SECONDS: Final = 5.0
_LIMITS_SECONDS: Final = 15.0
_RETRY_SECONDS: Final = 30.0
_log = structlog.get_logger(__name__)


class MailWorker:
    """Sends mails, and writes down those that thresholds call for. Any number of workers may run."""

    def __init__(self, database: Database, mailer: Mailer) -> None:
        self._database = database
        self._mailer = mailer

    async def run(self) -> None:
        """Work until cancelled. A store down costs a round."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_forever(self.send, _SEND_SECONDS))
            group.create_task(_forever(self.note_limits, _LIMITS_SECONDS))

    async def send(self) -> int:
        """Send the mails that are due."""
        return await mailing.send_due(self._database, self._mailer)

    async def note_limits(self) -> int:
        """Write down mails for thresholds that were crossed."""
        return await limit_mails.note_limits(self._database)


async def run(settings: Settings) -> None:
    """Work until cancelled."""
    assert settings.database_url is not None
    database = Database(settings.database_url, connections_max=_CONNECTIONS_MAX)
    try:
        await MailWorker(database, mailer_for(settings.mail)).run()
    finally:
        await database.close()


async def _forever(act: Callable[[], Awaitable[Any]], pause_seconds: float) -> None:
    while True:
        pause = pause_seconds
        try:
            await act()
        except DOWN as error:
            pause = max(pause_seconds, _RETRY_SECONDS)
            _log.warning("mail.round_failed", act=act.__name__, error=type(error).__name__)
        except Exception:  # noqa: BLE001 - worker loops outlive a bug, and log it
            _log.exception("mail.round_broke", act=act.__name__)
        await asyncio.sleep(pause)
