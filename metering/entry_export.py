"""The ledger as a file, in pieces: memory stays the same however long it is, and so does the time in a transaction."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final, Literal

import msgspec

from core.database import Database
from core.ids import OrganizationId
from metering.entry_pages import EntryFilter, LedgerEntry, entry_of, read_rows

Format = Literal["csv", "jsonl"]
ROWS_PER_READ: Final = 1_000
# What is encoded before other work of the process has its turn: about a millisecond.
ROWS_PER_PIECE: Final = 100
COLUMNS: Final = LedgerEntry.__struct_fields__[:-1]
# Names that providers, or who configured them, chose: a spreadsheet would run what begins like a formula
# (OWASP, CSV Injection). Everything else is of our making, amounts with their minus among it.
_NAMES_FROM_OUTSIDE: Final = tuple(COLUMNS.index(name) for name in ("model", "deployment", "service_tier"))
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")
_TIMES: Final = (COLUMNS.index("occurred_at"), COLUMNS.index("booked_at"))
_IS_UNPRICED: Final = COLUMNS.index("is_unpriced")
_json = msgspec.json.Encoder()


async def export(
    database: Database, chosen: EntryFilter, *, organization_id: OrganizationId, form: Format
) -> AsyncGenerator[bytes]:
    """Yield the entries, oldest first, as one file: CSV (RFC 4180, with a line of names) or a JSON object per line.

    Each read is a transaction of its own, so a slow reader holds none open; what is booked meanwhile may be in the file
    or not. Errors: those of the database, also between two pieces.
    """
    encode, head = (_csv_lines, _csv([COLUMNS])) if form == "csv" else (_json.encode_lines, b"")
    after = None
    while True:
        rows = await _read(database, chosen, organization_id=organization_id, after=after)
        for at in range(0, len(rows), ROWS_PER_PIECE):
            yield head + encode([entry_of(row) for row in rows[at : at + ROWS_PER_PIECE]])
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


def _csv_lines(entries: Sequence[LedgerEntry]) -> bytes:
    return _csv([_cells(entry) for entry in entries])


def _csv(lines: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()


def _cells(entry: LedgerEntry) -> list[Any]:
    cells: list[Any] = list(msgspec.structs.astuple(entry)[:-1])
    for at in _NAMES_FROM_OUTSIDE:
        if cells[at].startswith(_FORMULA_STARTS):
            cells[at] = f"'{cells[at]}"
    for at in _TIMES:
        cells[at] = cells[at].isoformat().replace("+00:00", "Z")
    cells[_IS_UNPRICED] = "true" if entry.is_unpriced else "false"
    return cells
