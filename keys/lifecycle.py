"""Making, rotating, limiting and revoking API keys.

Every function that changes what a key may do also writes a `key_changes` row in the same transaction and returns its
sequence: `revocation.announce` then tells the gateways.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec
from sqlalchemy import select, text, update
from sqlalchemy.dialects.postgresql import distinct_on, insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.errors import Invalid
from core.ids import KeyId, OrganizationId, ProjectId, new_id
from core.settings import Pepper
from keys import secrets
from keys.dimensions import DIMENSIONS, LimitScope
from keys.errors import KeyRevoked, TenantNotFound
from keys.limits import RateLimits
from keys.scopes import ALL_SCOPES, INFERENCE_SCOPES
from keys.tables import KeyChangeRow, KeyRow, KeySecretRow, OrganizationRow, ProjectRow, RateLimitRow

# Serialises the writers of key_changes (they are rare), so that sequences become visible in order and none is skipped.
_CHANGES_LOCK = 0x6B657973


class NewKey(msgspec.Struct, frozen=True, kw_only=True):
    """What a key is asked to be. None allows every model, every address, for ever."""

    name: str
    scopes: Sequence[str] = INFERENCE_SCOPES
    models: Sequence[str] | None = None
    ip_networks: Sequence[str] | None = None
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        """Errors: ValueError for an unknown scope or a malformed network; Invalid for scopes of both kinds."""
        unknown = sorted(set(self.scopes) - set(ALL_SCOPES))
        if unknown:
            raise ValueError(f"unknown scopes: {', '.join(unknown)}; known are {', '.join(ALL_SCOPES)}")
        if set(self.scopes) & set(INFERENCE_SCOPES) and set(self.scopes) - set(INFERENCE_SCOPES):
            raise Invalid("A key is for calling models or for administration, not for both.", param="scopes")
        for network in self.ip_networks or ():
            ipaddress.ip_network(network, strict=False)


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """What may be told of a key."""

    id: KeyId
    organization_id: OrganizationId
    project_id: ProjectId
    name: str
    hint: str
    scopes: list[str]
    models: list[str] | None
    ip_networks: list[str] | None
    expires_at: datetime | None
    disabled_at: datetime | None
    last_used_at: datetime | None
    created_at: datetime


class IssuedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key with its secret, which is shown this once."""

    id: KeyId
    secret: str
    change: int

    def __repr__(self) -> str:
        """Keep the secret out of logs and tracebacks."""
        return f"IssuedKey(id={self.id!r})"


async def create_key(
    session: AsyncSession, new: NewKey, *, organization_id: OrganizationId, project_id: ProjectId, pepper: Pepper
) -> IssuedKey:
    """Make a key. Errors: TenantNotFound when the project is not the organization's."""
    project = await session.scalar(
        select(ProjectRow.id).where(ProjectRow.organization_id == organization_id, ProjectRow.id == project_id)
    )
    if project is None:
        raise TenantNotFound("project")
    key_id = KeyId(new_id("key"))
    session.add(
        KeyRow(
            id=key_id,
            organization_id=organization_id,
            project_id=project_id,
            name=new.name,
            scopes=list(new.scopes),
            models=None if new.models is None else list(new.models),
            ip_networks=None if new.ip_networks is None else list(new.ip_networks),
            expires_at=new.expires_at,
        )
    )
    await session.flush()
    secret = await _add_secret(session, key_id, organization_id=organization_id, pepper=pepper)
    change = await record_change(session, key_id, organization_id=organization_id)
    return IssuedKey(id=key_id, secret=secret, change=change)


async def rotate_key(
    session: AsyncSession,
    key_id: KeyId,
    *,
    organization_id: OrganizationId,
    grace: timedelta,
    pepper: Pepper,
    now: datetime,
) -> IssuedKey:
    """Give a key a new secret; older ones end after *grace*, never later than they would have. The id stays.

    Errors: TenantNotFound, KeyRevoked.
    """
    row = await _key_row(session, key_id, organization_id=organization_id)
    if row.disabled_at is not None:
        raise KeyRevoked
    ends_at = now + grace
    await session.execute(
        update(KeySecretRow)
        .where(
            KeySecretRow.organization_id == organization_id,
            KeySecretRow.key_id == key_id,
            (KeySecretRow.not_after.is_(None)) | (KeySecretRow.not_after > ends_at),
        )
        .values(not_after=ends_at)
    )
    secret = await _add_secret(session, key_id, organization_id=organization_id, pepper=pepper)
    change = await record_change(session, key_id, organization_id=organization_id)
    return IssuedKey(id=key_id, secret=secret, change=change)


async def revoke_key(session: AsyncSession, key_id: KeyId, *, organization_id: OrganizationId, now: datetime) -> int:
    """Disable a key for good; return the change's sequence. Idempotent. Errors: TenantNotFound."""
    row = await _key_row(session, key_id, organization_id=organization_id)
    row.disabled_at = row.disabled_at or now
    return await record_change(session, key_id, organization_id=organization_id)


async def list_keys(session: AsyncSession, *, organization_id: OrganizationId) -> list[Key]:
    """Return the organization's keys, oldest first, each with the hint of its newest secret."""
    rows = await session.execute(
        select(KeyRow, KeySecretRow.hint)
        .join(KeySecretRow, KeySecretRow.key_id == KeyRow.id)
        .where(KeyRow.organization_id == organization_id, KeySecretRow.organization_id == organization_id)
        .ext(distinct_on(KeyRow.id))
        .order_by(KeyRow.id, KeySecretRow.id.desc())
    )
    return [_key(row, hint) for row, hint in rows]


async def get_key(session: AsyncSession, key_id: KeyId, *, organization_id: OrganizationId) -> Key:
    """Return a key with the hint of its newest secret. Errors: TenantNotFound."""
    found = await session.execute(
        select(KeyRow, KeySecretRow.hint)
        .join(KeySecretRow, KeySecretRow.key_id == KeyRow.id)
        .where(
            KeyRow.organization_id == organization_id,
            KeySecretRow.organization_id == organization_id,
            KeyRow.id == key_id,
        )
        .order_by(KeySecretRow.id.desc())
        .limit(1)
    )
    for row, hint in found:
        return _key(row, hint)
    raise TenantNotFound("key")


async def find_key_owner(session: AsyncSession, key_id: KeyId) -> OrganizationId:
    """Return whose key this is, for an operator who names only the key. Errors: TenantNotFound."""
    owner = await session.scalar(select(KeyRow.organization_id).where(KeyRow.id == key_id))
    if owner is None:
        raise TenantNotFound("key")
    return OrganizationId(owner)


async def set_limits(
    session: AsyncSession, scope: LimitScope, scope_id: str, limits: RateLimits, *, organization_id: OrganizationId
) -> int:
    """Replace the limits of one scope; return the change's sequence. Errors: TenantNotFound."""
    await require_scope_target(session, scope, scope_id, organization_id=organization_id)
    values = {name: getattr(limits, name) for name in DIMENSIONS}
    row = {"organization_id": organization_id, "scope": scope, "scope_id": scope_id, **values}
    statement = insert(RateLimitRow).values(row)
    await session.execute(
        statement.on_conflict_do_update(index_elements=["organization_id", "scope", "scope_id"], set_=values)
    )
    return await record_change(session, None, organization_id=organization_id)


async def require_scope_target(
    session: AsyncSession, scope: LimitScope, scope_id: str, *, organization_id: OrganizationId
) -> None:
    """Return if there is something that the limit would hold for: one for nobody would be believed to hold."""
    if scope == "project":
        statement = select(ProjectRow.id).where(
            ProjectRow.organization_id == organization_id, ProjectRow.id == scope_id
        )
    elif scope == "key":
        statement = select(KeyRow.id).where(KeyRow.organization_id == organization_id, KeyRow.id == scope_id)
    else:
        # A model may be limited before it is in the catalog.
        target = scope_id if scope == "organization" else organization_id
        statement = select(OrganizationRow.id).where(
            OrganizationRow.id == organization_id, OrganizationRow.id == target
        )
    if await session.scalar(statement) is None:
        raise TenantNotFound(scope)


async def get_limits(session: AsyncSession, *, organization_id: OrganizationId) -> dict[tuple[str, str], RateLimits]:
    """Return every limit that was set for the organization, by scope and id."""
    rows = await session.scalars(select(RateLimitRow).where(RateLimitRow.organization_id == organization_id))
    return {(row.scope, row.scope_id): RateLimits(**{name: getattr(row, name) for name in DIMENSIONS}) for row in rows}


async def _add_secret(session: AsyncSession, key_id: KeyId, *, organization_id: OrganizationId, pepper: Pepper) -> str:
    minted = secrets.mint()
    pepper_id, digest = secrets.fingerprint(minted.text, pepper)
    session.add(
        KeySecretRow(
            id=new_id("ksec"),
            organization_id=organization_id,
            key_id=key_id,
            fingerprint=digest,
            pepper_id=pepper_id,
            hint=minted.hint,
        )
    )
    await session.flush()
    return minted.text


async def record_change(session: AsyncSession, key_id: KeyId | None, *, organization_id: OrganizationId) -> int:
    """Write down that a key, or (None) all of an organization's keys, must be read again; return the sequence."""
    await session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _CHANGES_LOCK})
    row = KeyChangeRow(organization_id=organization_id, key_id=key_id)
    session.add(row)
    await session.flush()
    return row.sequence


async def _key_row(session: AsyncSession, key_id: KeyId, *, organization_id: OrganizationId) -> KeyRow:
    row = await session.scalar(
        select(KeyRow).where(KeyRow.organization_id == organization_id, KeyRow.id == key_id).with_for_update()
    )
    if row is None:
        raise TenantNotFound("key")
    return row


def _key(row: KeyRow, hint: str) -> Key:
    return Key(
        id=KeyId(row.id),
        organization_id=OrganizationId(row.organization_id),
        project_id=ProjectId(row.project_id),
        name=row.name,
        hint=hint,
        scopes=row.scopes,
        models=row.models,
        ip_networks=row.ip_networks,
        expires_at=row.expires_at,
        disabled_at=row.disabled_at,
        last_used_at=row.last_used_at,
        created_at=row.created_at,
    )
