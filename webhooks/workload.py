"""The endpoints that a worker has, and what it keeps of them in PostgreSQL."""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

from core.clock import Clock
from core.database import Database
from core.sealing import Sealer
from core.writer import Writer
from webhooks import verdicts
from webhooks.dispatch import Dispatcher
from webhooks.health import Health
from webhooks.lanes import Lane
from webhooks.outcomes import Due, Recorded, record
from webhooks.ownership import Ownership
from webhooks.targets import Target, load

# Ownership is looked at in the same statement: who has lost an endpoint finds nothing due there.
_FETCH: Final = """
SELECT d.id, d.organization_id, d.endpoint_id, d.event_id, d.event_type, d.step, v.created_at, v.data::text AS data,
  coalesce(d.requested_at, v.created_at) AS asked_at, e.updated_at
FROM unnest($1::text[], $2::int4[]) AS lane (endpoint_id, room)
JOIN webhook_endpoints e
  ON e.id = lane.endpoint_id AND e.worker_id = $3 AND e.disabled_at IS NULL AND e.deleted_at IS NULL
CROSS JOIN LATERAL (
  SELECT * FROM webhook_deliveries p
  WHERE p.endpoint_id = lane.endpoint_id AND p.state = 'pending' AND p.due_at <= now() AND p.id <> ALL ($4::text[])
  ORDER BY p.due_at LIMIT lane.room
) d
JOIN webhook_events v ON v.id = d.event_id
ORDER BY d.due_at
"""
_MINE: Final = """
SELECT id, updated_at FROM webhook_endpoints
WHERE id = ANY ($1::text[]) AND worker_id = $2 AND disabled_at IS NULL AND deleted_at IS NULL
"""
_SAVE: Final = """
WITH mine AS (
  -- A row that somebody holds is left for the next time.
  SELECT id FROM webhook_endpoints WHERE id = ANY ($1::text[]) AND worker_id = $9 FOR UPDATE SKIP LOCKED
)
UPDATE webhook_endpoints e SET
  failing_since = s.failing_since, consecutive_failures = s.consecutive_failures,
  resting_until = now() + make_interval(secs => s.rest_seconds),
  warned_percent = least(e.warned_percent, s.warned_percent),
  last_success_at = coalesce(s.last_success_at, e.last_success_at),
  last_problem = coalesce(s.last_problem, e.last_problem)
FROM unnest(
  $1::text[], $2::timestamptz[], $3::timestamptz[], $4::int4[], $5::float8[], $6::int2[], $7::timestamptz[],
  $8::text[]
) AS s (
  id, enabled_at, failing_since, consecutive_failures, rest_seconds, warned_percent, last_success_at, last_problem
)
JOIN mine USING (id)
WHERE e.id = s.id AND e.enabled_at = s.enabled_at
RETURNING e.id
"""
_IDLE_SECONDS: Final = 5.0
_UNREADABLE_SECONDS: Final = 30.0
_VERDICTS_AT_ONCE: Final = 20


class WorkloadStores(msgspec.Struct, frozen=True):
    """Connections for what must not wait for each other; *keeps* is for how endpoints do, the pool for what is rare."""

    reads: Writer
    records: Writer
    beats: Writer
    keeps: Writer
    database: Database


class Workload:
    """A worker's lanes."""

    def __init__(
        self, stores: WorkloadStores, ownership: Ownership, sealer: Sealer, clock: Clock, endpoints_max: int
    ) -> None:
        self._stores = stores
        self._ownership = ownership
        self._sealer = sealer
        self._clock = clock
        self._looks = 0
        self._unreadable: dict[str, float] = {}
        """Endpoints whose secrets this worker cannot open, and until when it leaves them to others."""
        self._left: dict[str, Lane] = {}
        """Lanes that were let go of with attempts under way: should they come back, those count."""
        self.lanes: dict[str, Lane] = {}
        self.endpoints_max = endpoints_max

    def look_everywhere(self) -> None:
        """Something may have become due anywhere."""
        self._looks += 1
        for lane in self.lanes.values():
            lane.is_exhausted = False

    def try_again(self, endpoint_id: str) -> None:
        """An endpoint was changed: its secrets may be such as can be opened."""
        self._unreadable.pop(endpoint_id, None)

    async def take(self) -> bool:
        """Take endpoints that are due something and that nobody sends to; return whether to look for more.

        Errors: those of DOWN.
        """
        room = self.endpoints_max - len(self.lanes)
        if room <= 0:
            return False
        now = self._clock.monotonic_seconds()
        self._unreadable = {one: until for one, until in self._unreadable.items() if until > now}
        taken = await self._ownership.take(room, [*self.lanes, *self._unreadable])
        if taken:
            await self._load(taken, are_taken=True)
        return bool(taken)

    async def refill(self, dispatcher: Dispatcher) -> int:
        """Fetch what is due at lanes that run low, and have it sent; return how much it was. Errors: those of DOWN."""
        now, looks = self._clock.now(), self._looks
        hungry = [lane for lane in self.lanes.values() if lane.is_hungry and not lane.is_resting(now)]
        if not hungry:
            self._serve_all(dispatcher)
            return 0
        asked = {lane.target.endpoint_id: lane for lane in hungry}
        rooms = {lane.target.endpoint_id: lane.room for lane in hungry}
        busy = [delivery_id for lane in hungry for delivery_id in lane.busy]
        rows = await self._stores.reads.fetch(
            _FETCH, list(rooms), list(rooms.values()), self._ownership.worker_id, busy
        )
        for row in rows:
            self._note_change(row["endpoint_id"], row["updated_at"])
        await self.load_changed()
        found = dict.fromkeys(rooms, 0)
        for row in rows:
            lane = asked[row["endpoint_id"]]
            found[row["endpoint_id"]] += 1
            if lane.may_begin and row["id"] not in lane.busy:
                lane.busy.add(row["id"])
                lane.buffer.append(Due(*list(row.values())[:-1]))
        for lane in hungry:
            # What was told of meanwhile may have come after the statement had looked.
            is_current = looks == self._looks
            lane.is_exhausted = is_current and found[lane.target.endpoint_id] < rooms[lane.target.endpoint_id]
        self._serve_all(dispatcher)
        return len(rows)

    def _serve_all(self, dispatcher: Dispatcher) -> None:
        # Also those that need no more: a rest may have ended, or what kept this worker from beginning anything.
        for lane in self.lanes.values():
            if lane.buffer:
                dispatcher.serve(lane)

    async def record(self, recorded: list[tuple[Lane, Recorded]]) -> list[tuple[Lane, Recorded]]:
        """Write what came of attempts, and return those that are to be written later: somebody holds their deliveries.

        Of the others, deliveries may be fetched again from then on. Errors: those of DOWN.
        """
        held = await record(self._stores.records.fetch, [one for _, one in recorded])
        for lane, one in recorded:
            if one.due.delivery_id not in held:
                lane.busy.discard(one.due.delivery_id)
        return [pair for pair in recorded if pair[1].due.delivery_id in held]

    async def load_changed(self) -> None:
        """Load endpoints that were changed: until then nothing more is sent to them. Errors: those of DOWN."""
        changed = [endpoint_id for endpoint_id, lane in self.lanes.items() if lane.is_outdated]
        if changed:
            await self._load(changed)

    async def check(self) -> None:
        """Let go of endpoints that are no longer this worker's, and note which were changed.

        Nothing else waits on this connection: who was disabled is sent nothing more, whatever reads wait for.
        """
        self._left = {endpoint_id: lane for endpoint_id, lane in self._left.items() if lane.busy}
        if not self.lanes:
            return
        asked = dict(self.lanes)
        rows = await self._stores.beats.fetch(_MINE, list(asked), self._ownership.worker_id)
        mine = {row["id"]: row["updated_at"] for row in rows}
        for endpoint_id, lane in asked.items():
            # One that was taken, or let go of, while PostgreSQL answered is not spoken of.
            if self.lanes.get(endpoint_id) is not lane:
                continue
            if endpoint_id not in mine:
                self._drop(endpoint_id)
            else:
                self._note_change(endpoint_id, mine[endpoint_id])

    async def judge(self) -> None:
        """Warn of endpoints that fail, and disable those that have for too long. Errors: those of DOWN.

        So many in a round that who this worker is does not go unsaid meanwhile.
        """
        due = sorted((lane for lane in self.lanes.values() if lane.is_to_be_judged), key=lambda lane: lane.judged_at)
        for lane in due[:_VERDICTS_AT_ONCE]:
            lane.judged_at = self._clock.monotonic_seconds()
            percent, target = lane.health.warned_percent, lane.target
            if lane.health.disabled_for is not None:
                if await verdicts.disable(self._stores.database, lane, lane.health.disabled_for):
                    self._drop(lane.target.endpoint_id)
            elif await verdicts.warn(self._stores.database, lane) and lane.is_current(target):
                lane.said_percent = percent

    async def save(self) -> None:
        """Write how endpoints are doing, where that has changed. Errors: those of DOWN."""
        lanes = [lane for lane in self.lanes.values() if lane.is_unsaved]
        if not lanes:
            return
        now = self._clock.now()
        for lane in lanes:
            lane.is_unsaved = False
        saved: set[str] = set()
        try:
            rows = await self._stores.keeps.fetch(
                _SAVE,
                [lane.target.endpoint_id for lane in lanes],
                [lane.target.enabled_at for lane in lanes],
                [lane.health.failing_since for lane in lanes],
                [lane.health.consecutive_failures for lane in lanes],
                [lane.rest_seconds(now) for lane in lanes],
                [lane.health.warned_percent for lane in lanes],
                [lane.last_success_at for lane in lanes],
                [lane.last_problem for lane in lanes],
                self._ownership.worker_id,
            )
            saved = {row["id"] for row in rows}
        finally:
            for lane in lanes:
                lane.is_unsaved = lane.is_unsaved or lane.target.endpoint_id not in saved

    def leave(self, count: int) -> None:
        """Begin nothing more at *count* endpoints, those that were taken first, and at the others go on.

        Two who send to one endpoint would be twice what it takes: what is under way comes to its end before `release`.
        """
        for place, lane in enumerate(self.lanes.values()):
            lane.is_leaving = place < count

    async def release(self) -> None:
        """Leave endpoints that rest, have nothing to do, or are to be left, to whoever asks next."""
        now, monotonic = self._clock.now(), self._clock.monotonic_seconds()
        left: list[str] = []
        for endpoint_id, lane in self.lanes.items():
            if lane.is_leaving or lane.is_resting(now):
                lane.forget_buffer()
            # A verdict that is not carried out yet would be forgotten with the lane.
            if lane.busy or lane.is_unsaved or lane.is_to_be_judged:
                lane.idle_since = None
                continue
            lane.idle_since = lane.idle_since or monotonic
            is_idle = monotonic - lane.idle_since >= _IDLE_SECONDS
            if lane.is_leaving or lane.is_resting(now) or is_idle:
                left.append(endpoint_id)
        if not left:
            return
        released = [self.lanes[endpoint_id] for endpoint_id in left]
        for lane in released:
            # Nothing more is fetched or begun meanwhile.
            lane.is_being_released = True
        try:
            for endpoint_id in await self._ownership.release(left):
                self._drop(endpoint_id)
        finally:
            for lane in released:
                lane.is_being_released = False

    def __len__(self) -> int:
        return len(self.lanes)

    async def _load(self, endpoint_ids: list[str], *, are_taken: bool = False) -> None:
        """Load endpoints; only those that *are_taken* get a lane. Others may have been let go of meanwhile."""
        loaded, broken = await load(
            self._stores.reads.fetch, endpoint_ids, self._ownership.worker_id, self._sealer, self._clock
        )
        for target, health in loaded:
            lane = self.lanes.get(target.endpoint_id)
            if lane is not None:
                lane.become(target, health)
            elif are_taken:
                self.lanes[target.endpoint_id] = self._lane(target, health)
        if broken:
            await self._leave_to_others(broken)

    def _lane(self, target: Target, health: Health) -> Lane:
        left = self._left.pop(target.endpoint_id, None)
        if left is None or not left.busy:
            return Lane(target, health)
        left.come_back(target, health)
        return left

    async def _leave_to_others(self, endpoint_ids: list[str]) -> None:
        """Release endpoints that this worker cannot sign for: another may have the key."""
        until = self._clock.monotonic_seconds() + _UNREADABLE_SECONDS
        for endpoint_id in endpoint_ids:
            self._unreadable[endpoint_id] = until
            self._drop(endpoint_id)
        await self._ownership.release(endpoint_ids)

    def _note_change(self, endpoint_id: str, updated_at: datetime) -> None:
        lane = self.lanes.get(endpoint_id)
        if lane is not None and lane.target.updated_at != updated_at:
            lane.is_outdated = True

    def _drop(self, endpoint_id: str) -> None:
        lane = self.lanes.pop(endpoint_id, None)
        if lane is not None:
            lane.forget_buffer()
            lane.is_left = True
            if lane.busy:
                self._left[endpoint_id] = lane
            if lane.timer is not None:
                lane.timer.cancel()
