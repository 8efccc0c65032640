"""The ledger as a file, in pieces: memory stays the same however long it is, and so does the time in a transaction."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import datetime
from typing import Any, Final, Literal

import msgspec

from core.database import Database
from core.ids import OrganizationId
from metering.entry_pages import EntryFilter, LedgerEntry, OperatorEntry, entry_of, operator_entry_of, read_rows

Format = Literal["csv", "jsonl"]
ROWS_PER_READ: Final = 1_000
# What is encoded before other work of the process has its turn: about a millisecond.
ROWS_PER_PIECE: Final = 100
# Names that providers, or who configured them, chose: a spreadsheet would run what begins like a formula
# (OWASP, CSV Injection). Everything else is of our making, amounts with their minus among it.
_NAMES_FROM_OUTSIDE: Final = frozenset({"model", "deployment", "service_tier", "note"})
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")
_json = msgspec.json.Encoder()


class View(msgspec.Struct, frozen=True):
    """What a reader sees of an entry: as a Struct, and by which names as cells."""

    entry_of: Callable[[Sequence[Any]], LedgerEntry]
    columns: tuple[str, ...]


def _columns(kind: type[LedgerEntry]) -> tuple[str, ...]:
    return tuple(name for name in kind.__struct_fields__ if name != "object")


TENANTS: Final = View(entry_of, _columns(LedgerEntry))
OPERATORS: Final = View(operator_entry_of, _columns(OperatorEntry))


async def export(
    database: Database, chosen: EntryFilter, *, organization_id: OrganizationId, form: Format, view: View = TENANTS
) -> AsyncGenerator[bytes]:
    """Yield the entries, oldest first, as one file: CSV (RFC 4180, with a line of names) or a JSON object per line.

    Each read is a transaction of its own, so a slow reader holds none open; what is booked meanwhile may be in the file
    or not. Errors: those of the database, also between two pieces.
    """
    head = _csv([view.columns]) if form == "csv" else b""
    after = None
    while True:
        rows = await _read(database, chosen, organization_id=organization_id, after=after)
        for at in range(0, len(rows), ROWS_PER_PIECE):
            entries = [view.entry_of(row) for row in rows[at : at + ROWS_PER_PIECE]]
            yield head + (_csv_lines(entries, view) if form == "csv" else _json.encode_lines(entries))
            head = b""
            await asyncio.sleep(0)
        if len(rows) < ROWS_PER_READ:
            break
        after = entry_of(rows[-1]).id
    if head:
        yield head


async def _read(
    database: Database, chosen: EntryFilter, *, organization_id: OrganizationId, after: str | None
) -> Sequence[Sequence[Any]]:
    async with database.transaction() as session:
        return await read_rows(
            session, chosen, organization_id=organization_id, order="oldest first", after=after, count=ROWS_PER_READ
        )


def _csv_lines(entries: Sequence[LedgerEntry], view: View) -> bytes:
    return _csv([[_cell(name, getattr(entry, name)) for name in view.columns] for entry in entries])


def _csv(lines: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()


def _cell(name: str, value: Any) -> Any:
    if name in _NAMES_FROM_OUTSIDE:
        return f"'{value}" if value is not None and value.startswith(_FORMULA_STARTS) else value
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, bool):
        return "true" if value else "false"
    return value
