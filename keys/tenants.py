"""Organizations and projects: who exists."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId, ProjectId, new_id
from keys.errors import TenantNotFound
from keys.lifecycle import record_change
from keys.tables import OrganizationRow, ProjectRow

DisconnectPolicy = Literal["drain", "abort"]
OrganizationStatus = Literal["active", "suspended"]


class Organization(msgspec.Struct, frozen=True, kw_only=True):
    """A customer of the operator."""

    id: OrganizationId
    name: str
    disconnect_policy: str
    plan: str | None
    status: str
    status_reason: str | None
    created_at: datetime


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an organization that keys belong to."""

    id: ProjectId
    organization_id: OrganizationId
    name: str
    created_at: datetime


async def create_organization(
    session: AsyncSession, name: str, *, disconnect_policy: DisconnectPolicy = "drain", plan: str | None = None
) -> Organization:
    """Add an organization. That there is such a plan is the caller's to know."""
    row = OrganizationRow(id=new_id("org"), name=name, disconnect_policy=disconnect_policy, plan=plan)
    session.add(row)
    await session.flush()
    await session.refresh(row)
    return _organization(row)


async def set_plan(session: AsyncSession, plan: str | None, *, organization_id: OrganizationId) -> int:
    """Give an organization another plan, or (None) none; return the change's sequence.

    What was used this month counts in the new plan too. That there is such a plan is the caller's to know.
    Errors: TenantNotFound.
    """
    row = await _organization_row(session, organization_id)
    row.plan = plan
    return await record_change(session, None, organization_id=organization_id)


async def set_status(
    session: AsyncSession, status: OrganizationStatus, reason: str | None = None, *, organization_id: OrganizationId
) -> int:
    """Suspend an organization, or let it go on; return the change's sequence. Running calls finish, and are metered.

    *reason* is a name of `keys.errors.SUSPENSION_REASONS`, or a note of the operator's. Errors: TenantNotFound.
    """
    row = await _organization_row(session, organization_id)
    row.status, row.status_reason = status, reason
    return await record_change(session, None, organization_id=organization_id)


async def get_organization(session: AsyncSession, *, organization_id: OrganizationId) -> Organization:
    """Return one organization. Errors: TenantNotFound."""
    row = await session.get(OrganizationRow, organization_id)
    if row is None:
        raise TenantNotFound("organization")
    return _organization(row)


async def lock_organization(session: AsyncSession, *, organization_id: OrganizationId) -> None:
    """Have plan and status left alone by others. This lock comes before the budgets' and that of key changes.

    Errors: TenantNotFound.
    """
    await _organization_row(session, organization_id)


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


async def _organization_row(session: AsyncSession, organization_id: OrganizationId) -> OrganizationRow:
    # NO KEY UPDATE: rows that refer to the organization, such as new keys, need not wait.
    row = await session.get(OrganizationRow, organization_id, with_for_update={"key_share": True})
    if row is None:
        raise TenantNotFound("organization")
    return row


def _organization(row: OrganizationRow) -> Organization:
    return Organization(
        id=OrganizationId(row.id),
        name=row.name,
        disconnect_policy=row.disconnect_policy,
        plan=row.plan,
        status=row.status,
        status_reason=row.status_reason,
        created_at=row.created_at,
    )


def _project(row: ProjectRow) -> Project:
    return Project(
        id=ProjectId(row.id),
        organization_id=OrganizationId(row.organization_id),
        name=row.name,
        created_at=row.created_at,
    )
