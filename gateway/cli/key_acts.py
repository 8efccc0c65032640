"""What `aap keys` does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import KeyId, OrganizationId, ProjectId
from gateway.cli.stores import Stores, chosen_organization, on_stores
from keys import lifecycle, lookup, tenants
from keys.errors import TenantNotFound
from keys.lifecycle import IssuedKey, Key, NewKey
from keys.lookup import FoundKey
from keys.revocation import KeyChange, Propagation, announce
from webhooks import key_acts as webhook_keys


class Issued(msgspec.Struct, frozen=True):
    """A key's new secret, to be shown this once, and which gateways know of it."""

    id: str
    secret: str
    propagation: Propagation


def create(new: NewKey, *, org: str | None, project: str | None) -> Issued:
    """Make a key."""

    async def act(stores: Stores) -> Issued:
        organization_id = await chosen_organization(stores, org)
        project_id = await _chosen_project(stores, project, organization_id)

        async def make(session: AsyncSession) -> IssuedKey:
            return await webhook_keys.create_key(
                session, new, organization_id=organization_id, project_id=project_id, pepper=stores.peppers[0]
            )

        return await _issue(stores, organization_id, make)

    return on_stores(act)


def list_all(org: str | None) -> list[Key]:
    """Return the keys of an organization."""

    async def act(stores: Stores) -> list[Key]:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            return await lifecycle.list_keys(session, organization_id=organization_id)

    return on_stores(act)


def find(text: str, org: str | None) -> list[FoundKey]:
    """Return the key that *text* is, else those that are shown like it."""

    async def act(stores: Stores) -> list[FoundKey]:
        async with stores.database.transaction() as session:
            if org is None:
                owners = [organization.id for organization in await tenants.list_organizations(session)]
            else:
                owners = [await lookup.require_organization(session, organization_id=OrganizationId(org))]
            found = [
                key
                for owner in owners
                for key in await lookup.find_keys(session, text, stores.peppers, organization_id=owner)
            ]
        if not found:
            raise TenantNotFound("key")
        return [key for key in found if key.matched == "whole key"] or found

    return on_stores(act)


def rotate(key_id: str, grace: timedelta) -> Issued:
    """Give a key a new secret."""

    async def act(stores: Stores) -> Issued:
        organization_id = await _owner(stores, key_id)

        async def make(session: AsyncSession) -> IssuedKey:
            return await webhook_keys.rotate_key(
                session,
                KeyId(key_id),
                organization_id=organization_id,
                grace=grace,
                pepper=stores.peppers[0],
                now=datetime.now(UTC),
            )

        return await _issue(stores, organization_id, make)

    return on_stores(act)


def revoke(key_id: str, found_at: str | None = None) -> Propagation:
    """End a key; return which gateways know of it. *found_at* is where its secret was found, if it was."""

    async def act(stores: Stores) -> Propagation:
        organization_id = await _owner(stores, key_id)
        async with stores.database.transaction() as session:
            change = await webhook_keys.revoke_key(
                session, KeyId(key_id), organization_id=organization_id, now=datetime.now(UTC), found_at=found_at
            )
        return await announce(
            stores.redis, KeyChange(sequence=change, organization_id=organization_id, key_id=KeyId(key_id))
        )

    return on_stores(act)


async def _owner(stores: Stores, key_id: str) -> OrganizationId:
    async with stores.database.transaction() as session:
        return await lifecycle.find_key_owner(session, KeyId(key_id))


async def _chosen_project(stores: Stores, project: str | None, organization_id: OrganizationId) -> ProjectId:
    if project is not None:
        return ProjectId(project)
    async with stores.database.transaction() as session:
        found = await tenants.list_projects(session, organization_id=organization_id)
    if len(found) != 1:
        raise TenantNotFound("project (there are several: name one)" if found else "project")
    return found[0].id


async def _issue(
    stores: Stores, organization_id: OrganizationId, make: Callable[[AsyncSession], Awaitable[IssuedKey]]
) -> Issued:
    async with stores.database.transaction() as session:
        issued = await make(session)
    change = KeyChange(sequence=issued.change, organization_id=organization_id, key_id=issued.id)
    return Issued(issued.id, issued.secret, await announce(stores.redis, change))
