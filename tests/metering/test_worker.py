"""`metering.worker`: every act goes on, whatever happens to the stores, to another act, or beside it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import select
from structlog.testing import capture_logs

from core.clock import Clock, ManualClock, SystemClock
from core.database import DOWN, Database
from core.ids import new_id
from core.money import NanoUsd
from core.settings import LedgerSettings
from core.writer import Writer
from keys.budgets import budget_of, period_bounds
from keys.caps import state_key
from keys.tables import BudgetRow
from metering import partitions
from metering.budgets import set_budget
from metering.entries import INTEND, SETTLE, intend_arguments, settle_arguments
from metering.verify import verify
from metering.worker import MeteringStores, MeteringWorker, Pace
from tests.harness.eventually import eventually
from tests.harness.private_stores import private_postgres, private_redis
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant
from tests.metering.conftest import Books, OwnBooks, request_id_at

QUICK = Pace(
    sweep_seconds=0.05, reconcile_seconds=0.05, rounds_apart_seconds=0.1, housekeeping_seconds=0.1, retry_seconds=0.05
)


def settings(archive_dir: Path = Path("/nowhere"), months: int = 0, lease_seconds: float = 0.05) -> LedgerSettings:
    return LedgerSettings(lease_seconds=lease_seconds, retention_months=months, archive_dir=archive_dir)


@contextlib.asynccontextmanager
async def working(*workers: MeteringWorker) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        yield tasks
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Chores:
    """Something to do for each act, and whether it was done."""

    def __init__(self, books: Books, database: Database, redis: Redis) -> None:
        self.books, self.database, self.redis = books, database, redis
        self.state = b""

    async def add_budget(self) -> None:
        tenant = self.books.tenant
        async with self.database.transaction() as session:
            await set_budget(
                session,
                ("organization", tenant.organization_id),
                "total",
                limit=NanoUsd(10**12),
                is_hard=True,
                organization_id=tenant.organization_id,
            )
            budget = budget_of((await session.scalars(select(BudgetRow))).one())
        self.state = state_key(budget, period_bounds("total", datetime.now(UTC))[0])

    async def add_lost_calls(self, count: int) -> None:
        intents = [self.books.intent() for _ in range(count)]
        await self.books.run(INTEND, *intend_arguments(new_id("gw"), intents))

    async def add_old_minute(self) -> None:
        week_ago = datetime.now(UTC) - timedelta(days=8)
        old = self.books.entry(request_id_at(week_ago), started_ms=int(week_ago.timestamp() * 1000))
        await partitions.make_for(self.books.run, [old.request_id])
        await self.books.run(SETTLE, *settle_arguments([old]))

    async def mistake_budget(self) -> None:
        """Have Redis count more than was charged, and hold a call that is long over."""
        over = request_id_at(datetime.now(UTC) - timedelta(minutes=5))
        await self.redis.hset(self.state, mapping={"s": 10**9, "r": 77, over: 77})  # type: ignore[misc]

    async def are_calls_entered(self) -> bool:
        return not await self.books.intents()

    async def is_minute_forgotten(self) -> bool:
        rows = await self.books.run(
            "SELECT count(*) FROM spend_windows WHERE seconds = 60 AND starts_at < now() - interval '7 days'"
        )
        return rows[0][0] == 0

    async def is_budget_right(self) -> bool:
        held: dict[bytes, bytes] = await self.redis.hgetall(self.state)  # type: ignore[misc]
        [[spent]] = await self.books.run("SELECT spent_nano_usd FROM budget_periods")
        return held == {b"s": str(spent).encode(), b"r": b"0"}


class TestStoresThatGoAway:
    async def test_every_act_goes_on_when_its_store_is_back(self, stores: TestStores, workdir: Path) -> None:
        """Guarantee: and while Redis alone is away, what needs only PostgreSQL is done."""
        async with (
            private_redis(workdir) as server,
            private_postgres(workdir, server.url, stores.pepper) as (postgres, own),
        ):
            database, redis = Database(own.database_url), Redis.from_url(server.url)
            writer = Writer(own.database_url, statement_seconds_max=5)
            await partitions.make_ahead(writer.fetch, SystemClock().now())
            chores = Chores(Books(writer, await new_tenant(database, own.pepper)), database, redis)
            await chores.add_budget()
            connected = MeteringStores(own.database_url, database, redis)
            with capture_logs() as logs:
                async with working(MeteringWorker(connected, settings(), SystemClock(), QUICK)):
                    await postgres.stop_immediately()
                    await server.kill()
                    for act in ("sweep", "reconcile", "keep_house"):
                        await eventually(lambda act=act: any(log.get("act") == act for log in logs))
                    await postgres.start()
                    await eventually(lambda: _answers(writer), 20)
                    await chores.add_lost_calls(3)
                    await chores.add_old_minute()
                    await eventually(chores.are_calls_entered, 10)
                    await eventually(chores.is_minute_forgotten, 10)
                    await server.start()
                    await chores.mistake_budget()
                    await eventually(chores.is_budget_right, 10)
            assert {log["event"] for log in logs} <= {"metering.round_failed", "sweeper.calls_lost"}
            assert (await verify(database, rerate=False)).drifts == []
            await writer.close()
            await redis.aclose()
            await database.close()


async def _answers(writer: Writer) -> bool:
    try:
        return bool(await writer.fetch("SELECT 1"))
    except DOWN:
        return False


@pytest.fixture
async def chores(own: OwnBooks, redis: Redis) -> Chores:
    made = Chores(own.books, own.database, redis)
    await made.add_budget()
    return made


def worker_of(own: OwnBooks, redis: Redis, clock: Clock | None = None, **kept: Any) -> MeteringWorker:
    stores = MeteringStores(own.url, own.database, redis)
    return MeteringWorker(stores, settings(**kept), clock or SystemClock(), QUICK)


class TestTwoAtOnce:
    async def test_they_do_no_harm(self, own: OwnBooks, redis: Redis, chores: Chores, tmp_path: Path) -> None:
        """Guarantee: every lost call is entered once, Redis is right, an old month is in one file."""
        january = datetime(2026, 1, 5, tzinfo=UTC)
        old = own.books.entry(request_id_at(january), started_ms=int(january.timestamp() * 1000))
        await partitions.make_for(own.books.run, [old.request_id])
        await own.books.run(SETTLE, *settle_arguments([old]))
        workers = [worker_of(own, redis, archive_dir=tmp_path, months=2) for _ in range(2)]
        with capture_logs() as logs:
            async with working(*workers):
                for _ in range(5):
                    await chores.mistake_budget()
                    await chores.add_lost_calls(120)
                    await eventually(chores.are_calls_entered, 10)
                    await eventually(chores.is_budget_right, 10)
                await eventually(lambda: [path.suffix for path in tmp_path.iterdir()] == [".gz"], 10)
        assert not [log for log in logs if log["event"] == "metering.round_broke"]
        assert len(await own.books.entries()) == 5 * 120
        assert (await verify(own.database, rerate=False)).drifts == []


class BrokenClock(SystemClock):
    """A bug, as long as it is there."""

    is_broken = True

    def now(self) -> datetime:
        if self.is_broken:
            raise ZeroDivisionError
        return super().now()


class TestActs:
    async def test_a_bug_in_one_act_ends_neither_the_others_nor_itself(
        self, own: OwnBooks, redis: Redis, chores: Chores
    ) -> None:
        clock = BrokenClock()
        with capture_logs() as logs:
            async with working(worker_of(own, redis, clock)):
                await chores.add_lost_calls(2)
                await chores.add_old_minute()
                await eventually(chores.are_calls_entered)
                await eventually(lambda: [log for log in logs if log["event"] == "metering.round_broke"])
                assert not await chores.is_minute_forgotten()
                clock.is_broken = False
                await eventually(chores.is_minute_forgotten)

    async def test_an_archive_that_cannot_be_written_ends_nothing(
        self, own: OwnBooks, redis: Redis, chores: Chores, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        await chores.add_old_minute()
        clock = ManualClock(datetime.now(UTC) + timedelta(days=100))
        with capture_logs() as logs:
            async with working(worker_of(own, redis, clock, archive_dir=tmp_path / "file", months=1)):
                await eventually(lambda: [log for log in logs if log["event"] == "ledger.archive_failed"])
                await chores.add_lost_calls(2)
                await eventually(chores.are_calls_entered)
        assert len(await own.books.entries()) == 3
        assert str(tmp_path / "file") in next(log["error"] for log in logs if log["event"] == "ledger.archive_failed")

    async def test_partitions_are_made_ahead(self, own: OwnBooks, redis: Redis) -> None:
        """Guarantee: a worker that is away for two months does not stop anybody."""
        worker = worker_of(own, redis, ManualClock(datetime(2031, 11, 30, 23, 59, tzinfo=UTC)))
        for _ in range(2):
            await worker.keep_house()
            names = await partitions.partitions(own.books.run)
            assert [name[-7:] for name in names if name > "ledger_entries_2031"] == [
                *("2031_11", "2031_12", "2032_01", "2032_02"),
            ]
        await worker._writer.close()

    async def test_minutes_are_forgotten_after_a_week_and_hours_never(self, own: OwnBooks, redis: Redis) -> None:
        now = datetime.now(UTC)
        moments = [now - timedelta(days=days) for days in (0, 1, 6.9, 7.1, 8, 400)]
        entries = [own.books.entry(request_id_at(at), started_ms=int(at.timestamp() * 1000)) for at in moments]
        await partitions.make_for(own.books.run, [entry.request_id for entry in entries])
        await own.books.run(SETTLE, *settle_arguments(entries))
        worker = worker_of(own, redis)
        await worker.keep_house()
        assert (len(await own.books.windows(60)), len(await own.books.windows(3600))) == (3, 6)
        assert len(await own.books.entries()) == 6
        await worker._writer.close()
