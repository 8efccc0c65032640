"""`aap orgs` and `aap projects`."""

from __future__ import annotations

from typing import Any, Literal

import click

from gateway.cli.common import confirmed, json_option, org_option, print_json, require_confirmed, show

_ORGANIZATION_COLUMNS = ("id", "name", "plan", "status", "status_reason", "disconnect_policy", "created_at")
_PROJECT_COLUMNS = ("id", "organization_id", "name", "created_at")


@click.group()
def orgs_command() -> None:
    """Create and list organizations, give them plans, suspend and resume them."""


@orgs_command.command("create")
@click.argument("name")
@click.option(
    "--disconnect-policy",
    type=click.Choice(["drain", "abort"]),
    default="drain",
    show_default=True,
    help="When a caller hangs up: read the provider's answer to its end, or stop it.",
)
@click.option("--plan", help="A plan of aap.toml, or none. Default: default_plan of [billing], if there is one.")
@json_option
def create_org(name: str, disconnect_policy: Literal["drain", "abort"], plan: str | None, as_json: bool) -> None:
    """Create an organization."""
    from gateway.cli import tenant_acts

    made = tenant_acts.create_organization(name, disconnect_policy, plan)
    show([made], _ORGANIZATION_COLUMNS, as_json=as_json, empty="")


@orgs_command.command("list")
@json_option
def list_orgs(as_json: bool) -> None:
    """List every organization."""
    from gateway.cli import tenant_acts

    found = tenant_acts.list_organizations()
    show(found, _ORGANIZATION_COLUMNS, as_json=as_json, empty="There is no organization yet.")


@orgs_command.command("set-plan")
@click.argument("org")
@click.argument("plan")
@json_option
def set_plan(org: str, plan: str, as_json: bool) -> None:
    """Give an organization another plan of aap.toml, or none.

    What it has used this month counts in the new plan. Every gateway knows within a second; exit code 1 when one has
    not confirmed it in time.
    """
    from gateway.cli import tenant_acts

    _print_changed(tenant_acts.set_plan(org, plan), as_json=as_json)


@orgs_command.command("suspend")
@click.argument("org")
@click.option(
    "--reason",
    help="payment_failed, subscription_ended or subscription_paused, which callers are told in words; or a note of "
    "yours, which they are not.",
)
@json_option
def suspend_org(org: str, reason: str | None, as_json: bool) -> None:
    """Refuse an organization's new calls. Running ones finish and are metered; what it used can still be read.

    Every gateway knows within a second; exit code 1 when one has not confirmed it in time.
    """
    from gateway.cli import tenant_acts

    _print_changed(tenant_acts.set_status(org, "suspended", reason), as_json=as_json)


@orgs_command.command("resume")
@click.argument("org")
@json_option
def resume_org(org: str, as_json: bool) -> None:
    """Admit a suspended organization's calls again."""
    from gateway.cli import tenant_acts

    _print_changed(tenant_acts.set_status(org, "active", None), as_json=as_json)


@orgs_command.command("set-email")
@click.argument("org")
@click.argument("email")
@json_option
def set_email(org: str, email: str, as_json: bool) -> None:
    """Say where an organization's mails about payments and limits go. A checkout says so too, if nobody has."""
    from gateway.cli import tenant_acts

    done = tenant_acts.set_email(org, email)
    if as_json:
        print_json(done)
    else:
        click.echo(f"Mails of {done.organization_id} go to {done.email}.")


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


def _print_changed(changed: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(changed)
    else:
        show([changed], _ORGANIZATION_COLUMNS, as_json=False, empty="")
        click.echo(f"{confirmed(changed.propagation)}.")
    require_confirmed(changed.propagation)
