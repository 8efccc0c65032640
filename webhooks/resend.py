"""Sending again: one delivery, what an endpoint has missed since a moment, or what a filter describes.

What is sent again has the `webhook-id` that it had: a receiver that did take it knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, get_args

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import database_now
from core.errors import Invalid
from core.ids import OrganizationId, id_range_start
from core.plain_sql import fetch
from webhooks.deliveries import State
from webhooks.endpoints import check_types, locked_endpoint
from webhooks.errors import EndpointIsDisabled, TooManyDeliveries, WebhookNotFound
from webhooks.events import EVERYTHING, MUST_BE_NAMED, UNASKED
from webhooks.fan_out import delivery_id
from webhooks.interests import Breather, Candidate, Interest, is_wanted
from webhooks.publish import wake
from webhooks.tables import WebhookEndpointRow

DELIVERIES_MAX: Final = 100_000
REACH: Final = timedelta(days=14)
"""How far back one may go (as with Svix)."""
_ONE: Final = """
SELECT endpoint_id FROM webhook_deliveries WHERE id = $1 AND organization_id = $2
"""
# What was taken since it was chosen is not sent again.
_AGAIN: Final = """
UPDATE webhook_deliveries SET state = 'pending', step = 0, due_at = now(), requested_at = now(), finished_at = NULL
WHERE id = ANY ($1::text[]) AND organization_id = $2 AND state = ANY ($3::text[])
RETURNING 1
"""
# An id is as old as what it tells of: of a call, when that began. Ids lead there, and times decide.
_NOT_TAKEN: Final = """
SELECT id FROM webhook_deliveries
WHERE endpoint_id = $1 AND organization_id = $2 AND id >= $3 AND created_at >= $4 AND state IN ('failed', 'pending')
ORDER BY id LIMIT $5
"""
# Events that happened while the endpoint was disabled have no delivery.
_NEVER_DUE: Final = """
SELECT v.id, v.type, v.data::text AS data FROM webhook_events v
WHERE v.organization_id = $2 AND v.id >= $3 AND v.created_at >= $4 AND v.is_fanned_out AND v.endpoint_id IS NULL
  AND (v.type = ANY ($6::text[]) OR ($7::bool AND v.type <> ALL ($8::text[])))
  AND NOT EXISTS (
    SELECT FROM webhook_deliveries d
    WHERE d.id = 'dlv_' || substr(v.id, 5, 10) || substr(md5($1 || v.id), 1, 16)
  )
ORDER BY v.id LIMIT $5
"""
_CHOSEN: Final = """
SELECT id FROM webhook_deliveries
WHERE endpoint_id = $1 AND organization_id = $2 AND id >= $3 AND created_at >= $4 AND created_at < $5
  AND (cardinality($6::text[]) = 0 OR event_type = ANY ($6::text[])) AND ($7::text IS NULL OR state = $7::text)
ORDER BY id LIMIT $8
"""
_MAKE: Final = """
INSERT INTO webhook_deliveries (id, organization_id, endpoint_id, event_id, event_type, requested_at)
SELECT id, $1, $2, event_id, event_type, now()
FROM unnest($3::text[], $4::text[], $5::text[]) AS m (id, event_id, event_type)
ON CONFLICT (id) DO NOTHING
"""
_STATES: Final = list(get_args(State))
_EVENTS_AT_ONCE: Final = 5_000
_LONGEST_CALL: Final = timedelta(hours=6)


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be sent again of what an endpoint was sent: between two moments, of these types, in this state."""

    since: datetime
    until: datetime | None = None
    event_types: Sequence[str] = ()
    state: State | None = None


async def resend(session: AsyncSession, one_id: str, *, organization_id: OrganizationId) -> None:
    """Send a delivery again, whatever came of it, with its schedule from the beginning.

    Errors: WebhookNotFound, EndpointIsDisabled.
    """
    rows = await fetch(session, _ONE, one_id, organization_id)
    if not rows:
        raise WebhookNotFound("delivery")
    endpoint = await _enabled(session, rows[0].endpoint_id, organization_id=organization_id)
    await fetch(session, _AGAIN, [one_id], organization_id, _STATES)
    await wake(session, endpoint.id)


async def recover(
    session: AsyncSession, endpoint_id: str, since: datetime, *, organization_id: OrganizationId, is_dry_run: bool
) -> int:
    """Send an endpoint what it has not taken since a moment, or was not due because it was disabled; return how many.

    Errors: WebhookNotFound, EndpointIsDisabled, TooManyDeliveries; Invalid for a moment that is too long ago.
    """
    endpoint = await _enabled(session, endpoint_id, organization_id=organization_id)
    await _checked_reach(session, since)
    start = id_range_start("dlv", since - _LONGEST_CALL)
    rows = await fetch(session, _NOT_TAKEN, endpoint_id, organization_id, start, since, DELIVERIES_MAX + 1)
    ids = [row.id for row in rows]
    missed = await _never_due(session, endpoint, max(since, endpoint.created_at))
    count = len(ids) + len(missed)
    _require_not_too_many(count)
    if not is_dry_run and count:
        await _enabled(session, endpoint_id, organization_id=organization_id, is_read=False)
        again = await fetch(session, _AGAIN, ids, organization_id, ["failed", "pending"])
        count = len(again) + len(missed)
        new_ids = [delivery_id(endpoint_id, event_id) for event_id, _ in missed]
        event_ids, types = [one for one, _ in missed], [name for _, name in missed]
        await fetch(session, _MAKE, organization_id, endpoint_id, new_ids, event_ids, types)
        await wake(session, endpoint_id)
    return count


async def replay(
    session: AsyncSession, endpoint_id: str, chosen: Replay, *, organization_id: OrganizationId, is_dry_run: bool
) -> int:
    """Send an endpoint again what it was sent, as far as *chosen* describes it; return how many deliveries.

    Errors: as `recover`.
    """
    check_types(chosen.event_types, more=UNASKED)
    await _enabled(session, endpoint_id, organization_id=organization_id)
    now = await _checked_reach(session, chosen.since)
    since, until = chosen.since, chosen.until or now
    arguments = (id_range_start("dlv", since - _LONGEST_CALL), since, until, list(chosen.event_types), chosen.state)
    rows = await fetch(session, _CHOSEN, endpoint_id, organization_id, *arguments, DELIVERIES_MAX + 1)
    _require_not_too_many(len(rows))
    if not is_dry_run and rows:
        await _enabled(session, endpoint_id, organization_id=organization_id, is_read=False)
        states = _STATES if chosen.state is None else [chosen.state]
        rows = await fetch(session, _AGAIN, [row.id for row in rows], organization_id, states)
        await wake(session, endpoint_id)
    return len(rows)


async def _never_due(session: AsyncSession, endpoint: WebhookEndpointRow, since: datetime) -> list[tuple[str, str]]:
    """Return ids and types of events that the endpoint wants and has no delivery of."""
    found: list[tuple[str, str]] = []
    interest, breather = Interest.of(endpoint), Breather()
    start = id_range_start("evt", since - _LONGEST_CALL)
    chosen = (_EVENTS_AT_ONCE, endpoint.event_types, EVERYTHING in endpoint.event_types, list(MUST_BE_NAMED))
    while True:
        rows: list[Any] = await fetch(session, _NEVER_DUE, endpoint.id, endpoint.organization_id, start, since, *chosen)
        for row in rows:
            if is_wanted(interest, Candidate(row.type, row.data)):
                found.append((row.id, row.type))
            await breather.breathe()
        if len(rows) < _EVENTS_AT_ONCE or len(found) > DELIVERIES_MAX:
            return found
        start = f"{rows[-1].id}0"


async def _enabled(
    session: AsyncSession, endpoint_id: str, *, organization_id: OrganizationId, is_read: bool = True
) -> WebhookEndpointRow:
    """Return an endpoint that is sent to. It is locked only to write: its worker writes to the row every second."""
    row = await locked_endpoint(session, endpoint_id, organization_id=organization_id, is_read=is_read)
    if row.disabled_at is not None:
        raise EndpointIsDisabled
    return row


async def _checked_reach(session: AsyncSession, since: datetime) -> datetime:
    now = await database_now(session)
    if since < now - REACH:
        raise Invalid(f"Invalid 'since': it is more than {REACH.days} days ago.", param="since")
    return now


def _require_not_too_many(count: int) -> None:
    if count > DELIVERIES_MAX:
        raise TooManyDeliveries(DELIVERIES_MAX)
