"""Writing down that something happened, in the transaction in which it does: it is told if, and only if, that commits.

PostgreSQL down: the transaction fails, and with it what would have been told.
"""

from __future__ import annotations

from typing import Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId, new_id
from core.plain_sql import fetch
from webhooks.events import EventData

CHANNEL: Final = "aap_webhooks"
"""What workers listen to: empty messages, that there is something to do; an endpoint's id, that it was changed."""
_PUBLISH: Final = """
WITH told AS (
  INSERT INTO webhook_events (id, organization_id, type, data, endpoint_id) VALUES ($1, $2, $3, $4::text::json, $5)
)
SELECT pg_notify('aap_webhooks', '')
"""
_WAKE: Final = "SELECT pg_notify('aap_webhooks', $1)"


async def publish(
    session: AsyncSession, data: EventData, *, organization_id: OrganizationId, endpoint_id: str | None = None
) -> str:
    """Write an event for the organization's endpoints, or for one of them; return its id."""
    event_id = new_id("evt")
    encoded = msgspec.json.encode(data).decode()
    await fetch(session, _PUBLISH, event_id, organization_id, data.type, encoded, endpoint_id)
    return event_id


async def wake(session: AsyncSession, endpoint_id: str) -> None:
    """Have workers look at an endpoint that was changed, once this transaction has ended."""
    await fetch(session, _WAKE, endpoint_id)
