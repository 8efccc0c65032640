"""Organizations and projects: who exists."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId, ProjectId, new_id
from keys.errors import TenantNotFound
from keys.tables import OrganizationRow, ProjectRow

DisconnectPolicy = Literal["drain", "abort"]


class Organization(msgspec.Struct, frozen=True, kw_only=True):
    """A customer of the operator."""

    id: OrganizationId
    name: str
    disconnect_policy: str
    created_at: datetime


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an organization that keys belong to."""

    id: ProjectId
    organization_id: OrganizationId
    name: str
    created_at: datetime


async def create_organization(
    session: AsyncSession, name: str, *, disconnect_policy: DisconnectPolicy = "drain"
) -> Organization:
    """Add an organization."""
    row = OrganizationRow(id=new_id("org"), name=name, disconnect_policy=disconnect_policy)
    session.add(row)
    await session.flush()
    await session.refresh(row)
    return _organization(row)


async def create_project(session: AsyncSession, name: str, *, organization_id: OrganizationId) -> Project:
    """Add a project to an organization. Errors: TenantNotFound."""
    if await session.get(OrganizationRow, organization_id) is None:
        raise TenantNotFound("organization")
    row = ProjectRow(id=new_id("proj"), organization_id=organization_id, name=name)
    session.add(row)
    await session.flush()
    await session.refresh(row)
    return _project(row)


async def list_organizations(session: AsyncSession) -> list[Organization]:
    """Return every organization, oldest first."""
    rows = await session.scalars(select(OrganizationRow).order_by(OrganizationRow.id))
    return [_organization(row) for row in rows]


async def list_projects(session: AsyncSession, *, organization_id: OrganizationId) -> list[Project]:
    """Return the organization's projects, oldest first."""
    rows = await session.scalars(
        select(ProjectRow).where(ProjectRow.organization_id == organization_id).order_by(ProjectRow.id)
    )
    return [_project(row) for row in rows]


async def only_organization(session: AsyncSession) -> Organization:
    """Return the one organization there is. Errors: TenantNotFound when there are none, or several to choose from."""
    found = await list_organizations(session)
    if len(found) != 1:
        raise TenantNotFound("organization (there are several: name one)" if found else "organization")
    return found[0]


def _organization(row: OrganizationRow) -> Organization:
    return Organization(
        id=OrganizationId(row.id),
        name=row.name,
        disconnect_policy=row.disconnect_policy,
        created_at=row.created_at,
    )


def _project(row: ProjectRow) -> Project:
    return Project(
        id=ProjectId(row.id),
        organization_id=OrganizationId(row.organization_id),
        name=row.name,
        created_at=row.created_at,
    )
