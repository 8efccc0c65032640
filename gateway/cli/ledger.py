"""`aap ledger`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import click

from gateway.cli.common import json_option, org_option, print_json
from gateway.cli.usage import range_options


@click.group()
def ledger_command() -> None:
    """Export the ledger."""


@ledger_command.command("export")
@org_option
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True, help="Form.")
@range_options
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A file. Default: standard output.")
@json_option
def export_ledger(
    org: str | None,
    form: Literal["csv", "jsonl"],
    since: datetime | None,
    to: datetime | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Write an organization's entries, oldest first, with exact amounts in US dollars.

    Without --from they begin with the first one, without --to they end with the newest. A file has its name only when
    it is whole.
    """
    from gateway.cli import ledger_acts

    first, last = (None if day is None else day.replace(tzinfo=UTC) for day in (since, to))
    if first is not None and last is not None and first >= last:
        raise click.UsageError("--from must be earlier than --to")
    written = ledger_acts.export_to(output, form, org, first, last)
    if output is not None and as_json:
        print_json({"output": str(output), "bytes": written})
    elif output is not None:
        click.echo(f"Wrote {written} bytes to {output}.", err=True)
