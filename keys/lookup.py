"""For operators: which key is this, is this organization there, and may I change its limits now."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final, Literal, NamedTuple

import msgspec
from sqlalchemy import and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import KeyId, OrganizationId, ProjectId
from core.settings import Pepper
from keys import secrets
from keys.errors import TenantNotFound
from keys.tables import KeyRow, KeySecretRow, OrganizationRow

# What a hint shows: four characters of the public id and, after the dots, the last four of the checksum.
_SHOWN: Final = re.compile(r"([0-9A-Za-z]{4})[0-9A-Za-z]*(?:\.\.\.([0-9A-Za-z]{4}))?")


class ShownPart(NamedTuple):
    """How the hints begin and end that are meant. Any end will do when it is empty."""

    start: str
    end: str


class FoundKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key, and the one of its secrets that was looked for. *secret_ends_at* is set for one that was rotated out."""

    id: KeyId
    name: str
    hint: str
    matched: Literal["whole key", "shown part"]
    organization_id: OrganizationId
    project_id: ProjectId
    secret_ends_at: datetime | None
    expires_at: datetime | None
    disabled_at: datetime | None
    last_used_at: datetime | None


def shown_part(text: str) -> ShownPart | None:
    """Return what a hint would show of *text*: a key, how one begins, or a hint. None when it is none of these."""
    text = _prefixed(text)
    is_whole = len(text) == secrets.KEY_LENGTH and "." not in text
    found = _SHOWN.fullmatch((secrets.hint(text) if is_whole else text).removeprefix(secrets.PREFIX))
    return ShownPart(secrets.PREFIX + found[1], found[2] or "") if found else None


async def find_keys(
    session: AsyncSession, text: str, peppers: Sequence[Pepper], *, organization_id: OrganizationId
) -> list[FoundKey]:
    """Return the organization's keys that *text* is a secret of, or that are shown like it, oldest first.

    A whole key is looked up by its fingerprints. That alone is proof: eight shown characters may be another key's.
    """
    shown = shown_part(text)
    if shown is None:
        return []
    digests = [secrets.fingerprint(_prefixed(text), pepper).digest for pepper in peppers]
    looks_like_it = and_(
        KeySecretRow.hint.startswith(shown.start, autoescape=True),
        KeySecretRow.hint.endswith(shown.end, autoescape=True),
    )
    rows = await session.execute(
        select(KeyRow, KeySecretRow)
        .join(KeySecretRow, KeySecretRow.key_id == KeyRow.id)
        .where(
            KeyRow.organization_id == organization_id,
            KeySecretRow.organization_id == organization_id,
            or_(KeySecretRow.fingerprint.in_(digests), looks_like_it),
        )
        .order_by(KeySecretRow.id)
    )
    return [_found(key, secret, is_proven=secret.fingerprint in digests) for key, secret in rows]


async def require_organization(session: AsyncSession, *, organization_id: OrganizationId) -> OrganizationId:
    """Return the id if there is such an organization. Errors: TenantNotFound."""
    if await session.scalar(select(OrganizationRow.id).where(OrganizationRow.id == organization_id)) is None:
        raise TenantNotFound("organization")
    return organization_id


async def lock_organization(session: AsyncSession, *, organization_id: OrganizationId) -> None:
    """Return when no other transaction holds this lock; who changes a part of something would else undo another's.

    NO KEY UPDATE: rows that refer to the organization, such as new keys, need not wait.
    """
    await session.execute(
        select(OrganizationRow.id).where(OrganizationRow.id == organization_id).with_for_update(key_share=True)
    )


def _prefixed(text: str) -> str:
    # A double click does not select the prefix; some programs make one character of three dots.
    return secrets.PREFIX + text.strip().replace("…", "...").removeprefix(secrets.PREFIX)


def _found(key: KeyRow, secret: KeySecretRow, *, is_proven: bool) -> FoundKey:
    return FoundKey(
        id=KeyId(key.id),
        name=key.name,
        hint=secret.hint,
        matched="whole key" if is_proven else "shown part",
        organization_id=OrganizationId(key.organization_id),
        project_id=ProjectId(key.project_id),
        secret_ends_at=secret.not_after,
        expires_at=key.expires_at,
        disabled_at=key.disabled_at,
        last_used_at=key.last_used_at,
    )
