"""Months of the ledger that are old enough: written to files, and only then dropped.

A file is one JSON object a line, compressed, under its final name only when it is complete and on the disk. Windows
stay, so budgets and the usage API go on as before; entries of archived months can no longer be listed or corrected.
"""

from __future__ import annotations

import gzip
import os
from datetime import datetime
from pathlib import Path
from typing import Final

import structlog

from core.ids import id_range_start
from metering import partitions
from metering.writer import Writer

_PAGE_ROWS: Final = 5_000
# Each page goes on behind the last row of the one before.
_PAGE: Final = """
SELECT request_id, kind, seq, to_jsonb(e)::text FROM ledger_entries e
WHERE (request_id, kind, seq) > ($1, $2, $3) AND request_id < $4
ORDER BY request_id, kind, seq LIMIT $5
"""
_DROP: Final = "SELECT drop_ledger_month($1::text::regclass, $2)"
_log = structlog.get_logger(__name__)


async def archive_old(writer: Writer, now: datetime, months_kept: int, directory: Path) -> list[Path]:
    """Archive and drop every month that ended *months_kept* months ago or earlier; return the files.

    Errors: OSError when a file cannot be written, and those of `core.database.DOWN`: nothing is dropped then.
    """
    oldest_kept = partitions.month_of(now)
    for _ in range(months_kept):
        oldest_kept = partitions.month_before(oldest_kept)
    files: list[Path] = []
    for name in await partitions.partitions(writer.fetch):
        if name >= partitions.name_of(oldest_kept):
            break
        month = partitions.month_named(name)
        path = directory / f"{name}.jsonl.gz"
        rows = await _write(writer, month, path)
        is_dropped = await _drop(writer, month, rows)
        _log.info("ledger.archived", partition=name, rows=rows, file=str(path), dropped=is_dropped)
        files.append(path)
    return files


async def _write(writer: Writer, month: datetime, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    end = id_range_start("req", partitions.month_after(month))
    last = (id_range_start("req", month), "", 0)
    count = 0
    with fresh.open("wb") as raw:
        with gzip.open(raw, "wt", encoding="utf-8") as file:
            while page := await writer.fetch(_PAGE, *last, end, _PAGE_ROWS):
                file.writelines(f"{row[3]}\n" for row in page)
                count += len(page)
                last = (page[-1][0], page[-1][1], page[-1][2])
        raw.flush()
        os.fsync(raw.fileno())
    fresh.replace(path)
    return count


async def _drop(writer: Writer, month: datetime, rows: int) -> bool:
    """Drop a month that holds as many rows as were written; one that has grown meanwhile is archived again."""
    await writer.fetch(_DROP, partitions.name_of(month), rows)
    return partitions.name_of(month) not in await partitions.partitions(writer.fetch)
