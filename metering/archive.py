"""Months of the ledger that are old enough: written to files, and only then dropped.

A file is one JSON object a line, compressed. It has a name of its own for good, so that no file ever takes another's
place, and ends in `.part` until its month is dropped: a crash leaves the month, or the file, or both. Windows stay, so
budgets and the usage API go on as before; entries of archived months can no longer be listed or corrected.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import os
import time
from collections.abc import Generator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Final

import asyncpg
import structlog

from core.ids import id_range_start, new_id
from core.writer import Writer
from metering import partitions

_PAGE_ROWS: Final = 5_000
# Each page goes on behind the last row of the one before. The first condition leaves out the other months.
_PAGE: Final = """
SELECT request_id, kind, seq, to_jsonb(e)::text FROM ledger_entries e
WHERE request_id >= $1 AND (request_id, kind, seq) > ($1, $2, $3) AND request_id < $4
ORDER BY request_id, kind, seq LIMIT $5
"""
_OPEN: Final = "SELECT EXISTS (SELECT FROM usage_intents WHERE request_id >= $1 AND request_id < $2)"
_DROP: Final = "SELECT drop_ledger_month($1, $2, $3, $4, $5)"
_RECORDED: Final = "SELECT id FROM ledger_archives WHERE id = ANY($1)"
_PART: Final = ".part"
_COMPRESSION: Final = 6
# A file that nobody has written to for so long, and for which nothing was dropped, is left over from a crash.
_STALE_SECONDS: Final = 86_400.0
_log = structlog.get_logger(__name__)


class ArchiveUnwritable(Exception):
    """A file cannot be written, or does not read back as it was written. Nothing is dropped for it."""


async def archive_old(writer: Writer, now: datetime, months_kept: int, directory: Path) -> list[Path]:
    """Archive and drop every month that ended *months_kept* months ago or earlier; return the files.

    A month with calls that still run stays. Errors: ArchiveUnwritable, and those of `core.database.DOWN`: the month is
    then there as before, or its file is found the next time.
    """
    await _finish(writer, directory)
    files: list[Path] = []
    for month in await _due(writer, now, months_kept):
        path = await _archive(writer, month, directory)
        if path is not None:
            files.append(path)
    return files


async def _due(writer: Writer, now: datetime, months_kept: int) -> list[datetime]:
    oldest_kept = partitions.month_of(now)
    for _ in range(months_kept):
        oldest_kept = partitions.month_before(oldest_kept)
    months = map(partitions.month_named, await partitions.partitions(writer.fetch))
    return [month for month in months if month < oldest_kept and not await _has_open_calls(writer, month)]


async def _has_open_calls(writer: Writer, month: datetime) -> bool:
    return (await writer.fetch(_OPEN, *_id_range(month)))[0][0]


async def _archive(writer: Writer, month: datetime, directory: Path) -> Path | None:
    """Write a month and drop it; return its file. None: it has grown meanwhile, or somebody else was quicker."""
    archive_id, partition = new_id("arch"), partitions.name_of(month)
    path = directory / f"{partition}.{archive_id}.jsonl.gz"
    part = path.with_name(path.name + _PART)
    try:
        rows = await _write(writer, month, part)
        digest = await asyncio.to_thread(_read_back, part, rows)
    except BaseException:
        _remove(part)
        raise
    try:
        is_dropped = (await writer.fetch(_DROP, partition, archive_id, month, rows, digest))[0][0]
    except asyncpg.PostgresError:
        # Refused. After any other failure it may have been done: the part stays, and `_finish` looks it up.
        _remove(part)
        raise
    if not is_dropped:
        _remove(part)
        _log.info("ledger.archive_postponed", partition=partition, rows=rows)
        return None
    with _told(path):
        part.replace(path)
    _log.info("ledger.archived", partition=partition, rows=rows, file=str(path), sha256=digest)
    return path


async def _write(writer: Writer, month: datetime, part: Path) -> int:
    """Write a month's entries in the order of their ids; return how many. They are on the disk then."""
    first, end = _id_range(month)
    last = (first, "", 0)
    count = 0
    with _told(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        raw = part.open("xb")
    try:
        file = gzip.GzipFile("", "wb", _COMPRESSION, raw, mtime=0)
        while page := await writer.fetch(_PAGE, *last, end, _PAGE_ROWS):
            lines = "".join(f"{row[3]}\n" for row in page).encode()
            with _told(part):
                await asyncio.to_thread(file.write, lines)
            count += len(page)
            last = (page[-1][0], page[-1][1], page[-1][2])
        with _told(part):
            await asyncio.to_thread(_sync, file, raw, part.parent)
    finally:
        with contextlib.suppress(OSError):
            raw.close()
    return count


def _sync(file: gzip.GzipFile, raw: BinaryIO, directory: Path) -> None:
    """Bring the file to the disk, and its name with it."""
    file.close()
    raw.flush()
    os.fsync(raw.fileno())
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_back(part: Path, rows: int) -> str:
    """Return the SHA-256 of a file that holds *rows* whole lines. Errors: ArchiveUnwritable."""
    with _told(part):
        with gzip.open(part, "rb") as file:
            found = sum(1 for line in file if line.endswith(b"}\n"))
        with part.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
    if found != rows:
        raise ArchiveUnwritable(f"{part}: {rows} rows were written, {found} were read back")
    return digest


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):
        part.unlink()


async def _finish(writer: Writer, directory: Path) -> None:
    """Give files their names whose months were dropped just before a crash; remove what crashes have left besides."""
    parts = await asyncio.to_thread(_parts, directory)
    if not parts:
        return
    recorded = {row[0] for row in await writer.fetch(_RECORDED, list(parts))}
    for archive_id, part in parts.items():
        with _told(part):
            if archive_id in recorded:
                part.replace(part.with_name(part.name.removesuffix(_PART)))
                _log.warning("ledger.archive_finished", file=part.name.removesuffix(_PART))
            elif part.stat().st_mtime < time.time() - _STALE_SECONDS:
                part.unlink()


def _parts(directory: Path) -> dict[str, Path]:
    with _told(directory):
        return {path.name.split(".")[1]: path for path in directory.glob(f"*.arch_*{_PART}")}


def _id_range(month: datetime) -> tuple[str, str]:
    return id_range_start("req", month), id_range_start("req", partitions.month_after(month))


@contextlib.contextmanager
def _told(path: Path) -> Generator[None]:
    """Tell a fault of the disk from one of the database. Errors: ArchiveUnwritable."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise ArchiveUnwritable(f"{path}: {error}") from error
