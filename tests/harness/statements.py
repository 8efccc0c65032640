"""The statements that code runs, as PostgreSQL gets them, and what it makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import asyncpg
import msgspec
from sqlalchemy import event

from core.database import Database


class Statement(NamedTuple):
    sql: str
    parameters: tuple[Any, ...]
    settings: tuple[str, ...]
    """What was set for its transaction before it."""


@contextmanager
def captured(database: Database) -> Iterator[list[Statement]]:
    """Every statement that goes to *database* meanwhile."""
    found: list[Statement] = []
    settings: list[str] = []

    def note(_connection: Any, _cursor: Any, sql: str, parameters: Any, _context: Any, _many: bool) -> None:
        if sql.startswith("SELECT set_config("):
            settings.append(sql)
        else:
            found.append(Statement(sql, tuple(parameters), tuple(settings)))
            settings.clear()

    engine = database._engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", note)


async def plan_of(connection: asyncpg.Connection, statement: Statement, options: str = "") -> dict[str, Any]:
    """What PostgreSQL would do with *statement* and its parameters, or with ANALYZE: did."""
    async with connection.transaction():
        for setting in statement.settings:
            await connection.execute(setting)
        explain = f"EXPLAIN (FORMAT JSON{options}) {statement.sql}"
        return msgspec.json.decode(await connection.fetchval(explain, *statement.parameters))[0]


async def generic_plan_of(connection: asyncpg.Connection, statement: Statement) -> dict[str, Any]:
    """What PostgreSQL would do with *statement* whatever its parameters: it may choose to after five times."""
    values = [await _literal(connection, value) for value in statement.parameters]
    async with connection.transaction():
        for setting in (*statement.settings, "SET LOCAL plan_cache_mode = force_generic_plan"):
            await connection.execute(setting)
        await connection.execute(f"PREPARE captured AS {statement.sql}")
        found = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE captured ({', '.join(values)})")
        await connection.execute("DEALLOCATE captured")
    return msgspec.json.decode(found)[0]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every step of a plan."""
    found = plan.get("Plan", plan)
    yield found
    for child in found.get("Plans", ()):
        yield from nodes(child)


async def _literal(connection: asyncpg.Connection, value: Any) -> str:
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, timedelta):
        value = f"{value.total_seconds()} seconds"
    elif isinstance(value, datetime):
        value = value.isoformat()
    elif isinstance(value, list):
        return f"ARRAY[{', '.join([await _literal(connection, one) for one in value])}]"
    return await connection.fetchval("SELECT quote_literal($1::text)", value)
