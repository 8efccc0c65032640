"""Who sends next: within bounds for each endpoint, each organization, and the process, in turns.

An endpoint that is full or resting holds up nobody. What an organization has under way is bounded, so that many slow
endpoints of one take no more than its part; those that wait for room get it organization by organization.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

import structlog

from webhooks.attempts import Message, Outcome
from webhooks.events import body_of
from webhooks.lanes import Lane
from webhooks.outcomes import Due, Recorded, conclude
from webhooks.stats import DeliveryStats
from webhooks.worker_parts import WorkerParts

ORGANIZATION_MAX: Final = 64
# So many of an organization find room, however much others have under way.
_ALWAYS_ADMITTED: Final = 4
_log = structlog.get_logger(__name__)


class Dispatcher:
    """Sends what lanes hold."""

    def __init__(
        self,
        parts: WorkerParts,
        *,
        stats: DeliveryStats,
        done: Callable[[Lane, Recorded], None],
        may_begin: Callable[[Lane], bool],
        process_max: int,
    ) -> None:
        """*done* is called with every attempt that has ended, once its lane has taken note of it.

        *may_begin* tells whether attempts may be begun at all at a lane. No more than *process_max* are under way, but
        for organizations that have few.
        """
        self._process_max = process_max
        self._sender = parts.sender
        self._policy = parts.policy
        self._clock = parts.clock
        self._stats = stats
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._by_organization: Counter[str] = Counter()
        self._held: dict[str, deque[Lane]] = {}
        """Lanes that have something to send, and no room beside what their organization or the process has."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._may_begin = may_begin
        self._is_closing = False

    @property
    def in_flight(self) -> int:
        """How many attempts are under way."""
        return len(self._tasks)

    def serve(self, lane: Lane) -> None:
        """Send as much of what *lane* holds as there is room for."""
        while self._is_ready(lane):
            organization_id = lane.target.organization_id
            if not self._has_room(organization_id):
                held = self._held.setdefault(organization_id, deque())
                if lane not in held:
                    held.append(lane)
                return
            self._begin(lane)

    async def close(self, timeout_seconds: float) -> None:
        """Wait for what is under way, and end what does not end in time: it is delivered again by somebody else."""
        self._is_closing = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _has_room(self, organization_id: str) -> bool:
        count = self._by_organization[organization_id]
        return count < ORGANIZATION_MAX and (not self._is_full or count < _ALWAYS_ADMITTED)

    @property
    def _is_full(self) -> bool:
        return len(self._tasks) >= self._process_max

    def _is_ready(self, lane: Lane) -> bool:
        if (
            not lane.buffer
            or not lane.may_begin
            or lane.in_flight >= lane.window
            or self._is_closing
            or not self._may_begin(lane)
        ):
            return False
        if lane.is_resting(self._clock.now()):
            return False
        pause_seconds = lane.seconds_until_next(self._clock.monotonic_seconds())
        if pause_seconds > 0:
            if lane.timer is None:
                lane.timer = self._loop.call_later(pause_seconds, self._resume, lane)
            return False
        return True

    def _resume(self, lane: Lane) -> None:
        lane.timer = None
        self.serve(lane)

    def _begin(self, lane: Lane) -> None:
        due = lane.begin(self._clock.monotonic_seconds())
        self._by_organization[lane.target.organization_id] += 1
        task = self._loop.create_task(self._attempt(lane, due))
        self._tasks.add(task)
        task.add_done_callback(lambda ended: self._finished(lane, due, ended))

    async def _attempt(self, lane: Lane, due: Due) -> None:
        target = lane.target
        if due.step == 0:
            self._stats.waited((self._clock.now() - due.asked_at).total_seconds())
        try:
            message = Message(due.event_id, body_of(due.event_id, due.event_type, due.created_at, due.data.encode()))
            outcome = await self._sender.attempt(target, message, self._policy())
        except Exception:  # noqa: BLE001 - ours to mend; the delivery is tried again as after any failure
            _log.exception("webhooks.attempt_broke", endpoint_id=target.endpoint_id, delivery_id=due.delivery_id)
            outcome = Outcome(None, "an error of ours", 0, None, None, self._clock.now(), is_ours=True)
        is_current = lane.is_current(target)
        lane.finish(outcome, self._clock.now(), target)
        self._stats.attempted(outcome)
        self._done(lane, conclude(due, outcome, is_current=is_current))

    def _finished(self, lane: Lane, due: Due, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        organization_id = lane.target.organization_id
        self._by_organization[organization_id] -= 1
        if not self._by_organization[organization_id]:
            del self._by_organization[organization_id]
        lane.in_flight -= 1
        if task.cancelled() or task.exception() is not None:
            lane.busy.discard(due.delivery_id)
            return
        self._serve_held(organization_id)
        self.serve(lane)

    def _serve_held(self, freed: str) -> None:
        """Give the room that there is to those who wait, in turns; *freed* may have room whatever others do."""
        if self._is_full and freed in self._held and self._has_room(freed):
            self._serve_first(freed)
        for organization_id in list(self._held):
            if self._is_full:
                return
            if self._has_room(organization_id):
                self._serve_first(organization_id)

    def _serve_first(self, organization_id: str) -> None:
        """Begin one attempt of an organization that waits; the rest of its lanes go to the end of the line."""
        held = self._held.pop(organization_id)
        while held:
            lane = held.popleft()
            if self._is_ready(lane):
                self._begin(lane)
                if lane.buffer:
                    held.append(lane)
                break
        if held:
            self._held[organization_id] = held
