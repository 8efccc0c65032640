"""What `aap orgs` and `aap projects` do."""

from __future__ import annotations

from gateway.cli.stores import Stores, chosen_organization, on_stores
from keys import tenants
from keys.tenants import DisconnectPolicy, Organization, Project


def create_organization(name: str, disconnect_policy: DisconnectPolicy) -> Organization:
    """Add an organization."""

    async def act(stores: Stores) -> Organization:
        async with stores.database.transaction() as session:
            return await tenants.create_organization(session, name, disconnect_policy=disconnect_policy)

    return on_stores(act)


def list_organizations() -> list[Organization]:
    """Return every organization."""

    async def act(stores: Stores) -> list[Organization]:
        async with stores.database.transaction() as session:
            return await tenants.list_organizations(session)

    return on_stores(act)


def create_project(name: str, org: str | None) -> Project:
    """Add a project."""

    async def act(stores: Stores) -> Project:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            return await tenants.create_project(session, name, organization_id=organization_id)

    return on_stores(act)


def list_projects(org: str | None) -> list[Project]:
    """Return the projects of an organization."""

    async def act(stores: Stores) -> list[Project]:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            return await tenants.list_projects(session, organization_id=organization_id)

    return on_stores(act)
