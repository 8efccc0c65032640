"""Mails for webhook endpoints that fail or were disabled: who has one endpoint alone hears of it in no other way."""

from __future__ import annotations

from datetime import timedelta
from typing import Final
from typing import cast as cast_to
from urllib.parse import urlsplit

from sqlalchemy import and_, cast, func, literal, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from core.ids import OrganizationId
from metering.billing import emails
from metering.billing.tables import EmailRow
from webhooks.events import EndpointDisabled, EndpointFailing
from webhooks.tables import WebhookEndpointRow, WebhookEventRow

_KIND: Final = "webhook_failing"
_FRESH: Final = timedelta(days=2)
"""Older news is none: nobody wants it from before mails were sent."""
_PAGE_EVENTS: Final = 500


async def note_webhooks(database: Database) -> int:
    """Write down a mail for each such event that has none yet; return how many. Errors: those of DOWN."""
    count = 0
    while True:
        async with database.transaction() as session:
            noted = await _note(session)
        count += noted
        if noted < _PAGE_EVENTS:
            return count


async def _note(session: AsyncSession) -> int:
    event, endpoint = WebhookEventRow, WebhookEndpointRow
    data, owner = cast(event.data, JSONB), event.organization_id
    rows = await session.execute(
        select(event.id, owner, event.type, data, endpoint.url)
        .join(endpoint, and_(endpoint.id == data["endpoint_id"].astext, endpoint.organization_id == owner))
        .outerjoin(EmailRow, and_(EmailRow.organization_id == owner, EmailRow.reason == event.id))
        .where(
            # As the index has it.
            event.type.like("webhook.endpoint.%"),
            event.type.in_((EndpointFailing.type, EndpointDisabled.type)),
            event.created_at > func.now() - literal(_FRESH),
            # What somebody did, somebody knows.
            func.coalesce(data["reason"].astext, "").notin_(("owner", "operator")),
            EmailRow.id.is_(None),
        )
        .limit(_PAGE_EVENTS)
    )
    count = 0
    for event_id, organization_id, kind, told, url in rows:
        # Of the address, the host: the rest may be a credential.
        facts: dict[str, object] = {**cast_to("dict[str, object]", told), "what": kind.rpartition(".")[2]}
        facts["host"] = urlsplit(url).netloc
        count += await emails.note(session, _KIND, event_id, facts, organization_id=OrganizationId(organization_id))
    return count
