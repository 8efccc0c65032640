"""The worker that delivers webhooks. Any number may run; each takes its part of the endpoints.

From an event to its delivery: it is fanned out to the endpoints that want it (`fan_out.py`), an endpoint that is due
something is taken (`ownership.py`), what it is due is fetched (`workload.py`), sent (`dispatch.py`, `attempts.py`), and
what came of it is written many at once (`outcomes.py`).

PostgreSQL down: what is under way is sent and written down when it is back; nothing more is begun once this worker may
have been given up. Killed: what was not written down is sent again, under the same `webhook-id`, by whoever takes its
endpoints after a lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, Final

import structlog

from core.database import DOWN, Database
from core.ids import new_id
from core.writer import Writer
from webhooks import housekeeping, overview
from webhooks.dispatch import Dispatcher
from webhooks.fan_out import FanOut
from webhooks.key_acts import tell_expiring
from webhooks.lanes import Lane
from webhooks.listening import listen
from webhooks.outcomes import Recorded
from webhooks.ownership import Ownership, Standing
from webhooks.recording import Recording
from webhooks.stats import DeliveryStats
from webhooks.worker_parts import Bounds, Pace, WorkerParts
from webhooks.workload import Workload, WorkloadStores

_STATEMENT_SECONDS_MAX: Final = 10.0
# Lists of ids in the arguments are hashed in a plan made for them, and compared one by one in a plan made for any:
# 60 ms against 7 s to fetch for a thousand endpoints, 5 against 14 ms to write 300 attempts.
_PLANNED_ANEW: Final = {"plan_cache_mode": "force_custom_plan"}
_NAMED: Final = {"application_name": "aap-webhooks"}
_CLOSE_SECONDS_MAX: Final = 5.0
_REPLACED_OF_FULL: Final = 0.1
"""What part of its endpoints a worker that can take no more leaves every second."""
# A backlog is counted up to here: beyond, that it is long is all that matters.
_COUNTED_MAX: Final = 100_000
_log = structlog.get_logger(__name__)


class WebhookWorker:
    """Delivers until cancelled."""

    def __init__(
        self,
        database_url: str,
        parts: WorkerParts,
        *,
        retention: timedelta,
        pace: Pace | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        """*retention* is how long events, deliveries and attempts are kept."""
        bounds = bounds or Bounds()
        clock = parts.clock
        self._url = database_url
        self._clock = clock
        self._retention = retention
        self._pace = pace or Pace()
        self.stats = DeliveryStats()
        self._database = Database(database_url, connections_max=2)
        self._stores = WorkloadStores(
            reads=_writer(database_url, _PLANNED_ANEW),
            records=_writer(database_url, _PLANNED_ANEW),
            beats=_writer(database_url),
            keeps=_writer(database_url),
            database=self._database,
        )
        self._fan_out = FanOut(self._database)
        stores = self._stores
        self._ownership = Ownership(stores.beats.fetch, stores.reads.fetch, new_id("whw"), self._pace.lease_seconds)
        self._workload = Workload(self._stores, self._ownership, parts.sealer, clock, bounds.endpoints_max)
        self._dispatcher = Dispatcher(
            parts,
            stats=self.stats,
            done=self._note,
            may_begin=self._may_begin,
            process_max=bounds.process_max,
        )
        self._records = Recording(self._record)
        self._heard_until = 0.0
        self._may_take = True
        self._take_at = 0.0
        self._is_closing = False
        self._events = asyncio.Event()
        self._due = asyncio.Event()
        self._urgent = asyncio.Event()
        self._verdicts = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled; then finish what is under way, within bounds, and leave the endpoints to others."""
        pace = self._pace
        self._records.start()
        acts: tuple[tuple[Callable[[], Awaitable[Any]], asyncio.Event | None, float], ...] = (
            (self.beat, self._urgent, pace.beat_seconds),
            (self.keep, self._verdicts, pace.beat_seconds),
            (self.spread, self._events, pace.spread_seconds),
            (self.look, self._due, pace.poll_seconds),
            (self.tidy, None, pace.tidy_seconds),
            (self.measure, None, pace.measure_seconds),
            (self.delete_old, None, pace.delete_seconds),
            (self.tell_expiring, None, pace.expiring_seconds),
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(listen(self._url, self._hear))
                for act, wake, pause_seconds in acts:
                    group.create_task(self._forever(act, wake, pause_seconds))
        finally:
            await self._close()

    async def beat(self) -> None:
        """Say that this worker is there, and see which endpoints are still its own. Nobody's lock holds this up."""
        begun_at = self._clock.monotonic_seconds()
        standing = await self._ownership.beat()
        self._workload.leave(len(self._workload) if self._is_closing else self._surplus_of(standing))
        await self._workload.check()
        # Only now: what it had before a pause may be others' by this time.
        self._heard_until = begun_at + self._pace.lease_seconds - self._pace.beat_seconds
        # What was due later may be due by now.
        self._look_everywhere()

    async def keep(self) -> None:
        """Write how endpoints are doing, leave those that others should have, and carry out verdicts."""
        await self._workload.save()
        await self._workload.release()
        await self._workload.judge()

    async def spread(self) -> int:
        """Make the deliveries of events that have none yet; return how many events there were."""
        whole = 0
        while True:
            done = await self._fan_out.once()
            whole += done.events
            if done.events:
                self._look_everywhere()
            if not done.has_more:
                return whole

    async def look(self) -> int:
        """Take endpoints that nobody sends to, and fetch what is due; return how many deliveries."""
        if not self._is_heard_of():
            return 0
        await self._workload.load_changed()
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._may_take and now >= self._take_at:
            self._may_take, self._take_at = False, now + self._pace.take_seconds_min
            self._may_take = await self._workload.take() or self._may_take
        if self._may_take:
            loop.call_later(max(self._take_at - now, 0.0), self._due.set)
        return await self._workload.refill(self._dispatcher)

    async def tidy(self) -> int:
        """End deliveries to endpoints that were disabled."""
        return await housekeeping.give_up_on_disabled(self._database)

    async def measure(self) -> None:
        """Count what is due."""
        async with self._database.transaction() as session:
            backlog = await overview.backlog(session, _COUNTED_MAX)
        age = backlog.oldest_seconds
        self.stats.due = backlog.due
        self.stats.oldest_due_since = None if age is None else self._clock.monotonic_seconds() - age
        self.stats.endpoints, self.stats.in_flight = len(self._workload), self._dispatcher.in_flight

    async def delete_old(self) -> int:
        """Delete what is kept no longer."""
        await self._ownership.forget()
        return await housekeeping.delete_old(self._database, self._retention)

    async def tell_expiring(self) -> int:
        """Tell of API keys that end within a week."""
        return await tell_expiring(self._database, self._clock.now())

    def _hear(self, message: str) -> None:
        # With an endpoint's id: it was changed. Without: something happened, or became due.
        if message:
            self._workload.try_again(message)
            self._urgent.set()
        self._events.set()
        self._look_everywhere()

    def _look_everywhere(self) -> None:
        self._workload.look_everywhere()
        self._may_take = True
        self._due.set()

    def _is_heard_of(self) -> bool:
        return self._clock.monotonic_seconds() < self._heard_until

    def _may_begin(self, lane: Lane) -> bool:
        return self._is_heard_of() and self._records.has_room(lane.target.organization_id)

    def _note(self, lane: Lane, recorded: Recorded) -> None:
        self._records.add(lane, recorded)
        if lane.health.disabled_for is not None:
            self._verdicts.set()
        if lane.is_hungry:
            self._due.set()

    async def _record(self, recorded: list[tuple[Lane, Recorded]]) -> list[tuple[Lane, Recorded]]:
        held = await self._workload.record(recorded)
        if any(lane.is_hungry or lane.buffer for lane, _ in recorded):
            self._due.set()
        return held

    def _surplus_of(self, standing: Standing) -> int:
        surplus = len(self._workload) - math.ceil(standing.taken / standing.workers)
        # One too many is no reason to hand endpoints back and forth.
        surplus = surplus if surplus > 1 and standing.workers > 1 else 0
        if len(self._workload) >= self._workload.endpoints_max:
            # Endpoints that always have something to send would keep the others out: some get in line again.
            surplus = max(surplus, math.ceil(self._workload.endpoints_max * _REPLACED_OF_FULL))
        return surplus

    async def _forever(
        self, act: Callable[[], Awaitable[Any]], wake: asyncio.Event | None, pause_seconds: float
    ) -> None:
        """Run *act* again and again: *pause_seconds* later, or when woken, though not without a breath between."""
        name = getattr(act, "__name__", "act")
        while True:
            if wake is not None:
                wake.clear()
            pause = pause_seconds
            try:
                await act()
            except DOWN as error:
                pause = min(pause_seconds, self._pace.retry_seconds)
                _log.warning("webhooks.round_failed", act=name, error=type(error).__name__)
            except Exception:  # noqa: BLE001 - worker loops outlive a bug, and log it
                _log.exception("webhooks.round_broke", act=name)
            if wake is None:
                await asyncio.sleep(pause)
                continue
            await asyncio.sleep(min(pause, self._pace.round_seconds_min))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await wake.wait()

    async def _close(self) -> None:
        # Heard of until the last attempt has ended, so that nobody sends beside it; what has none is left at once.
        self._is_closing = True
        acts = (self.beat, self.keep)
        ending = [asyncio.create_task(self._forever(act, None, self._pace.beat_seconds)) for act in acts]
        await self._dispatcher.close(self._pace.drain_seconds)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        left = await self._records.close(_CLOSE_SECONDS_MAX)
        if left:
            _log.warning("webhooks.attempts_not_recorded", count=left)
        try:
            async with asyncio.timeout(_CLOSE_SECONDS_MAX):
                await self._workload.save()
                await self._ownership.leave()
        except (*DOWN, TimeoutError) as error:
            _log.warning("webhooks.not_left", error=type(error).__name__)
        for writer in (self._stores.reads, self._stores.records, self._stores.beats, self._stores.keeps):
            await writer.close()
        await self._database.close()


def _writer(url: str, planning: Mapping[str, str] | None = None) -> Writer:
    return Writer(url, statement_seconds_max=_STATEMENT_SECONDS_MAX, planning={**_NAMED, **(planning or {})})
