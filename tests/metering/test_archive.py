"""`metering.archive`: no month is dropped that is not whole in a file, whatever happens in between."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import resource
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from core.ids import new_id
from core.money import NanoUsd
from core.writer import Writer
from metering import partitions
from metering.archive import _DROP, ArchiveUnwritable, archive_old
from metering.budgets import set_budget
from metering.entries import INTEND, SETTLE, Entry, intend_arguments, settle_arguments
from metering.usage import UNIT_NAMES, Units
from tests.harness.eventually import moment
from tests.metering.conftest import OwnBooks, request_id_at

JANUARY, FEBRUARY, MARCH = (datetime(2026, month, 1, tzinfo=UTC) for month in (1, 2, 3))
# January is older than a whole month then, February is not.
NOW = datetime(2026, 3, 15, tzinfo=UTC)
Hook = Callable[[], Awaitable[object]]


class Interrupted(Writer):
    """A connection to which something happens around the statement that drops a month."""

    def __init__(self, url: str, *, before: Hook | None = None, after: Hook | None = None) -> None:
        super().__init__(url, statement_seconds_max=30)
        self._before, self._after = before, after

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        if statement == _DROP and self._before is not None:
            await self._before()
        rows = await super().fetch(statement, *arguments)
        if statement == _DROP and self._after is not None:
            await self._after()
        return rows


async def connection_lost() -> None:
    raise ConnectionResetError


async def enter(own: OwnBooks, at: datetime, count: int = 1, **facts: Any) -> list[Entry]:
    started_ms = int(at.timestamp() * 1000)
    entries = [own.books.entry(request_id_at(at), started_ms=started_ms, **facts) for _ in range(count)]
    await partitions.make_for(own.writer.fetch, [entry.request_id for entry in entries])
    await own.writer.fetch(SETTLE, *settle_arguments(entries))
    return entries


async def months(own: OwnBooks) -> list[str]:
    return [name[-7:] for name in await partitions.partitions(own.writer.fetch) if name < "ledger_entries_2026_06"]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in gzip.open(file)]


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class TestWhatIsWritten:
    async def test_a_month_that_is_old_enough_is_a_file_and_no_longer_a_partition(
        self, own: OwnBooks, tmp_path: Path
    ) -> None:
        """Guarantee: every entry once, in order, every number exact; the months that are kept stay."""
        units = Units(**{name: number for number, name in enumerate(UNIT_NAMES, 1)})
        entered = [
            *await enter(own, JANUARY, cost=2**62, charge=-(2**62), units=units),
            *await enter(own, JANUARY + timedelta(days=30), 5_010, model='m"\n\u2028ü'),
            *await enter(own, FEBRUARY - timedelta(milliseconds=1), cost=0),
        ]
        await enter(own, FEBRUARY)
        await enter(own, MARCH)
        [file] = await archive_old(own.writer, NOW, 1, tmp_path / "made" / "on the way")
        lines = lines_of(file)
        assert [line["request_id"] for line in lines] == sorted(entry.request_id for entry in entered)
        first = lines[0]
        assert {name: first[name] for name in UNIT_NAMES} == msgspec.structs.asdict(units)
        assert (first["cost_nano_usd"], first["charge_nano_usd"]) == (2**62, -(2**62))
        assert datetime.fromisoformat(first["occurred_at"]) == JANUARY
        assert lines[1]["model"] == 'm"\n\u2028ü'
        assert first.keys() == {name[0] for name in await own.writer.fetch(COLUMNS)}
        assert await months(own) == ["2026_02", "2026_03"]
        assert (await own.writer.fetch("SELECT count(*) FROM ledger_entries"))[0][0] == 2

    async def test_the_file_is_recorded_with_its_digest(self, own: OwnBooks, tmp_path: Path) -> None:
        await enter(own, JANUARY, 3)
        [file] = await archive_old(own.writer, NOW, 1, tmp_path)
        [recorded] = await own.writer.fetch("SELECT id, month, entries, digest FROM ledger_archives")
        assert file.name == f"ledger_entries_2026_01.{recorded['id']}.jsonl.gz"
        assert (recorded["month"], recorded["entries"]) == (JANUARY, 3)
        assert recorded["digest"] == hashlib.sha256(file.read_bytes()).hexdigest()

    @pytest.mark.parametrize(
        ("kept", "left"), [(1, ["02", "03"]), (2, ["01", "02", "03"]), (3, ["12", "01", "02", "03"])]
    )
    async def test_as_many_whole_months_are_kept_as_it_says(
        self, own: OwnBooks, tmp_path: Path, kept: int, left: list[str]
    ) -> None:
        for month in (datetime(2025, 12, 31, tzinfo=UTC), JANUARY, FEBRUARY, MARCH):
            await enter(own, month)
        await archive_old(own.writer, NOW, kept, tmp_path)
        assert [name[-2:] for name in await months(own)] == left

    async def test_budgets_and_windows_stay_as_they_are(self, own: OwnBooks, tmp_path: Path) -> None:
        tenant = own.books.tenant
        async with own.database.transaction() as session:
            await set_budget(
                session,
                ("key", tenant.key_id),
                "total",
                limit=NanoUsd(10**9),
                is_hard=True,
                organization_id=tenant.organization_id,
            )
        await enter(own, JANUARY, 7)
        before = await sums(own)
        assert await archive_old(own.writer, NOW, 1, tmp_path)
        assert await sums(own) == before

    async def test_a_month_with_calls_that_still_run_stays(self, own: OwnBooks, tmp_path: Path) -> None:
        await enter(own, JANUARY)
        intent = own.books.intent(request_id_at(FEBRUARY - timedelta(milliseconds=1)))
        await own.writer.fetch(INTEND, *intend_arguments("gw_1", [intent]))
        assert await archive_old(own.writer, NOW, 1, tmp_path) == []
        assert "2026_01" in await months(own)
        await own.writer.fetch(SETTLE, *settle_arguments([own.books.entry(intent.request_id)]))
        [file] = await archive_old(own.writer, NOW, 1, tmp_path)
        assert len(lines_of(file)) == 2

    async def test_a_month_that_comes_back_has_a_further_file(self, own: OwnBooks, tmp_path: Path) -> None:
        """Guarantee: what was archived once is never written over."""
        await enter(own, JANUARY, 2)
        [first] = await archive_old(own.writer, NOW, 1, tmp_path)
        before = first.read_bytes()
        [late] = await enter(own, JANUARY)
        [second] = await archive_old(own.writer, NOW, 1, tmp_path)
        assert first.read_bytes() == before
        assert [line["request_id"] for line in lines_of(second)] == [late.request_id]


class TestCrashes:
    async def test_before_the_month_is_dropped_it_is_archived_the_next_time(
        self, own: OwnBooks, tmp_path: Path
    ) -> None:
        """Guarantee: what the crash left is no archive, and is removed when nobody can still be writing to it."""
        await enter(own, JANUARY, 3)
        dying = Interrupted(own.url, before=connection_lost)
        with pytest.raises(ConnectionResetError):
            await archive_old(dying, NOW, 1, tmp_path)
        [part] = tmp_path.iterdir()
        assert part.suffix == ".part"
        assert await months(own) == ["2026_01"]
        [file] = await archive_old(own.writer, NOW, 1, tmp_path)
        assert len(lines_of(file)) == 3
        assert part.exists()
        day_ago = time.time() - 90_000
        os.utime(part, (day_ago, day_ago))
        assert await archive_old(own.writer, NOW, 1, tmp_path) == []
        assert files_in(tmp_path) == [file.name]
        await dying.close()

    async def test_after_the_month_is_dropped_its_file_gets_its_name_the_next_time(
        self, own: OwnBooks, tmp_path: Path
    ) -> None:
        entered = await enter(own, JANUARY, 3)
        dying = Interrupted(own.url, after=connection_lost)
        with pytest.raises(ConnectionResetError):
            await archive_old(dying, NOW, 1, tmp_path)
        assert await months(own) == []
        [part] = tmp_path.iterdir()
        day_ago = time.time() - 90_000
        os.utime(part, (day_ago, day_ago))
        assert await archive_old(own.writer, NOW, 1, tmp_path) == []
        [file] = tmp_path.iterdir()
        assert file.name == part.name.removesuffix(".part")
        assert [line["request_id"] for line in lines_of(file)] == sorted(entry.request_id for entry in entered)
        await dying.close()

    async def test_in_the_middle_of_a_file_leaves_nothing(self, own: OwnBooks, tmp_path: Path) -> None:
        await enter(own, JANUARY, 3)
        lost = await asyncpg.connect(own.url)
        async with lost.transaction():
            await lost.execute("LOCK TABLE ledger_entries_2026_01 IN ACCESS EXCLUSIVE MODE")
            archiving = asyncio.create_task(archive_old(own.writer, NOW, 1, tmp_path))
            while not list(tmp_path.iterdir()):
                await moment(0.01)
            archiving.cancel()
            await asyncio.gather(archiving, return_exceptions=True)
        await lost.close()
        assert files_in(tmp_path) == []
        assert await months(own) == ["2026_01"]


class TestOthers:
    async def test_an_entry_that_comes_while_the_file_is_written_is_in_the_next_one(
        self, own: OwnBooks, tmp_path: Path
    ) -> None:
        await enter(own, JANUARY, 3)

        async def late() -> None:
            await enter(own, JANUARY)

        busy = Interrupted(own.url, before=late)
        assert await archive_old(busy, NOW, 1, tmp_path) == []
        assert files_in(tmp_path) == []
        [file] = await archive_old(own.writer, NOW, 1, tmp_path)
        assert len(lines_of(file)) == 4
        assert await months(own) == []
        await busy.close()

    async def test_two_workers_at_once_make_one_file(self, own: OwnBooks, tmp_path: Path) -> None:
        await enter(own, JANUARY, 500)
        other = Writer(own.url, statement_seconds_max=30)
        archived = await asyncio.gather(*(archive_old(writer, NOW, 1, tmp_path) for writer in (own.writer, other)))
        if not any(archived):
            # Each stood in the other's way.
            archived = [await archive_old(own.writer, NOW, 1, tmp_path)]
        [file] = [file for files in archived for file in files]
        assert files_in(tmp_path) == [file.name]
        assert len(lines_of(file)) == 500
        await other.close()

    async def test_who_reads_for_long_is_waited_for_briefly_and_holds_nobody_up(
        self, own: OwnBooks, tmp_path: Path
    ) -> None:
        """Guarantee: calls go on being entered within a second or two, and the month is dropped another time."""
        await enter(own, JANUARY, 3)
        reader = await asyncpg.connect(own.url)
        other = Writer(own.url, statement_seconds_max=30)
        async with reader.transaction():
            await reader.fetch("SELECT count(*) FROM ledger_entries")
            archiving = asyncio.create_task(archive_old(other, NOW, 1, tmp_path))
            slowest = 0.0
            while not archiving.done():
                began = time.monotonic()
                await enter(own, MARCH)
                slowest = max(slowest, time.monotonic() - began)
            assert await archiving == []
        assert slowest < 3
        assert "2026_01" in await months(own)
        assert len(await archive_old(own.writer, NOW, 1, tmp_path)) == 1
        await reader.close()
        await other.close()


class TestUnwritable:
    async def test_where_no_file_can_be_made_nothing_is_dropped(self, own: OwnBooks, tmp_path: Path) -> None:
        await enter(own, JANUARY)
        (tmp_path / "file").write_text("in the way")
        for directory in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/archive")):
            with pytest.raises(ArchiveUnwritable, match=str(directory)):
                await archive_old(own.writer, NOW, 1, directory)
        assert await months(own) == ["2026_01"]

    @pytest.fixture
    def full_disk(self) -> Iterator[None]:
        """No file of this process grows beyond 4 kB."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    async def test_where_the_disk_is_full_nothing_is_dropped_and_no_part_is_left(
        self, own: OwnBooks, tmp_path: Path, full_disk: None
    ) -> None:
        await enter(own, JANUARY, 3_000)
        with pytest.raises(ArchiveUnwritable):
            await archive_old(own.writer, NOW, 1, tmp_path)
        assert files_in(tmp_path) == []
        assert await months(own) == ["2026_01"]


COLUMNS = "SELECT column_name FROM information_schema.columns WHERE table_name = 'ledger_entries'"


async def sums(own: OwnBooks) -> list[list[Any]]:
    statements = (
        "SELECT * FROM spend_windows ORDER BY seconds, starts_at",
        "SELECT * FROM budget_periods ORDER BY budget_id, starts_at",
    )
    return [await own.writer.fetch(statement) for statement in statements]


def test_ids_of_archives_are_no_parts_of_names() -> None:
    """Guarantee: by the dots in a file's name its archive is known again."""
    assert "." not in new_id("arch")
