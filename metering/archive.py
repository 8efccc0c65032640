"""Months of the ledger that are old enough: written to files, and only then dropped.

A file is one JSON object a line, compressed, under its final name only when it is complete and on the disk. Windows stay,
so budgets and the usage API go on as before; entries of archived months can no longer be listed or corrected.
"""

from __future__ import annotations

import gzip
import os
from datetime import datetime
from pathlib import Path
from typing import Final

import structlog

from metering import partitions
from metering.writer import Writer

_PAGE_ROWS: Final = 5_000
_log = structlog.get_logger(__name__)


async def archive_old(writer: Writer, now: datetime, months_kept: int, directory: Path) -> list[Path]:
    """Archive and drop every month that ended *months_kept* months ago or earlier; return the files.

    A month in which a call is still unsettled stays. Errors: OSError when a file cannot be written: nothing is dropped.
    """
    oldest_kept = partitions.month_of(now)
    for _ in range(months_kept):
        oldest_kept = partitions.month_before(oldest_kept)
    files: list[Path] = []
    for name in await partitions.partitions(writer.fetch):
        if name >= partitions.name_of(oldest_kept):
            break
        path = directory / f"{name}.jsonl.gz"
        rows = await _write(writer, name, path)
        await _drop(writer, name, rows)
        _log.info("ledger.archived", partition=name, rows=rows, file=str(path))
        files.append(path)
    return files


async def _write(writer: Writer, name: str, path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    count, last = 0, ("", "", 0)
    # Names of partitions are our own; each page goes on behind the last row of the one before.
    statement = (
        f"SELECT request_id, kind, seq, to_jsonb(e)::text FROM {name} e"  # noqa: S608
        f" WHERE (request_id, kind, seq) > ($1, $2, $3) ORDER BY request_id, kind, seq LIMIT {_PAGE_ROWS}"
    )
    with fresh.open("wb") as raw:
        with gzip.open(raw, "wt", encoding="utf-8") as file:
            while page := await writer.fetch(statement, *last):
                file.writelines(f"{row[3]}\n" for row in page)
                count += len(page)
                last = (page[-1][0], page[-1][1], page[-1][2])
        raw.flush()
        os.fsync(raw.fileno())
    fresh.replace(path)
    return count


async def _drop(writer: Writer, name: str, rows: int) -> None:
    """Drop a partition that holds as many rows as were written: one that has grown meanwhile is archived again."""
    await writer.fetch(
        f"DO $$BEGIN LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE;"
        f" IF (SELECT count(*) FROM {name}) = {rows} THEN"
        f" ALTER TABLE ledger_entries DETACH PARTITION {name}; DROP TABLE {name}; END IF; END$$"
    )
