"""From events to deliveries: which endpoints want which event, once for each.

Organizations take turns, each with as many events as the others and no more of the worker's time than a share: whoever
has a flood of events, or filters that take long, delays nobody else's. A delivery's id is made of its endpoint and
event, so that doing this twice adds nothing. An endpoint that is disabled gets nothing; what it missed can be recovered
(`webhooks/resend.py`).
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from typing import Any, Final, NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from core.plain_sql import fetch
from webhooks.interests import Breather, Candidate, Interest, is_wanted

EVENTS_MAX: Final = 500
"""How many events there are in a round."""
ORGANIZATIONS_MAX: Final = 100
FILTER_SECONDS_MAX: Final = 0.02
"""After so long an organization's other events wait for the next round."""
# Steps along the index from one organization that waits to the next, however much each waits for. An organization
# whose events another worker has locked is in the answer without one.
_CLAIM: Final = """
WITH RECURSIVE waiting AS (
  (SELECT organization_id FROM webhook_events WHERE NOT is_fanned_out AND organization_id > $1
   ORDER BY organization_id LIMIT 1)
  UNION ALL
  SELECT (SELECT v.organization_id FROM webhook_events v
          WHERE NOT v.is_fanned_out AND v.organization_id > w.organization_id ORDER BY v.organization_id LIMIT 1)
  FROM waiting w WHERE w.organization_id IS NOT NULL
), turn AS (
  SELECT organization_id FROM waiting WHERE organization_id IS NOT NULL LIMIT $2
), share AS (
  SELECT greatest($3::int8 / greatest(count(*), 1), 1) AS events FROM turn
)
SELECT t.organization_id, s.events AS share, v.id, v.type, v.data, v.endpoint_id
FROM turn t CROSS JOIN share s
LEFT JOIN LATERAL (
  SELECT id, type, data::text AS data, endpoint_id FROM webhook_events e
  WHERE e.organization_id = t.organization_id AND NOT e.is_fanned_out
  ORDER BY e.id LIMIT s.events FOR UPDATE SKIP LOCKED
) v ON true
"""
_ENDPOINTS: Final = """
SELECT id, organization_id, event_types, filter FROM webhook_endpoints
WHERE organization_id = ANY ($1::text[]) AND disabled_at IS NULL AND deleted_at IS NULL
"""
_DELIVER: Final = """
WITH fanned_out AS (
  UPDATE webhook_events SET is_fanned_out = true WHERE id = ANY ($1::text[])
), due AS (
  INSERT INTO webhook_deliveries (id, organization_id, endpoint_id, event_id, event_type)
  SELECT * FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
  ON CONFLICT (id) DO NOTHING
  RETURNING 1
)
SELECT pg_notify('aap_webhooks', '') FROM (SELECT count(*) FROM due) AS made (count) WHERE count > 0
"""


def delivery_id(endpoint_id: str, event_id: str) -> str:
    """Return the id of what an endpoint is due of an event: sorted by when the event was made.

    `webhooks/resend.py` looks for the same in SQL.
    """
    digest = hashlib.md5(f"{endpoint_id}{event_id}".encode(), usedforsecurity=False).hexdigest()
    return f"dlv_{event_id[4:14]}{digest[:16]}"


class Round(NamedTuple):
    """What was done at a time."""

    events: int
    has_more: bool
    """Whether events were left, as far as was seen."""


class FanOut:
    """Makes deliveries, round by round; each goes on at the organization that the one before had come to."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._after = ""

    async def once(self) -> Round:
        """Make the deliveries of events that have none yet. Errors: those of DOWN."""
        async with self._database.transaction() as session:
            # Those before it may have got more meanwhile.
            is_from_middle = self._after != ""
            rows = await self._claim(session)
            events: dict[str, list[Any]] = defaultdict(list)
            for row in rows:
                if row.id is not None:
                    events[row.organization_id].append(row)
            if not events:
                return Round(0, has_more=False)
            interests: dict[str, list[Interest]] = defaultdict(list)
            for row in await fetch(session, _ENDPOINTS, list(events)):
                interests[row.organization_id].append(Interest.of(row))
            made = _Made()
            for organization_id, waiting in events.items():
                await made.add(waiting, interests[organization_id])
            await fetch(session, _DELIVER, made.event_ids, *made.columns())
        is_cut = any(len(waiting) >= waiting[0].share for waiting in events.values())
        has_more = is_cut or made.is_late or is_from_middle or self._after != ""
        return Round(len(made.event_ids), has_more=has_more)

    async def _claim(self, session: AsyncSession) -> list[Any]:
        for after in dict.fromkeys((self._after, "")):
            rows = await fetch(session, _CLAIM, after, ORGANIZATIONS_MAX, EVENTS_MAX)
            organizations = {row.organization_id for row in rows}
            self._after = max(organizations) if len(organizations) == ORGANIZATIONS_MAX else ""
            if rows:
                return rows
        return []


class _Made:
    """Deliveries of a round, and the events whose are all there."""

    def __init__(self) -> None:
        self.event_ids: list[str] = []
        self.is_late = False
        """Whether an organization's filters took too long for all of its events."""
        self._due: list[tuple[str, str, str, str, str]] = []
        self._breather = Breather()

    async def add(self, events: list[Any], interests: list[Interest]) -> None:
        """Add an organization's, as many as there is time for; at least one."""
        spent_seconds = 0.0
        for event in events:
            if spent_seconds > FILTER_SECONDS_MAX:
                self.is_late = True
                return
            candidate = Candidate(event.type, event.data)
            for interest in interests:
                begun = time.perf_counter()
                if _is_recipient(interest, event, candidate):
                    endpoint_id = interest.endpoint_id
                    self._due.append(
                        (delivery_id(endpoint_id, event.id), event.organization_id, endpoint_id, event.id, event.type)
                    )
                spent_seconds += time.perf_counter() - begun
                await self._breather.breathe()
            self.event_ids.append(event.id)

    def columns(self) -> list[list[str]]:
        """Return what `_DELIVER` takes of deliveries."""
        return [list(column) for column in zip(*self._due, strict=True)] or [[], [], [], [], []]


def _is_recipient(interest: Interest, event: Any, candidate: Candidate) -> bool:
    """Tell whether an event goes to an endpoint. One for an endpoint alone was asked for: no filter holds it back."""
    if event.endpoint_id is not None:
        return event.endpoint_id == interest.endpoint_id
    return is_wanted(interest, candidate)
