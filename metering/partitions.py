"""The ledger's months: a partition for each, made ahead; months that are kept elsewhere are dropped.

Request ids sort by time and begin with it, so a month of ids is a range of text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from core.ids import id_range_start, moment_of

# This month's, and those that a worker which is away for two months would miss.
_MONTHS_AHEAD: Final = 3
# Two processes that make the same partition take turns.
_LOCK: Final = 0x616171
_PATTERN: Final = "ledger_entries_%Y_%m"

Run = Callable[..., Awaitable[list[Any]]]
"""Runs a statement with arguments, and returns its rows."""


def month_of(moment: datetime) -> datetime:
    """Return the first instant of the month, in UTC."""
    return moment.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def month_after(month: datetime) -> datetime:
    """Return the first instant of the following month."""
    return month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)


def month_before(month: datetime) -> datetime:
    """Return the first instant of the month before."""
    return month_of(month - timedelta(days=1))


def name_of(month: datetime) -> str:
    """Return the name of a month's partition; names sort by time."""
    return month.strftime(_PATTERN)


def month_named(name: str) -> datetime:
    """Return the month of a partition."""
    return datetime.strptime(name, _PATTERN).replace(tzinfo=UTC)


async def make_ahead(run: Run, now: datetime) -> list[str]:
    """Make the partitions of this month and the next ones, as far as they are missing; return those that were made."""
    months = [month_of(now)]
    for _ in range(_MONTHS_AHEAD):
        months.append(month_after(months[-1]))
    return await make(run, months)


async def make_for(run: Run, request_ids: Iterable[str]) -> list[str]:
    """Make the partitions that entries of these requests need: for clocks that are far off, and forgotten workers."""
    return await make(run, sorted({month_of(moment_of(request_id)) for request_id in request_ids}))


async def make(run: Run, months: Iterable[datetime]) -> list[str]:
    """Make the partitions of *months* that are missing. Errors: those of *run*."""
    present = set(await partitions(run))
    made: list[str] = []
    for month in months:
        name = name_of(month)
        if name in present:
            continue
        # Names and bounds are made of digits and our own alphabet; a statement of this kind takes no parameters. Made
        # apart and attached: what is made in its place (PARTITION OF) waits for every reader, and all entries for it.
        first, last = id_range_start("req", month), id_range_start("req", month_after(month))
        await run(
            f"DO $$BEGIN PERFORM pg_advisory_xact_lock({_LOCK}); IF to_regclass('{name}') IS NULL THEN"
            f" CREATE TABLE {name} (LIKE ledger_entries INCLUDING ALL);"
            f" ALTER TABLE ledger_entries ATTACH PARTITION {name} FOR VALUES FROM ('{first}') TO ('{last}');"
            " END IF; END$$"
        )
        made.append(name)
    return made


async def partitions(run: Run) -> list[str]:
    """Return the names of the months that there are, oldest first."""
    rows = await run(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = 'ledger_entries'::regclass ORDER BY 1"
    )
    return [row[0] for row in rows]
