"""What was sent, as an endpoint's owner looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import Text, cast, select
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from core.plain_sql import fetch
from webhooks.errors import WebhookNotFound
from webhooks.events import body_of
from webhooks.tables import WebhookAttemptRow, WebhookDeliveryRow, WebhookEndpointRow, WebhookEventRow

State = Literal["pending", "succeeded", "failed"]
# Endpoint by endpoint along its index: an organization's page costs as many short scans as it has endpoints, and not a
# walk over whatever everybody else was sent.
_LIST: Final = """
SELECT d.* FROM webhook_endpoints e
CROSS JOIN LATERAL (
  SELECT * FROM webhook_deliveries p
  WHERE p.endpoint_id = e.id AND p.organization_id = $1
    AND ($3::text IS NULL OR p.id < $3::text)
    AND ($4::text IS NULL OR p.state = $4::text)
    AND ($5::text IS NULL OR p.event_type = $5::text)
  ORDER BY p.id DESC LIMIT $2
) d
WHERE e.organization_id = $1 AND e.deleted_at IS NULL AND ($6::text IS NULL OR e.id = $6::text)
ORDER BY d.id DESC LIMIT $2
"""


class DeliveryFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which deliveries are meant; None means any."""

    endpoint_id: str | None = None
    event_type: str | None = None
    state: State | None = None


class DeliveryView(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery as it is shown."""

    id: str
    endpoint_id: str
    event_id: str
    event_type: str
    state: str
    attempts: int
    due_at: datetime
    last_status: int | None
    last_problem: str | None
    finished_at: datetime | None
    created_at: datetime


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """One try, and the beginning of what was answered."""

    id: str
    status: int | None
    problem: str | None
    duration_ms: int
    response_body: str | None
    started_at: datetime


class DeliveryDetails(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery with its event as it is sent, and every try."""

    delivery: DeliveryView
    body: bytes | None
    """None: the event is kept no longer."""
    attempts: list[AttemptView]

    @property
    def event(self) -> dict[str, Any] | None:
        """The event as it is sent."""
        return None if self.body is None else msgspec.json.decode(self.body)


async def list_deliveries(
    session: AsyncSession,
    chosen: DeliveryFilter,
    limit: int,
    *,
    organization_id: OrganizationId,
    after: str | None = None,
) -> list[DeliveryView]:
    """Return deliveries, newest event first, from the one after *after* on."""
    rows = await fetch(
        session, _LIST, organization_id, limit, after, chosen.state, chosen.event_type, chosen.endpoint_id
    )
    return [_view(row) for row in rows]


async def get_delivery(session: AsyncSession, delivery_id: str, *, organization_id: OrganizationId) -> DeliveryDetails:
    """Return a delivery with its attempts, oldest first. Errors: WebhookNotFound."""
    row = await session.scalar(
        select(WebhookDeliveryRow).where(
            WebhookDeliveryRow.organization_id == organization_id, WebhookDeliveryRow.id == delivery_id
        )
    )
    if row is None or await _is_deleted(session, row.endpoint_id, organization_id=organization_id):
        raise WebhookNotFound("delivery")
    # As text: the very bytes that are signed.
    events = await session.execute(
        select(WebhookEventRow.created_at, cast(WebhookEventRow.data, Text).label("data")).where(
            WebhookEventRow.organization_id == organization_id, WebhookEventRow.id == row.event_id
        )
    )
    event = events.one_or_none()
    attempts: Sequence[WebhookAttemptRow] = (
        await session.scalars(
            select(WebhookAttemptRow)
            .where(WebhookAttemptRow.organization_id == organization_id, WebhookAttemptRow.delivery_id == delivery_id)
            .order_by(WebhookAttemptRow.id)
        )
    ).all()
    body = None
    if event is not None:
        body = body_of(row.event_id, row.event_type, event.created_at, event.data.encode())
    return DeliveryDetails(delivery=_view(row), body=body, attempts=[_attempt(one) for one in attempts])


async def _is_deleted(session: AsyncSession, endpoint_id: str, *, organization_id: OrganizationId) -> bool:
    """Tell whether nothing of an endpoint is shown any more, though a worker has not deleted all of it yet."""
    found = await session.scalar(
        select(WebhookEndpointRow.id).where(
            WebhookEndpointRow.organization_id == organization_id,
            WebhookEndpointRow.id == endpoint_id,
            WebhookEndpointRow.deleted_at.is_(None),
        )
    )
    return found is None


def _view(row: Any) -> DeliveryView:
    return DeliveryView(
        id=row.id,
        endpoint_id=row.endpoint_id,
        event_id=row.event_id,
        event_type=row.event_type,
        state=row.state,
        attempts=row.attempts,
        due_at=row.due_at,
        last_status=row.last_status,
        last_problem=row.last_problem,
        finished_at=row.finished_at,
        created_at=row.created_at,
    )


def _attempt(row: WebhookAttemptRow) -> AttemptView:
    body = row.response_body
    return AttemptView(
        id=row.id,
        status=row.status,
        problem=row.problem,
        duration_ms=row.duration_ms,
        response_body=None if body is None else body.decode(errors="replace"),
        started_at=row.started_at,
    )
