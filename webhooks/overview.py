"""What the operator sees of everybody's webhooks, and does for everybody."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from core.plain_sql import fetch
from core.sealing import Sealer
from webhooks.errors import WebhookNotFound
from webhooks.vault import headers_place, secret_place

_COUNTED_MAX: Final = 1_000_000
_BACKLOG: Final = """
WITH awake AS (
  SELECT id FROM webhook_endpoints
  WHERE disabled_at IS NULL AND deleted_at IS NULL AND coalesce(resting_until <= now(), true)
), oldest AS (
  SELECT min(d.due_at) AS due_at FROM awake e CROSS JOIN LATERAL (
    SELECT due_at FROM webhook_deliveries p
    WHERE p.endpoint_id = e.id AND p.state = 'pending' AND p.due_at <= now() ORDER BY due_at LIMIT 1
  ) d
)
SELECT
  (SELECT count(*) FROM (
     SELECT FROM awake e JOIN webhook_deliveries d ON d.endpoint_id = e.id
     WHERE d.state = 'pending' AND d.due_at <= now() LIMIT $1
   ) AS d) AS due,
  due_at AS oldest_due_at, extract(epoch FROM now() - due_at)::float8 AS oldest_seconds
FROM oldest
"""
_STATUS: Final = """
SELECT
  (SELECT count(*) FROM webhook_workers WHERE seen_at > now() - interval '10 seconds') AS workers,
  (SELECT count(*) FROM (SELECT FROM webhook_events WHERE NOT is_fanned_out LIMIT $1) AS w) AS events_waiting,
  (SELECT count(*) FROM (SELECT FROM webhook_deliveries WHERE state = 'pending' LIMIT $1) AS p) AS pending,
  (SELECT count(*) FROM webhook_endpoints WHERE deleted_at IS NULL AND disabled_at IS NULL) AS enabled,
  (SELECT count(*) FROM webhook_endpoints
   WHERE deleted_at IS NULL AND disabled_at IS NULL AND failing_since IS NOT NULL) AS failing,
  (SELECT count(*) FROM webhook_endpoints WHERE deleted_at IS NULL AND disabled_at IS NOT NULL) AS disabled
"""
_WORST: Final = """
SELECT id, organization_id, url, failing_since, disabled_at, disabled_reason, last_problem FROM webhook_endpoints
WHERE deleted_at IS NULL AND (failing_since IS NOT NULL OR disabled_reason IN ('failing', 'gone'))
ORDER BY coalesce(disabled_at, failing_since) DESC LIMIT $1
"""
_OWNER: Final = """
SELECT organization_id FROM webhook_endpoints WHERE id = $1 AND deleted_at IS NULL
UNION ALL SELECT organization_id FROM webhook_deliveries WHERE id = $1
"""
_SECRETS: Final = (
    "SELECT id, organization_id, sealed FROM webhook_secrets WHERE id > $1 ORDER BY id LIMIT $2 FOR UPDATE"
)
_HEADERS: Final = """
SELECT id, organization_id, sealed_headers AS sealed FROM webhook_endpoints
WHERE id > $1 AND sealed_headers IS NOT NULL ORDER BY id LIMIT $2 FOR UPDATE
"""
_KEEP_SECRETS: Final = """
UPDATE webhook_secrets s SET sealed = n.sealed FROM unnest($1::text[], $2::bytea[]) AS n (id, sealed) WHERE s.id = n.id
"""
_KEEP_HEADERS: Final = """
UPDATE webhook_endpoints e SET sealed_headers = n.sealed
FROM unnest($1::text[], $2::bytea[]) AS n (id, sealed) WHERE e.id = n.id
"""


class Backlog(NamedTuple):
    """What is due now at endpoints that are sent to."""

    due: int
    oldest_due_at: datetime | None
    oldest_seconds: float | None


class WebhookStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How delivering goes, over all organizations."""

    workers: int
    events_waiting: int
    """Events whose deliveries are not made yet."""
    pending: int
    due: int
    oldest_due_at: datetime | None
    enabled: int
    failing: int
    disabled: int


class TroubledEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that fails, or that was disabled because it did."""

    id: str
    organization_id: str
    url: str
    failing_since: datetime | None
    disabled_at: datetime | None
    disabled_reason: str | None
    last_problem: str | None


async def status(session: AsyncSession) -> WebhookStatus:
    """Return how delivering goes. Counts end at a million."""
    counted = (await fetch(session, _STATUS, _COUNTED_MAX))[0]._asdict()
    now = await backlog(session, _COUNTED_MAX)
    return WebhookStatus(**counted, due=now.due, oldest_due_at=now.oldest_due_at)


async def backlog(session: AsyncSession, counted_max: int) -> Backlog:
    """Return how much is due, counted up to *counted_max*, and since when."""
    return Backlog(*(await fetch(session, _BACKLOG, counted_max))[0])


async def troubled(session: AsyncSession, limit: int) -> list[TroubledEndpoint]:
    """Return endpoints that fail, the latest first."""
    return [msgspec.convert(row._asdict(), TroubledEndpoint) for row in await fetch(session, _WORST, limit)]


async def owner_of(session: AsyncSession, one_id: str) -> OrganizationId:
    """Return whose endpoint or delivery that is. Errors: WebhookNotFound."""
    rows = await fetch(session, _OWNER, one_id)
    if not rows:
        raise WebhookNotFound("endpoint or delivery")
    return rows[0].organization_id


async def reseal(session: AsyncSession, sealer: Sealer, after: str, limit: int) -> tuple[int, str | None]:
    """Seal signing secrets under the newest key, from the one after *after* on.

    Returns how many were sealed anew, and where to go on (None: that was all). Errors: SealBroken.
    """
    rows = await fetch(session, _SECRETS, after, limit)
    count = await _reseal(session, sealer, rows, _KEEP_SECRETS, is_secret=True)
    return count, rows[-1].id if len(rows) == limit else None


async def reseal_headers(session: AsyncSession, sealer: Sealer, after: str, limit: int) -> tuple[int, str | None]:
    """As `reseal`, for endpoints' headers."""
    rows = await fetch(session, _HEADERS, after, limit)
    count = await _reseal(session, sealer, rows, _KEEP_HEADERS, is_secret=False)
    return count, rows[-1].id if len(rows) == limit else None


async def _reseal(session: AsyncSession, sealer: Sealer, rows: list[Any], keep: str, *, is_secret: bool) -> int:
    place = secret_place if is_secret else headers_place
    old = [row for row in rows if not sealer.is_newest(row.sealed)]
    places = [place(row.organization_id, row.id) for row in old]
    fresh = [sealer.seal(sealer.open(row.sealed, where), where) for row, where in zip(old, places, strict=True)]
    if old:
        await fetch(session, keep, [row.id for row in old], fresh)
    return len(old)
