"""Which worker sends to which endpoint: one at a time, so that its limits and its health have one place.

A worker is heard of every second (`webhook_workers`); the endpoints of one that is not, for a lease, are anybody's. All
times are PostgreSQL's. PostgreSQL down: nobody takes anything, and what was taken stays whose it is for a lease; a
worker that was not heard of for as long begins nothing more. Two who did send at the same time would send the same
`webhook-id`: at least once is what is promised.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, NamedTuple

from webhooks.targets import Fetch

TAKEN_AT_ONCE_MAX: Final = 200
_BEAT: Final = """
WITH beat AS (
  INSERT INTO webhook_workers (worker_id) VALUES ($1) ON CONFLICT (worker_id) DO UPDATE SET seen_at = now()
)
SELECT
  (SELECT count(*) FROM webhook_workers WHERE seen_at > now() - $2::interval AND worker_id <> $1) + 1 AS workers,
  (SELECT count(*) FROM webhook_endpoints e JOIN webhook_workers w ON w.worker_id = e.worker_id
   WHERE w.seen_at > now() - $2::interval OR w.worker_id = $1) AS taken
"""
# Steps from one endpoint that is due something to the next along the index, however much each is due. What is free is
# taken organization by organization in turns, who has waited longest first, and no more than this worker's share. So is
# what is this worker's, and it does not know of, because an answer was lost; not what it has ($5).
_TAKE: Final = """
WITH RECURSIVE waiting AS (
  (SELECT endpoint_id FROM webhook_deliveries WHERE state = 'pending' ORDER BY endpoint_id LIMIT 1)
  UNION ALL
  SELECT (SELECT d.endpoint_id FROM webhook_deliveries d WHERE d.state = 'pending' AND d.endpoint_id > w.endpoint_id
          ORDER BY d.endpoint_id LIMIT 1)
  FROM waiting w WHERE w.endpoint_id IS NOT NULL
), free AS (
  SELECT e.id, e.worker_id, e.taken_at,
    row_number() OVER (PARTITION BY e.organization_id ORDER BY e.taken_at NULLS FIRST) AS turn
  FROM waiting w JOIN webhook_endpoints e ON e.id = w.endpoint_id
  WHERE e.disabled_at IS NULL AND e.deleted_at IS NULL AND coalesce(e.resting_until <= now(), true)
    AND NOT EXISTS (
      SELECT FROM webhook_workers o
      WHERE o.worker_id = e.worker_id AND o.worker_id <> $1 AND o.seen_at > now() - $2::interval
    )
    AND e.id <> ALL ($5::text[])
    AND EXISTS (SELECT FROM webhook_deliveries d
                WHERE d.endpoint_id = e.id AND d.state = 'pending' AND d.due_at <= now())
), share AS (
  SELECT ceil(count(*)::numeric / $3::int4)::int8 AS endpoints FROM free
), taken AS (
  SELECT e.id FROM free f JOIN webhook_endpoints e ON e.id = f.id AND e.worker_id IS NOT DISTINCT FROM f.worker_id
  ORDER BY f.turn, f.taken_at NULLS FIRST
  LIMIT (SELECT least(endpoints, $4::int8) FROM share)
  FOR UPDATE OF e SKIP LOCKED
)
UPDATE webhook_endpoints e SET worker_id = $1, taken_at = now() FROM taken WHERE e.id = taken.id RETURNING e.id
"""
# A row that somebody holds is left for the next time: nobody's recovery is to stop a worker.
_RELEASE: Final = """
WITH mine AS (
  SELECT id FROM webhook_endpoints WHERE id = ANY ($1::text[]) AND worker_id = $2 FOR UPDATE SKIP LOCKED
)
UPDATE webhook_endpoints e SET worker_id = NULL FROM mine WHERE e.id = mine.id RETURNING e.id
"""
# What nobody is heard of for is anybody's: no row of an endpoint has to be waited for.
_LEAVE: Final = "DELETE FROM webhook_workers WHERE worker_id = $1"
_FORGET: Final = "DELETE FROM webhook_workers WHERE seen_at < now() - interval '1 hour'"


class Standing(NamedTuple):
    """How many workers there are, and how many endpoints all of them hold."""

    workers: int
    taken: int


class Ownership:
    """One worker's part of the endpoints."""

    def __init__(self, beats: Fetch, acts: Fetch, worker_id: str, lease_seconds: float) -> None:
        """*beats* is for being heard of alone, so that nothing holds that up; *acts* for all else."""
        self._beats = beats
        self._acts = acts
        self._lease = timedelta(seconds=lease_seconds)
        self._workers = 1
        self.worker_id = worker_id

    async def beat(self) -> Standing:
        """Say that this worker is there."""
        row = (await self._beats(_BEAT, self.worker_id, self._lease))[0]
        self._workers = row["workers"]
        return Standing(row["workers"], row["taken"])

    async def take(self, count_max: int, known: list[str]) -> list[str]:
        """Take endpoints that are due something and that nobody has, but none of *known*; return their ids."""
        count_max = min(count_max, TAKEN_AT_ONCE_MAX)
        rows = await self._acts(_TAKE, self.worker_id, self._lease, self._workers, count_max, known)
        return [row["id"] for row in rows]

    async def release(self, endpoint_ids: list[str]) -> list[str]:
        """Leave endpoints to whoever asks next; return those that could be left."""
        return [row["id"] for row in await self._acts(_RELEASE, endpoint_ids, self.worker_id)]

    async def leave(self) -> None:
        """Leave everything: this worker ends."""
        await self._acts(_LEAVE, self.worker_id)

    async def forget(self) -> None:
        """Delete what is known of workers that are long gone."""
        await self._acts(_FORGET)
