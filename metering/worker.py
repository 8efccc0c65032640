"""What must be done once for all gateways: lost calls, caps in Redis, partitions, archives, windows nobody needs.

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
from core.writer import Writer
from metering import allowances, caps, partitions
from metering.archive import ArchiveUnwritable, archive_old
from metering.billing.plans import Plans
from metering.reconcile import ROUNDS_APART_SECONDS, Rounds, reconcile
from metering.sweeper import sweep

# OpenAI's usage API gives minutes for a day at most; a week lets one look into what happened.
MINUTES_KEPT: Final = timedelta(days=7)
_STATEMENT_SECONDS_MAX: Final = 30.0
_FORGET_MINUTES: Final = "DELETE FROM spend_windows WHERE seconds = 60 AND starts_at < now() - $1::interval"
_log = structlog.get_logger(__name__)


class MeteringStores(msgspec.Struct, frozen=True):
    """What the worker works on."""

    database_url: str
    database: Database
    redis: Redis


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How long each act rests between two rounds, and after one for which a store was down."""

    sweep_seconds: float = 5.0
    """A lost call is in the ledger a lease and one round after its gateway's death: below a minute."""
    reconcile_seconds: float = 5.0
    allowances_seconds: float = 15.0
    """Each round sums up the month of whoever has a plan: 160 ms for 200 organizations with 2,800 rows each."""
    rounds_apart_seconds: float = ROUNDS_APART_SECONDS
    """How far apart two rounds lie that must have seen a reservation for no running call, before it is settled."""
    housekeeping_seconds: float = 3_600.0
    retry_seconds: float = 10.0


class MeteringWorker:
    """The metering's recurring work. Any number of workers may run; none needs the others."""

    def __init__(
        self,
        stores: MeteringStores,
        settings: LedgerSettings,
        clock: Clock,
        pace: Pace | None = None,
        *,
        plans: Callable[[], Plans] = Plans,
    ) -> None:
        self._stores = stores
        self._settings = settings
        self._clock = clock
        self._pace = pace or Pace()
        self._plans = plans
        self._rounds = Rounds(clock, self._pace.rounds_apart_seconds)
        self._allowance_rounds = Rounds(clock, self._pace.rounds_apart_seconds)
        self._writer = Writer(stores.database_url, statement_seconds_max=_STATEMENT_SECONDS_MAX)

    async def run(self) -> None:
        """Work until cancelled."""
        pace = self._pace
        try:
            async with asyncio.TaskGroup() as group:
                for act, pause_seconds, retry_seconds in (
                    (self.sweep, pace.sweep_seconds, pace.retry_seconds),
                    (self.reconcile, pace.reconcile_seconds, pace.retry_seconds),
                    (self.reconcile_allowances, pace.allowances_seconds, pace.retry_seconds),
                    (self.keep_house, pace.housekeeping_seconds, pace.retry_seconds),
                    # Each try writes a whole month.
                    (self.archive, pace.housekeeping_seconds, pace.housekeeping_seconds),
                ):
                    group.create_task(_forever(act, pause_seconds, retry_seconds))
        finally:
            await self._writer.close()

    async def sweep(self) -> int:
        """Enter estimates for lost calls; return how many there were."""
        return await sweep(self._writer.fetch, lease_seconds=self._settings.lease_seconds)

    async def reconcile(self) -> int:
        """Put right what Redis holds of hard budgets; return how many reservations were settled for others.

        Those were seen in an earlier round, too.
        """
        return await reconcile(self._stores.database, self._stores.redis, self._clock, self._rounds)

    async def reconcile_allowances(self) -> int:
        """As `reconcile`, for plans' allowances; then write down whose are used to 80 % and fully."""
        stores = self._stores
        count = await reconcile(
            stores.database, stores.redis, self._clock, self._allowance_rounds, caps.allowance_pages
        )
        await allowances.note_thresholds(stores.database, self._plans(), self._clock)
        return count

    async def keep_house(self) -> None:
        """Make partitions ahead, forget minutes."""
        await partitions.make_ahead(self._writer.fetch, self._clock.now())
        await self._writer.fetch(_FORGET_MINUTES, MINUTES_KEPT)

    async def archive(self) -> list[Path]:
        """Write months to files and drop them, unless all are kept; return the files.

        A file that cannot be written is told, and nothing dropped for it.
        """
        months, directory = self._settings.retention_months, self._settings.archive_dir
        if not months:
            return []
        try:
            return await archive_old(self._writer, self._clock.now(), months, directory)
        except ArchiveUnwritable as error:
            _log.error("ledger.archive_failed", error=str(error))
            return []


async def _forever(act: Callable[[], Awaitable[Any]], pause_seconds: float, retry_seconds: float) -> None:
    name = act.__name__
    task = asyncio.current_task()
    assert task is not None
    while True:
        pause = pause_seconds
        try:
            await act()
        except (*DOWN, RedisError) as error:
            pause = min(pause_seconds, retry_seconds)
            _log.warning("metering.round_failed", act=name, error=type(error).__name__)
        except Exception:  # noqa: BLE001 - worker loops outlive a bug, and log it
            # Ours to mend; meanwhile the other acts go on, and this one where it can.
            _log.exception("metering.round_broke", act=name)
        if task.cancelling():
            # redis-py sends within asyncio.wait_for, which on Python 3.11 loses a cancellation that comes just then.
            raise asyncio.CancelledError
        await asyncio.sleep(pause)
