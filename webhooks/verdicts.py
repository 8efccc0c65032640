"""What follows from how an endpoint is doing: its organization is warned, and in the end it is disabled.

Each is written with the event that tells of it, once, whichever worker comes to it.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from core.plain_sql import fetch
from webhooks.events import DisabledReason, EndpointDisabled, EndpointFailing
from webhooks.health import DISABLED_AFTER, Health, Reason
from webhooks.lanes import Lane
from webhooks.publish import publish

# Nobody's lock is waited for: a worker has other endpoints to write of.
_HOLD: Final = "SELECT id FROM webhook_endpoints WHERE id = $1 FOR UPDATE SKIP LOCKED"
# An endpoint that was enabled since, or given another address, is judged anew.
_WARN: Final = """
UPDATE webhook_endpoints SET warned_percent = $2
WHERE id = $1 AND warned_percent < $2 AND enabled_at = $3 AND disabled_at IS NULL AND deleted_at IS NULL
RETURNING organization_id, description
"""
_DISABLE: Final = """
UPDATE webhook_endpoints SET
  disabled_at = now(), disabled_reason = $2, updated_at = now(), worker_id = NULL, last_problem = $4,
  failing_since = $5, consecutive_failures = $6, resting_until = NULL
WHERE id = $1 AND enabled_at = $3 AND disabled_at IS NULL AND deleted_at IS NULL
RETURNING organization_id, description
"""


async def warn(database: Database, lane: Lane) -> bool:
    """Tell the organization's other endpoints that this one will be disabled; False: somebody holds its row.

    Errors: those of DOWN.
    """
    target, health = lane.target, lane.health
    assert health.failing_since is not None
    async with database.transaction() as session:
        if not await fetch(session, _HOLD, target.endpoint_id):
            return False
        for row in await fetch(session, _WARN, target.endpoint_id, health.warned_percent, target.enabled_at):
            failing = EndpointFailing(
                endpoint_id=target.endpoint_id,
                description=row.description,
                failing_since=int(health.failing_since.timestamp()),
                disabled_after=int((health.failing_since + DISABLED_AFTER).timestamp()),
                problem=lane.last_problem or "",
            )
            await publish(session, failing, organization_id=row.organization_id)
    return True


async def disable(database: Database, lane: Lane, reason: Reason) -> bool:
    """Disable the lane's endpoint, and tell its organization's others; False: it is another by now, or is held.

    Errors: those of DOWN.
    """
    health: Health = lane.health
    arguments: tuple[Any, ...] = (
        lane.target.endpoint_id,
        reason,
        lane.target.enabled_at,
        lane.last_problem,
        health.failing_since,
        health.consecutive_failures,
    )
    async with database.transaction() as session:
        if not await fetch(session, _HOLD, lane.target.endpoint_id):
            return False
        rows = await fetch(session, _DISABLE, *arguments)
        for row in rows:
            await tell_disabled(session, row, lane.target.endpoint_id, reason)
    return bool(rows)


async def tell_disabled(session: AsyncSession, row: Any, endpoint_id: str, reason: DisabledReason) -> None:
    """Publish that an endpoint was disabled; *row* holds its `organization_id` and `description`."""
    disabled = EndpointDisabled(endpoint_id=endpoint_id, description=row.description, reason=reason)
    await publish(session, disabled, organization_id=row.organization_id)
