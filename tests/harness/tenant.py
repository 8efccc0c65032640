"""A tenant for a test, made as the command line makes one."""

from __future__ import annotations

from typing import NamedTuple

from core.database import Database
from core.ids import KeyId, OrganizationId, ProjectId
from core.settings import Pepper
from keys.dimensions import LimitScope
from keys.lifecycle import NewKey, create_key, set_limits
from keys.limits import RateLimits
from keys.tenants import DisconnectPolicy, create_organization, create_project


class Tenant(NamedTuple):
    organization_id: OrganizationId
    project_id: ProjectId
    key_id: KeyId
    key: str


async def new_tenant(
    database: Database,
    pepper: Pepper,
    new_key: NewKey | None = None,
    *,
    policy: DisconnectPolicy = "drain",
    limits: dict[LimitScope, RateLimits] | None = None,
) -> Tenant:
    async with database.transaction() as session:
        organization = await create_organization(session, "Test", disconnect_policy=policy)
        project = await create_project(session, "Test", organization_id=organization.id)
        issued = await create_key(
            session,
            new_key or NewKey(name="test"),
            organization_id=organization.id,
            project_id=project.id,
            pepper=pepper,
        )
        ids = {"organization": organization.id, "project": project.id, "key": issued.id, "model": "fake"}
        for scope, values in (limits or {}).items():
            await set_limits(session, scope, ids[scope], values, organization_id=organization.id)
    return Tenant(organization.id, project.id, issued.id, issued.secret)
