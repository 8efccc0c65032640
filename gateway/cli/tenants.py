"""`aap orgs` and `aap projects`."""

from __future__ import annotations

from typing import Literal

import click

from gateway.cli.common import json_option, org_option, show

_ORGANIZATION_COLUMNS = ("id", "name", "disconnect_policy", "created_at")
_PROJECT_COLUMNS = ("id", "organization_id", "name", "created_at")


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
def create_org(name: str, disconnect_policy: Literal["drain", "abort"], as_json: bool) -> None:
    """Create an organization."""
    from gateway.cli import tenant_acts

    made = tenant_acts.create_organization(name, disconnect_policy)
    show([made], _ORGANIZATION_COLUMNS, as_json=as_json, empty="")


@orgs_command.command("list")
@json_option
def list_orgs(as_json: bool) -> None:
    """List every organization."""
    from gateway.cli import tenant_acts

    found = tenant_acts.list_organizations()
    show(found, _ORGANIZATION_COLUMNS, as_json=as_json, empty="There is no organization yet.")


@click.group()
def projects_command() -> None:
    """Create and list projects."""


@projects_command.command("create")
@click.argument("name")
@org_option
@json_option
def create_project(name: str, org: str | None, as_json: bool) -> None:
    """Create a project."""
    from gateway.cli import tenant_acts

    show([tenant_acts.create_project(name, org)], _PROJECT_COLUMNS, as_json=as_json, empty="")


@projects_command.command("list")
@org_option
@json_option
def list_projects(org: str | None, as_json: bool) -> None:
    """List the projects of an organization."""
    from gateway.cli import tenant_acts

    show(tenant_acts.list_projects(org), _PROJECT_COLUMNS, as_json=as_json, empty="There is no project yet.")
