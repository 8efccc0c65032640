"""What the commands share: settings, a session on the database, and two ways of showing results."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeVar, cast

import click
import msgspec
from redis.asyncio import Redis

from core import embedded
from core.configuration import ConfigurationInvalid
from core.database import DOWN, Database
from core.embedded import EmbeddedUnavailable
from core.errors import AppError
from core.migrations import expected_revision, is_current
from core.redis import connect
from core.settings import Pepper, Settings, SettingsInvalid, load

_T = TypeVar("_T")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


class Stores(msgspec.Struct, frozen=True):
    """The stores that a command works on."""

    settings: Settings
    database: Database
    redis: Redis
    pepper: Pepper


def fail(message: str) -> NoReturn:
    """End with exit code 1 and a message on standard error."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(1)


def read_settings() -> Settings:
    """Return the environment's settings, or end with every problem."""
    try:
        return load(os.environ)
    except SettingsInvalid as error:
        fail("the settings are not valid:\n  " + "\n  ".join(error.problems))


def on_stores(act: Callable[[Stores], Awaitable[_T]]) -> _T:
    """Run *act* on the configured stores; embedded ones are started for it unless they run already."""
    settings = read_settings()
    try:
        with embedded.stores(settings) as stores:
            return asyncio.run(_connected(settings, stores, act))
    except AppError as error:
        fail(error.message)
    except (EmbeddedUnavailable, ConfigurationInvalid) as error:
        fail(str(error))
    except DOWN as error:
        fail(f"a store cannot be used: {type(error).__name__}. `aap doctor` says more.")


async def _connected(settings: Settings, stores: embedded.Stores, act: Callable[[Stores], Awaitable[_T]]) -> _T:
    database = Database(stores.database_url, connections_max=1)
    redis = connect(stores.redis_url)
    try:
        if not await is_current(database):
            fail(f"the database schema is not at {expected_revision()}: run `aap migrate` (or `aap serve`) first")
        return await act(Stores(settings, database, redis, stores.peppers[0]))
    finally:
        await redis.aclose()
        await database.close()


def show(rows: Sequence[msgspec.Struct], columns: Sequence[str], *, as_json: bool, empty: str) -> None:
    """Print *rows* as a table of *columns*, or whole as JSON."""
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(empty)
        return
    from rich.console import Console  # noqa: PLC0415 - only for people
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(getattr(row, column)) for column in columns))
    # A pipe gets whole lines: what is folded there cannot be searched.
    console = Console() if sys.stdout.isatty() else Console(width=10_000, no_color=True)
    console.print(table)


def print_json(value: Any) -> None:
    """Print *value* as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in cast("list[Any]", value))
    return str(value)
