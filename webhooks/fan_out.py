"""From events to deliveries: which endpoints want which event, once for each.

A delivery's id is made of its endpoint and event, so that doing this twice adds nothing. An endpoint that is disabled
gets nothing; what it missed can be recovered (`webhooks/resend.py`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any, Final

from core.database import Database
from core.plain_sql import fetch
from webhooks.interests import Breather, Candidate, Interest, is_wanted

BATCH_EVENTS: Final = 500
_CLAIM: Final = """
SELECT id, organization_id, type, data::text AS data, endpoint_id FROM webhook_events
WHERE NOT is_fanned_out ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED
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


async def fan_out(database: Database) -> int:
    """Make the deliveries of the events that wait longest; return how many events there were. Errors: those of DOWN."""
    async with database.transaction() as session:
        events = await fetch(session, _CLAIM, BATCH_EVENTS)
        if not events:
            return 0
        interests: dict[str, list[Interest]] = defaultdict(list)
        for row in await fetch(session, _ENDPOINTS, sorted({event.organization_id for event in events})):
            interests[row.organization_id].append(Interest(row.id, row.event_types, row.filter))
        due: list[tuple[str, str, str, str, str]] = []
        breather = Breather()
        for event in events:
            due += [
                (delivery_id(endpoint_id, event.id), event.organization_id, endpoint_id, event.id, event.type)
                for endpoint_id in _recipients(event, interests[event.organization_id])
            ]
            await breather.breathe()
        columns = [list(column) for column in zip(*due, strict=True)] or [[], [], [], [], []]
        await fetch(session, _DELIVER, [event.id for event in events], *columns)
    return len(events)


def _recipients(event: Any, interests: list[Interest]) -> list[str]:
    """Return the endpoints that an event goes to. One for an endpoint alone was asked for: no filter holds it back."""
    if event.endpoint_id is not None:
        return [one.endpoint_id for one in interests if one.endpoint_id == event.endpoint_id]
    candidate = Candidate(event.type, event.data)
    return [one.endpoint_id for one in interests if is_wanted(one, candidate)]
