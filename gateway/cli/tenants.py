"""`aap orgs` and `aap projects`."""

from __future__ import annotations

import click

from core.ids import OrganizationId
from gateway.cli.common import Stores, json_option, on_stores, show
from keys import tenants

_ORGANIZATION_COLUMNS = ("id", "name", "disconnect_policy", "created_at")
_PROJECT_COLUMNS = ("id", "organization_id", "name", "created_at")
org_option = click.option("--org", help="The organization's id. Needed only when there are several.")


async def chosen_organization(stores: Stores, org: str | None) -> OrganizationId:
    """Return the named organization, or the only one there is. Errors: TenantNotFound."""
    if org is not None:
        return OrganizationId(org)
    async with stores.database.transaction() as session:
        return (await tenants.only_organization(session)).id


@click.group()
def orgs_command() -> None:
    """Create and list organizations."""


@orgs_command.command("create")
@click.argument("name")
@click.option(
    "--disconnect-policy",
    type=click.Choice(["drain", "abort"]),
    default="drain",
    show_default=True,
    help="When a caller hangs up: read the provider's answer to its end, or stop it.",
)
@json_option
def create_org(name: str, disconnect_policy: tenants.DisconnectPolicy, as_json: bool) -> None:
    """Create an organization."""

    async def act(stores: Stores) -> tenants.Organization:
        async with stores.database.transaction() as session:
            return await tenants.create_organization(session, name, disconnect_policy=disconnect_policy)

    show([on_stores(act)], _ORGANIZATION_COLUMNS, as_json=as_json, empty="")


@orgs_command.command("list")
@json_option
def list_orgs(as_json: bool) -> None:
    """List every organization."""

    async def act(stores: Stores) -> list[tenants.Organization]:
        async with stores.database.transaction() as session:
            return await tenants.list_organizations(session)

    show(on_stores(act), _ORGANIZATION_COLUMNS, as_json=as_json, empty="There is no organization yet.")


@click.group()
def projects_command() -> None:
    """Create and list projects."""


@projects_command.command("create")
@click.argument("name")
@org_option
@json_option
def create_project(name: str, org: str | None, as_json: bool) -> None:
    """Create a project."""

    async def act(stores: Stores) -> tenants.Project:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            return await tenants.create_project(session, name, organization_id=organization_id)

    show([on_stores(act)], _PROJECT_COLUMNS, as_json=as_json, empty="")


@projects_command.command("list")
@org_option
@json_option
def list_projects(org: str | None, as_json: bool) -> None:
    """List the projects of an organization."""

    async def act(stores: Stores) -> list[tenants.Project]:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            return await tenants.list_projects(session, organization_id=organization_id)

    show(on_stores(act), _PROJECT_COLUMNS, as_json=as_json, empty="There is no project yet.")
