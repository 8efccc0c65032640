"""What is done to API keys (`keys/lifecycle.py`), and told to the organization's webhooks in the same transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from core.ids import KeyId, OrganizationId, ProjectId, id_range_start
from core.plain_sql import fetch
from core.settings import Pepper
from keys import lifecycle
from keys.lifecycle import IssuedKey, Key, NewKey
from keys.tables import KeyRow
from webhooks.events import KeyCreated, KeyExpiring, KeyLeaked, KeyRevoked, KeyRotated
from webhooks.publish import publish

EXPIRING_WITHIN: Final = timedelta(days=7)
_PAGE_KEYS: Final = 500
# Once for each key and end: the id is made of both.
_PUBLISH_ONCE: Final = """
INSERT INTO webhook_events (id, organization_id, type, data) VALUES ($1, $2, $3, $4::text::json)
ON CONFLICT (id) DO NOTHING RETURNING 1
"""


async def create_key(
    session: AsyncSession, new: NewKey, *, organization_id: OrganizationId, project_id: ProjectId, pepper: Pepper
) -> IssuedKey:
    """As `keys.lifecycle.create_key`."""
    issued = await lifecycle.create_key(
        session, new, organization_id=organization_id, project_id=project_id, pepper=pepper
    )
    key = await lifecycle.get_key(session, issued.id, organization_id=organization_id)
    await publish(session, KeyCreated(**_told(key)), organization_id=organization_id)
    return issued


async def rotate_key(
    session: AsyncSession,
    key_id: KeyId,
    *,
    organization_id: OrganizationId,
    grace: timedelta,
    pepper: Pepper,
    now: datetime,
) -> IssuedKey:
    """As `keys.lifecycle.rotate_key`."""
    issued = await lifecycle.rotate_key(
        session, key_id, organization_id=organization_id, grace=grace, pepper=pepper, now=now
    )
    key = await lifecycle.get_key(session, key_id, organization_id=organization_id)
    rotated = KeyRotated(**_told(key), old_secret_ends_at=int((now + grace).timestamp()))
    await publish(session, rotated, organization_id=organization_id)
    return issued


async def revoke_key(
    session: AsyncSession,
    key_id: KeyId,
    *,
    organization_id: OrganizationId,
    now: datetime,
    found_at: str | None = None,
) -> int:
    """As `keys.lifecycle.revoke_key`. *found_at* says where its secret was found, which is told, too."""
    before = await lifecycle.get_key(session, key_id, organization_id=organization_id)
    change = await lifecycle.revoke_key(session, key_id, organization_id=organization_id, now=now)
    if found_at is not None:
        leaked = KeyLeaked(**_told(before), found_at=found_at)
        await publish(session, leaked, organization_id=organization_id)
    if before.disabled_at is None:
        await publish(session, KeyRevoked(**_told(before)), organization_id=organization_id)
    return change


async def tell_expiring(database: Database, now: datetime) -> int:
    """Tell of keys that end within a week, each once; return of how many. Errors: those of DOWN."""
    count, last = 0, (now, "")
    while True:
        async with database.transaction() as session:
            page = await _ending_keys(session, last, now + EXPIRING_WITHIN)
            for row in page:
                count += await _tell_expiring(
                    session, KeyId(row.id), organization_id=OrganizationId(row.organization_id)
                )
        if len(page) < _PAGE_KEYS:
            return count
        last = (page[-1].expires_at or now, page[-1].id)


async def _ending_keys(session: AsyncSession, after: tuple[datetime, str], until: datetime) -> Sequence[KeyRow]:
    rows = await session.scalars(
        select(KeyRow)
        .where(
            KeyRow.disabled_at.is_(None),
            tuple_(KeyRow.expires_at, KeyRow.id) > after,
            KeyRow.expires_at <= until,
        )
        .order_by(KeyRow.expires_at, KeyRow.id)
        .limit(_PAGE_KEYS)
    )
    return rows.all()


async def _tell_expiring(session: AsyncSession, key_id: KeyId, *, organization_id: OrganizationId) -> int:
    key = await lifecycle.get_key(session, key_id, organization_id=organization_id)
    assert key.expires_at is not None
    data = msgspec.json.encode(KeyExpiring(**_told(key))).decode()
    event_id = _expiring_id(key)
    return len(await fetch(session, _PUBLISH_ONCE, event_id, organization_id, KeyExpiring.type, data))


def _expiring_id(key: Key) -> str:
    """Return the event's id: as old as the first moment at which there was something to tell."""
    assert key.expires_at is not None
    digest = hashlib.md5(f"{key.id}{key.expires_at.timestamp()}".encode(), usedforsecurity=False).hexdigest()
    return id_range_start("evt", max(key.expires_at - EXPIRING_WITHIN, key.created_at)) + digest[:16]


def _told(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "project_id": key.project_id,
        "name": key.name,
        "hint": key.hint,
        "expires_at": None if key.expires_at is None else int(key.expires_at.timestamp()),
    }
