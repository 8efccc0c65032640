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
from metering.entry_pages import EntryFilter, LedgerEntry, read_entries

Format = Literal["csv", "jsonl"]
ROWS_PER_READ: Final = 1_000
# What is encoded before other work of the process has its turn: about 2 ms.
_ROWS_PER_PIECE: Final = 200
COLUMNS: Final = LedgerEntry.__struct_fields__[:-1]
# Names that providers, or who configured them, chose: a spreadsheet would run what begins like a formula
# (OWASP, CSV Injection). Everything else is of our making, amounts with their minus among it.
_NAMES_FROM_OUTSIDE: Final = tuple(COLUMNS.index(name) for name in ("model", "deployment", "service_tier"))
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")
_json = msgspec.json.Encoder()


async def export(
    database: Database, chosen: EntryFilter, *, organization_id: OrganizationId, form: Format
) -> AsyncGenerator[bytes]:
    """Yield the entries, oldest first, as one file: CSV (RFC 4180, with a line of names) or a JSON object per line.

    Each read is a transaction of its own, so a slow reader holds none open; what is booked meanwhile may be in the file
    or not. Errors: those of the database, also between two pieces.
    """
    encode, head = (_csv_lines, _csv([COLUMNS])) if form == "csv" else (_json.encode_lines, b"")
    async for entries in _reads(database, chosen, organization_id=organization_id):
        for piece in _pieces(entries, encode):
            yield head + piece
            head = b""
            await asyncio.sleep(0)
    if head:
        yield head


async def _reads(
    database: Database, chosen: EntryFilter, *, organization_id: OrganizationId
) -> AsyncGenerator[list[LedgerEntry]]:
    after = None
    while True:
        async with database.transaction() as session:
            entries = await read_entries(
                session,
                chosen,
                organization_id=organization_id,
                order="oldest first",
                after=after,
                count=ROWS_PER_READ,
            )
        yield entries
        if len(entries) < ROWS_PER_READ:
            return
        after = entries[-1].id


def _pieces(entries: Sequence[LedgerEntry], encode: Callable[[Sequence[LedgerEntry]], bytes]) -> Any:
    return (encode(entries[at : at + _ROWS_PER_PIECE]) for at in range(0, len(entries), _ROWS_PER_PIECE))


def _csv_lines(entries: Sequence[LedgerEntry]) -> bytes:
    return _csv([_cells(entry) for entry in entries])


def _csv(lines: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()


def _cells(entry: LedgerEntry) -> list[Any]:
    cells: list[Any] = [getattr(entry, name) for name in COLUMNS]
    for at in _NAMES_FROM_OUTSIDE:
        if cells[at].startswith(_FORMULA_STARTS):
            cells[at] = f"'{cells[at]}"
    return [_cell(cell) for cell in cells]


def _cell(value: Any) -> Any:
    if value is True or value is False:
        return "true" if value else "false"
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else value
