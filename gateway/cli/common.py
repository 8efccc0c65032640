"""What the declarations of commands share: options, and how results and failures are shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import click
import msgspec

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, also of errors.")
org_option = click.option("--org", help="The organization's id. Needed only when there are several.")


def fail(message: str) -> NoReturn:
    """End with exit code 1 and a message on standard error."""
    context = click.get_current_context(silent=True)
    print_error(message, as_json=context is not None and bool(context.params.get("as_json")))
    sys.exit(1)


def print_error(message: str, *, as_json: bool) -> None:
    """Write what went wrong to standard error."""
    click.echo(_encoded({"error": {"message": message}}) if as_json else f"Error: {message}", err=True)


def show(rows: Sequence[msgspec.Struct], columns: Sequence[str], *, as_json: bool, empty: str) -> None:
    """Print *rows* as a table of *columns*, or whole as JSON."""
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(getattr(row, column)) for column in columns))
    # A pipe gets whole lines: what is folded there cannot be searched.
    console = Console() if sys.stdout.isatty() else Console(width=10_000, no_color=True)
    console.print(table)


def confirmed(propagation: Any) -> str:
    """Return how many gateways know of a change, in words."""
    count = len(propagation.acknowledged)
    return f"{count} running API process{'' if count == 1 else 'es'} confirmed it"


def require_confirmed(propagation: Any, until_then: str = "the change holds") -> None:
    """End with exit code 1 and the names of those gateways that have not said in time that they know of a change."""
    if not propagation.is_complete:
        fail(f"not confirmed by {', '.join(propagation.missing)}: there {until_then} within 5 seconds")


def print_json(value: Any) -> None:
    """Print *value* as indented JSON."""
    click.echo(msgspec.json.format(_encoded(value), indent=2))


def print_json_line(value: Any) -> None:
    """Print *value* as one line of JSON, at once: somebody may be waiting for it at the other end of a pipe."""
    click.echo(_encoded(value))
    sys.stdout.flush()


def _encoded(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in cast("list[Any]", value))
    return str(value)
