"""Billing's recurring work. Any number of workers may run: rows are leased, and rounds taken in turns.

Stripe or a store down costs a round; the next one does what was left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final

import msgspec
import structlog

from core.clock import Clock
from core.database import DOWN, Database
from metering.billing import catalog, marks
from metering.billing.apply import Applier
from metering.billing.errors import StripeFailed
from metering.billing.export import Exporter
from metering.billing.plans import Plans
from metering.billing.reconcile import Reconciler
from metering.billing.stripe_api import StripeApi
from metering.billing.top_up import TopUps

_DAY_SECONDS: Final = 86_400.0
_FAILURES: Final = (StripeFailed, *DOWN)
_log = structlog.get_logger(__name__)


class BillingPace(msgspec.Struct, frozen=True, kw_only=True):
    """How long each act rests between two rounds."""

    apply_seconds: float = 1.0
    export_seconds: float = 5.0
    look_seconds: float = 60.0
    catch_up_seconds: float = 600.0
    """Events that were not told are found this much later."""
    reconcile_seconds: float = 3_600.0
    doubts_seconds: float = 600.0
    """A draft is final an hour after it was made: what is in doubt is to be settled by then."""
    retry_seconds: float = 10.0


class BillingWorker:
    """Applies what Stripe told, tells it of usage, and compares the two."""

    def __init__(
        self,
        database: Database,
        api: StripeApi,
        clock: Clock,
        plans: Callable[[], Plans],
        *,
        stream_above: int,
        pace: BillingPace | None = None,
    ) -> None:
        self._database = database
        self._api = api
        self._clock = clock
        self._plans = plans
        self._pace = pace or BillingPace()
        self._exporter = Exporter(database, api, clock, stream_above=stream_above)
        self._top_ups = TopUps(database, api, clock)
        self._reconciler = Reconciler(database, api, clock)

    @property
    def _applier(self) -> Applier:
        # Anew each time: which meters there are, aap.toml may say otherwise by now.
        meters = catalog.meters_of(self._plans())
        return Applier(self._database, self._api, self._clock, self._plans, meters=meters)

    async def run(self) -> None:
        """Work until cancelled."""
        pace = self._pace
        async with asyncio.TaskGroup() as group:
            for act, pause_seconds in (
                (self.apply, pace.apply_seconds),
                (self.export, pace.export_seconds),
                (self.look, pace.look_seconds),
                (self.top_up, pace.look_seconds),
                (self.catch_up, pace.catch_up_seconds),
                (self.reconcile, min(pace.reconcile_seconds, 60.0)),
                (self.settle_doubts, min(pace.doubts_seconds, 60.0)),
            ):
                group.create_task(self._forever(act, pause_seconds))

    async def apply(self) -> int:
        """Apply the events that are due."""
        return await self._applier.apply_due()

    async def export(self) -> int:
        """Tell Stripe of usage."""
        return (await self._exporter.round()).acked

    async def look(self) -> None:
        """Do what time brings: periods and days of grace that end."""
        if await self._is_turn("look", self._pace.look_seconds):
            await self._applier.look_at_overdue()

    async def top_up(self) -> None:
        """Buy credit for those whose runs low."""
        if await self._is_turn("top_up", self._pace.look_seconds):
            await self._top_ups.round()

    async def catch_up(self) -> None:
        """Find events that were not told."""
        if await self._is_turn("catch_up", self._pace.catch_up_seconds):
            await self._applier.catch_up()

    async def reconcile(self) -> None:
        """Compare subscriptions and sums with Stripe's."""
        if await self._is_turn("reconcile", self._pace.reconcile_seconds):
            found = await self._reconciler.round()
            is_daily = await self._is_turn("invoices", _DAY_SECONDS)
            await self._applier.look_at_customers(with_invoices=is_daily)
            _log.info("billing.reconciled", hours=found.hours, repaired=found.repaired, alerts=found.alerts)

    async def settle_doubts(self) -> None:
        """Compare what is in doubt, or about to be final."""
        if await self._is_turn("doubts", self._pace.doubts_seconds):
            await self._reconciler.round(is_doubt_only=True)

    async def _is_turn(self, name: str, every_seconds: float) -> bool:
        async with self._database.transaction() as session:
            return await marks.take_turn(
                session, f"turn:{name}", self._clock.now(), timedelta(seconds=every_seconds * 0.9)
            )

    async def _forever(self, act: Callable[[], Awaitable[Any]], pause_seconds: float) -> None:
        while True:
            pause = pause_seconds
            try:
                await act()
            except _FAILURES as error:
                pause = max(pause_seconds, self._pace.retry_seconds)
                _log.warning("billing.round_failed", act=act.__name__, error=type(error).__name__)
            except Exception:  # noqa: BLE001 - worker loops outlive a bug, and log it
                _log.exception("billing.round_broke", act=act.__name__)
            await asyncio.sleep(pause)
