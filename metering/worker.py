"""What must be done once for all gateways: lost calls, budgets in Redis, partitions, windows that nobody needs, archives.

A store that is down costs a round; the next one does what was left. No act stops another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from core.clock import Clock
from core.database import DOWN, Database
from core.settings import LedgerSettings
from metering import budgets, partitions
from metering.archive import ArchiveUnwritable, archive_old
from metering.sweeper import sweep
from metering.writer import Writer

# OpenAI's usage API gives minutes for a day at most; a week lets one look into what happened.
MINUTES_KEPT: Final = timedelta(days=7)
# A lost call is in the ledger a lease and one round after its gateway's death: below a minute.
_SWEEP_SECONDS: Final = 5.0
_RECONCILE_SECONDS: Final = 5.0
_HOUSEKEEPING_SECONDS: Final = 3_600.0
_RETRY_SECONDS: Final = 10.0
_STATEMENT_SECONDS_MAX: Final = 30.0
_FORGET_MINUTES: Final = "DELETE FROM spend_windows WHERE seconds = 60 AND starts_at < now() - $1::interval"
_log = structlog.get_logger(__name__)


class MeteringStores(msgspec.Struct, frozen=True):
    """What the worker works on."""

    database_url: str
    database: Database
    redis: Redis


class MeteringWorker:
    """The metering's recurring work. Any number of workers may run; none needs the others."""

    def __init__(self, stores: MeteringStores, settings: LedgerSettings, clock: Clock) -> None:
        self._stores = stores
        self._settings = settings
        self._clock = clock
        self._writer = Writer(stores.database_url, statement_seconds_max=_STATEMENT_SECONDS_MAX)

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_forever("sweep", self.sweep, _SWEEP_SECONDS))
                group.create_task(_forever("reconcile", self.reconcile, _RECONCILE_SECONDS))
                group.create_task(_forever("keep_house", self.keep_house, _HOUSEKEEPING_SECONDS))
                group.create_task(_forever("archive", self.archive, _HOUSEKEEPING_SECONDS))
        finally:
            await self._writer.close()

    async def sweep(self) -> int:
        """Enter estimates for lost calls; return how many there were."""
        return await sweep(self._writer.fetch, lease_seconds=self._settings.lease_seconds)

    async def reconcile(self) -> int:
        """Put right what Redis holds of hard budgets; return how many reservations were settled for others."""
        return await budgets.reconcile(self._stores.database, self._stores.redis, self._clock)

    async def keep_house(self) -> None:
        """Make partitions ahead, forget minutes."""
        await partitions.make_ahead(self._writer.fetch, self._clock.now())
        await self._writer.fetch(_FORGET_MINUTES, MINUTES_KEPT)

    async def archive(self) -> list[Path]:
        """Write months to files and drop them, unless all are kept; return the files.

        What cannot be written is tried again in an hour: a full disk is not emptied by writing to it.
        """
        months, directory = self._settings.retention_months, self._settings.archive_dir
        if not months:
            return []
        try:
            return await archive_old(self._writer, self._clock.now(), months, directory)
        except ArchiveUnwritable as error:
            _log.error("ledger.archive_failed", error=str(error))
            return []


async def _forever(name: str, act: Callable[[], Awaitable[Any]], pause_seconds: float) -> None:
    while True:
        pause = pause_seconds
        try:
            await act()
        except (*DOWN, RedisError) as error:
            pause = min(pause_seconds, _RETRY_SECONDS)
            _log.warning("metering.round_failed", act=name, error=type(error).__name__)
        except Exception:
            # Ours to mend; meanwhile the other acts go on, and this one where it can.
            _log.exception("metering.round_broke", act=name)
        await asyncio.sleep(pause)
