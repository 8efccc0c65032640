"""`aap limits`."""

from __future__ import annotations

from typing import Any, Literal

import click

from gateway.cli.common import confirmed, json_option, org_option, print_json, require_confirmed, show
from keys.dimensions import DIMENSIONS, LIMIT_MAX

_COLUMNS = ("scope", "id", *DIMENSIONS)


@click.group()
def limits_command() -> None:
    """Show and set rate limits."""


@limits_command.command("show")
@org_option
@json_option
def show_limits(org: str | None, as_json: bool) -> None:
    """Show the limits that were set, and the defaults that hold elsewhere."""
    from gateway.cli import limit_acts

    show(limit_acts.list_all(org), _COLUMNS, as_json=as_json, empty="")


def _limit_options(command: Any) -> Any:
    for name in reversed(DIMENSIONS):
        option = click.option(
            f"--{name.replace('_', '-')}",
            type=click.IntRange(1, LIMIT_MAX),
            help=f"{name.replace('_', ' ').capitalize()}. Left out: stays as it is.",
        )
        command = option(command)
    return command


@limits_command.command("set")
@click.argument("scope", type=click.Choice(["organization", "project", "key", "model"]))
@click.argument("scope_id", required=False)
@org_option
@_limit_options
@click.option(
    "--clear",
    "cleared",
    multiple=True,
    metavar="DIMENSION",
    type=click.Choice([*(name.replace("_", "-") for name in DIMENSIONS), "all"]),
    help="Remove a limit, such as tokens-per-day, or all of them. The default of aap.toml holds then.",
)
@json_option
def set_limits(
    scope: Literal["organization", "project", "key", "model"],
    scope_id: str | None,
    org: str | None,
    cleared: tuple[str, ...],
    as_json: bool,
    **given: int | None,
) -> None:
    """Change limits of an organization, project, key or model, and show those that it has then.

    SCOPE_ID is the project's or key's id or the model's name; for the organization it may be left out. Every gateway
    knows within a second; exit code 1 when one has not confirmed it in time.
    """
    from gateway.cli import limit_acts

    if scope_id is None and scope != "organization":
        raise click.UsageError(f"name the {scope}")
    row, propagation = limit_acts.change(scope, scope_id, org, _changes(given, cleared))
    if as_json:
        print_json(row)
    else:
        show([row], _COLUMNS, as_json=False, empty="")
        click.echo("Where there is none (-), the default of aap.toml holds: see `aap limits show`.")
        click.echo(f"{confirmed(propagation)}.")
    require_confirmed(propagation)


def _changes(given: dict[str, int | None], cleared: tuple[str, ...]) -> dict[str, int | None]:
    """Return the new value of each dimension that changes; None removes. Errors: UsageError."""
    chosen = {name: value for name, value in given.items() if value is not None}
    removed = DIMENSIONS if "all" in cleared else [name.replace("-", "_") for name in cleared]
    if "all" not in cleared and chosen.keys() & set(removed):
        raise click.UsageError("a limit cannot be set and cleared at once")
    if not chosen and not removed:
        raise click.UsageError("name a limit to set, or one to --clear")
    return {**dict.fromkeys(removed), **chosen}
