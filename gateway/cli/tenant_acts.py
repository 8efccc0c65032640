"""What `aap orgs` and `aap projects` do."""

from __future__ import annotations

import os
import re

import msgspec

from core.configuration import unknown_names
from core.ids import OrganizationId
from gateway.catalog_file import CatalogFile
from gateway.cli.common import fail
from gateway.cli.stores import Stores, chosen_organization, on_stores
from keys import tenants
from keys.revocation import KeyChange, Propagation, announce
from keys.tenants import DisconnectPolicy, Organization, OrganizationStatus, Project
from metering.billing.ownership import set_address

# How a command line says that an organization has no plan.
NO_PLAN = "none"


class Changed(Organization, frozen=True, kw_only=True):
    """An organization as it is after a change, and which gateways know of that."""

    propagation: Propagation


def create_organization(name: str, disconnect_policy: DisconnectPolicy, plan: str | None) -> Organization:
    """Add an organization on that plan, or else on the default one."""

    async def act(stores: Stores) -> Organization:
        chosen = _plan_named(stores, plan)
        async with stores.database.transaction() as session:
            return await tenants.create_organization(session, name, disconnect_policy=disconnect_policy, plan=chosen)

    return on_stores(act)


def list_organizations() -> list[Organization]:
    """Return every organization."""

    async def act(stores: Stores) -> list[Organization]:
        async with stores.database.transaction() as session:
            return await tenants.list_organizations(session)

    return on_stores(act)


class Addressed(msgspec.Struct, frozen=True):
    """Where an organization's mails go."""

    organization_id: OrganizationId
    email: str


def set_email(org: str, email: str) -> Addressed:
    """Note where an organization's mails go."""
    if not re.fullmatch(r"[^@\s]{1,64}@[^@\s]{1,190}", email):
        fail(f"not an address for mail: {email}")

    async def act(stores: Stores) -> Addressed:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            await set_address(session, email, organization_id=organization_id)
        return Addressed(organization_id, email)

    return on_stores(act)


def set_plan(org: str, plan: str) -> Changed:
    """Give an organization another plan, or none, and tell the gateways."""

    async def act(stores: Stores) -> Changed:
        organization_id, chosen = OrganizationId(org), _plan_named(stores, plan)
        async with stores.database.transaction() as session:
            sequence = await tenants.set_plan(session, chosen, organization_id=organization_id)
        return await _announced(stores, sequence, organization_id=organization_id)

    return on_stores(act)


def set_status(org: str, status: OrganizationStatus, reason: str | None) -> Changed:
    """Suspend an organization, or let it go on, and tell the gateways."""

    async def act(stores: Stores) -> Changed:
        organization_id = OrganizationId(org)
        async with stores.database.transaction() as session:
            sequence = await tenants.set_status(session, status, reason, organization_id=organization_id)
        return await _announced(stores, sequence, organization_id=organization_id)

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


async def _announced(stores: Stores, sequence: int, *, organization_id: OrganizationId) -> Changed:
    change = KeyChange(sequence=sequence, organization_id=organization_id, key_id=None)
    propagation = await announce(stores.redis, change)
    async with stores.database.transaction() as session:
        organization = await tenants.get_organization(session, organization_id=organization_id)
    return Changed(**msgspec.structs.asdict(organization), propagation=propagation)


def _plan_named(stores: Stores, name: str | None) -> str | None:
    """Return the plan that is meant: None where it is none. Ends the command if there is no such plan."""
    plans = CatalogFile(stores.settings.config_path, os.environ).plans
    if name is None:
        return plans.billing.default_plan
    if name == NO_PLAN:
        return None
    if problems := unknown_names([name], plans.by_name, "plan "):
        fail(f"{problems[0]} (`aap plans` lists them)")
    return name
