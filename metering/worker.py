"""What must be done once for all gateways: lost calls, budgets in Redis, partitions, windows that nobody needs.

A store that is down costs a round; the next one does what was left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from core.clock import Clock
from core.database import DOWN, Database
from core.settings import LedgerSettings
from metering import archive, budgets, partitions
from metering.sweeper import sweep
from metering.writer import Writer

# A lost call is in the ledger a lease and one round after its gateway's death: below a minute.
_SWEEP_SECONDS: Final = 5.0
_RECONCILE_SECONDS: Final = 5.0
_HOUSEKEEPING_SECONDS: Final = 3_600.0
_RETRY_SECONDS: Final = 10.0
_STATEMENT_SECONDS_MAX: Final = 30.0
# OpenAI's usage API gives minutes for a day at most; a week lets one look into what happened.
_MINUTES_KEPT: Final = timedelta(days=7)
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
        finally:
            await self._writer.close()

    async def sweep(self) -> int:
        """Enter estimates for lost calls; return how many there were."""
        return await sweep(self._writer.fetch, lease_seconds=self._settings.lease_seconds)

    async def reconcile(self) -> int:
        """Put right what Redis holds of hard budgets; return how many reservations were settled for others."""
        return await budgets.reconcile(self._stores.database, self._stores.redis, self._clock)

    async def keep_house(self) -> None:
        """Make partitions ahead, archive old ones, forget minutes."""
        now = self._clock.now()
        await partitions.make_ahead(self._writer.fetch, now)
        await self._writer.fetch(_FORGET_MINUTES, _MINUTES_KEPT)
        if self._settings.retention_months:
            await archive.archive_old(self._writer, now, self._settings.retention_months, self._settings.archive_dir)


async def _forever(name: str, act: Callable[[], Awaitable[Any]], pause_seconds: float) -> None:
    while True:
        pause = pause_seconds
        try:
            await act()
        except (*DOWN, RedisError) as error:
            pause = min(pause_seconds, _RETRY_SECONDS)
            _log.warning("metering.round_failed", act=name, error=type(error).__name__)
        await asyncio.sleep(pause)
