"""`aap keys`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from gateway.cli.common import confirmed, fail, json_option, org_option, print_json, require_confirmed, show
from keys.scopes import ADMIN_SCOPES, ALL_SCOPES, INFERENCE_SCOPES

_COLUMNS = ("id", "name", "hint", "project_id", "scopes", "models", "expires_at", "disabled_at", "last_used_at")
_FOUND_COLUMNS = (
    *("id", "name", "hint", "matched", "organization_id", "project_id"),
    *("secret_ends_at", "expires_at", "disabled_at", "last_used_at"),
)


@click.group()
def keys_command() -> None:
    """Create, list, find, rotate and revoke API keys."""


@keys_command.command("create")
@click.argument("name")
@org_option
@click.option("--project", help="The project's id. Needed only when there are several.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(ALL_SCOPES),
    help="What it may do. Default: all of calling models, nothing of administration.",
)
@click.option(
    "--admin", is_flag=True, help="An admin key: it reads usage and the ledger, manages billing, and calls no model."
)
@click.option("--model", "models", multiple=True, help="A model it may use. Default: all.")
@click.option("--ip", "networks", multiple=True, help="A network it works from, such as 192.0.2.0/24. Default: all.")
@click.option("--expires-in-days", type=click.IntRange(1, 36_500), help="When it ends. Default: never.")
@json_option
def create_key(
    name: str,
    org: str | None,
    project: str | None,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
    networks: tuple[str, ...],
    expires_in_days: int | None,
    admin: bool,
    as_json: bool,
) -> None:
    """Create a key. Its secret is printed once and kept nowhere."""
    from core.errors import AppError
    from gateway.cli import key_acts
    from keys.lifecycle import NewKey

    if admin and scopes:
        raise click.UsageError("give --admin, or --scope")
    try:
        new = NewKey(
            name=name,
            scopes=ADMIN_SCOPES if admin else scopes or INFERENCE_SCOPES,
            models=models or None,
            ip_networks=networks or None,
            expires_at=datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None,
        )
    except (ValueError, AppError) as error:
        fail(str(error))
    _print_issued(key_acts.create(new, org=org, project=project), as_json=as_json)


@keys_command.command("list")
@org_option
@json_option
def list_keys(org: str | None, as_json: bool) -> None:
    """List the keys of an organization."""
    from gateway.cli import key_acts

    show(key_acts.list_all(org), _COLUMNS, as_json=as_json, empty="There is no key yet.")


@keys_command.command("find")
# Any number: click's own refusal of a second one would repeat it, and it may be a key.
@click.argument("text", nargs=-1, required=True, metavar="TEXT")
@click.option("--org", help="Look among this organization's keys only. Default: everybody's.")
@json_option
def find_key(text: tuple[str, ...], org: str | None, as_json: bool) -> None:
    """Say which key this is.

    TEXT is a whole key, how it begins (sk-aap-XXXX, or more of it), or how it is shown (sk-aap-XXXX...YYYY). With -
    it is read from standard input: a key on the command line stays in the shell's history. TEXT is never repeated.
    """
    from gateway.cli import key_acts
    from keys.lookup import shown_part

    if len(text) != 1:
        raise click.UsageError("give one TEXT")
    asked = sys.stdin.readline() if text[0] == "-" else text[0]
    if shown_part(asked) is None:
        raise click.UsageError("TEXT is no key, no beginning of one, and not how one is shown")
    show(key_acts.find(asked, org), _FOUND_COLUMNS, as_json=as_json, empty="")


@keys_command.command("rotate")
@click.argument("key_id")
@click.option(
    "--grace-hours",
    type=click.FloatRange(0, 24 * 90),
    default=24.0,
    show_default=True,
    help="How long the old secret goes on working. 0 ends it at once.",
)
@json_option
def rotate_key(key_id: str, grace_hours: float, as_json: bool) -> None:
    """Give a key a new secret. Its id, limits and history stay."""
    from gateway.cli import key_acts

    _print_issued(key_acts.rotate(key_id, timedelta(hours=grace_hours)), as_json=as_json)


@keys_command.command("revoke")
@click.argument("key_id")
@click.option("--leaked", "found_at", help="Where its secret was found: told to the organization's webhooks.")
@json_option
def revoke_key(key_id: str, found_at: str | None, as_json: bool) -> None:
    """End a key at once, everywhere. Exit code 1 when a gateway has not confirmed it in time."""
    from gateway.cli import key_acts

    propagation = key_acts.revoke(key_id, found_at)
    if as_json:
        print_json({"id": key_id, "revoked": True, "propagation": propagation})
    else:
        click.echo(f"Revoked {key_id}; {confirmed(propagation)}.")
    require_confirmed(propagation, "it ends")


def _print_issued(issued: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(issued)
        return
    click.echo(f"id      {issued.id}\nsecret  {issued.secret}   (shown this once)")
    if not issued.propagation.is_complete:
        missing = ", ".join(issued.propagation.missing)
        click.echo(f"Not confirmed by {missing}: there the change holds within 5 seconds.", err=True)
