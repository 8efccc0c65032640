"""`aap usage`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import click

from gateway.cli.common import json_option, org_option, show

_DAYS_DEFAULT = 30
_COLUMNS = (
    *("group", "requests", "input_tokens", "cached_input_tokens", "output_tokens"),
    *("cost_usd", "charge_usd", "unpriced_requests"),
)


def range_options(command: Any) -> Any:
    """Add --from and --to, which name UTC days."""
    day = click.DateTime(formats=["%Y-%m-%d"])
    until = "The day after the last one, in UTC. Default: to now."
    command = click.option("--to", "to", type=day, metavar="DATE", help=until)(command)
    since = "The first day, in UTC, such as 2026-11-01."
    return click.option("--from", "since", type=day, metavar="DATE", help=since)(command)


@click.command()
@org_option
@click.option("--days", type=click.IntRange(1, 3660), help=f"So many days, today among them. Default: {_DAYS_DEFAULT}.")
@range_options
@click.option(
    "--by",
    type=click.Choice(["model", "project", "key", "day"]),
    default="model",
    show_default=True,
    help="What there is a row of.",
)
@json_option
def usage_command(
    org: str | None,
    days: int | None,
    since: datetime | None,
    to: datetime | None,
    by: Literal["model", "project", "key", "day"],
    as_json: bool,
) -> None:
    """Show what an organization used and what it is charged, in US dollars.

    Input and output tokens are all of them; cached ones are a part of the input. What had no price is counted as
    unpriced, with a cost of 0.
    """
    from gateway.cli import usage_acts

    first, last = _range(days, since, to)
    rows = usage_acts.summarise(org, first, last, by)
    if not as_json and rows:
        rows.append(usage_acts.total(rows))
    show(rows, _COLUMNS, as_json=as_json, empty="Nothing was used in that time.")


def _range(days: int | None, since: datetime | None, to: datetime | None) -> tuple[datetime, datetime]:
    """Return the first instant of the first day, and that of the day after the last. Errors: UsageError."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if days is not None and (since or to):
        raise click.UsageError("give --days, or --from and --to")
    if to is not None and since is None:
        raise click.UsageError("--to needs --from")
    last = to.replace(tzinfo=UTC) if to else today + timedelta(days=1)
    first = since.replace(tzinfo=UTC) if since else last - timedelta(days=days or _DAYS_DEFAULT)
    if first >= last:
        raise click.UsageError("--from must be earlier than --to")
    return first, last
