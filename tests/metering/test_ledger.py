"""The gateway's side of the ledger: durable before anybody is told so, and nothing forgotten when PostgreSQL is gone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from core.clock import SystemClock
from core.database import driver_url
from core.ids import GatewayId, id_range_start, new_id
from core.writer import Writer
from metering import partitions
from metering.entries import Entry
from metering.errors import LedgerUnavailable
from metering.ledger import INTENT_SECONDS_MAX, Ledger
from tests.harness.eventually import eventually
from tests.harness.private_stores import PrivatePostgres, private_postgres
from tests.harness.stores import TestStores
from tests.metering.conftest import Books

_HANG_UP = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'aap-ledger'"


async def connected(url: str) -> Any:
    """A connection that writes, whatever the database says."""
    settings = {"default_transaction_read_only": "off"}
    return await cast("Any", asyncpg).connect(driver_url(url), server_settings=settings)


async def test_an_intent_is_there_when_its_future_says_so(books: Books, ledger: Ledger) -> None:
    intents = [books.intent() for _ in range(50)]
    await asyncio.gather(*(ledger.intend(intent) for intent in intents))
    assert {row["request_id"] for row in await books.intents()} == {intent.request_id for intent in intents}


async def test_an_entry_comes_behind_its_intent_however_soon_it_is_settled(books: Books, ledger: Ledger) -> None:
    for _ in range(30):
        intent = books.intent()
        ledger.settle(books.entry(intent.request_id), ledger.intend(intent))
    await eventually(lambda: _entered(books, 30))
    assert await books.intents() == []


async def _entered(books: Books, count: int) -> bool:
    return len(await books.entries()) == count


async def test_closing_writes_what_is_left(books: Books, stores: TestStores) -> None:
    ledger = Ledger(stores.database_url, GatewayId(new_id("gw")), SystemClock(), observed=lambda: ([], []))
    await ledger.start()
    for _ in range(2_000):
        ledger.settle(books.entry(), None)
    await ledger.close()
    assert len(await books.entries()) == 2_000


async def test_a_row_that_postgresql_refuses_stops_no_other(books: Books, ledger: Ledger) -> None:
    good = [books.entry() for _ in range(20)]
    bad: Entry = books.entry(cost=2**70)
    for entry in (*good[:10], bad, *good[10:]):
        ledger.settle(entry, None)
    await eventually(lambda: _entered(books, 20))
    await eventually(lambda: ledger.refused_rows == 1)


async def test_a_missing_month_is_made(books: Books, ledger: Ledger) -> None:
    moment = SystemClock().now().replace(year=2033)
    ledger.settle(books.entry(id_range_start("req", moment) + "0" * 16), None)
    await eventually(lambda: _entered(books, 1))
    assert f"ledger_entries_{moment:%Y_%m}" in await partitions.partitions(books.run)


async def test_checkpoints_write_down_what_live_calls_have_brought(books: Books, stores: TestStores) -> None:
    intents = sorted((books.intent() for _ in range(3)), key=lambda intent: intent.request_id)
    live = ([intent.request_id for intent in intents], [7, 8, 9])
    gateway_id = GatewayId(new_id("gw"))
    ledger = Ledger(stores.database_url, gateway_id, SystemClock(), observed=lambda: live)
    await ledger.start()
    await asyncio.gather(*(ledger.intend(intent) for intent in intents))

    async def seen() -> bool:
        return [row["observed_output_tokens"] for row in await books.intents()] == [7, 8, 9]

    await eventually(seen, 6)
    [[leases]] = await books.run("SELECT count(*) FROM gateway_leases WHERE gateway_id = $1", gateway_id)
    assert leases == 1
    await ledger.close()
    [[leases]] = await books.run("SELECT count(*) FROM gateway_leases WHERE gateway_id = $1", gateway_id)
    assert leases == 0


class TestPostgresqlDown:
    @pytest.fixture
    async def postgres(self, workdir: Path, stores: TestStores) -> object:
        async with private_postgres(workdir, stores.redis_url, stores.pepper) as (server, own):
            yield server, own

    async def started(self, own: TestStores) -> Ledger:
        ledger = Ledger(own.database_url, GatewayId(new_id("gw")), SystemClock(), observed=lambda: ([], []))
        await ledger.start()
        return ledger

    async def test_after_two_seconds_nothing_is_admitted_and_what_had_ended_is_entered_later(
        self, postgres: tuple[PrivatePostgres, TestStores], books: Books
    ) -> None:
        server, own = postgres
        ledger = await self.started(own)
        await ledger.intend(books.intent())
        await server.stop()
        began = time.monotonic()
        durable = ledger.intend(books.intent())
        ended = [books.entry() for _ in range(700)]
        for entry in ended:
            ledger.settle(entry, None)
        with pytest.raises(LedgerUnavailable):
            await durable
        assert time.monotonic() - began < INTENT_SECONDS_MAX + 1
        with pytest.raises(LedgerUnavailable):
            ledger.intend(books.intent())
        await server.start()
        await eventually(lambda: ledger.undurable_seconds == 0, 20)
        await ledger.intend(books.intent())
        await eventually(lambda: ledger.entries_waiting == 0, 10)
        writer = Writer(own.database_url, statement_seconds_max=5)
        [[count]] = await writer.fetch("SELECT count(*) FROM ledger_entries")
        assert count == len(ended)
        await writer.close()
        await ledger.close()

    async def test_a_silent_postgresql_is_as_good_as_none(
        self, postgres: tuple[PrivatePostgres, TestStores], books: Books
    ) -> None:
        server, own = postgres
        ledger = await self.started(own)
        server.freeze()
        try:
            began = time.monotonic()
            with pytest.raises(LedgerUnavailable):
                await ledger.intend(books.intent())
            assert time.monotonic() - began < INTENT_SECONDS_MAX + 1
            with pytest.raises(LedgerUnavailable):
                ledger.intend(books.intent())
        finally:
            server.thaw()
        await eventually(lambda: ledger.undurable_seconds == 0, 20)
        await ledger.intend(books.intent())
        await ledger.close()

    async def test_one_that_only_reads_is_not_back(
        self, postgres: tuple[PrivatePostgres, TestStores], books: Books
    ) -> None:
        """Guarantee: nobody waits two seconds for what is known not to be written."""
        _, own = postgres
        ledger = await self.started(own)
        await ledger.intend(books.intent())
        operator = await connected(own.database_url)
        try:
            await operator.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
            await operator.execute(_HANG_UP)
            with pytest.raises(LedgerUnavailable):
                await ledger.intend(books.intent())
            tries = ledger.failures
            await eventually(lambda: ledger.failures > tries + 2, 10)
            with pytest.raises(LedgerUnavailable):
                ledger.intend(books.intent())
            await operator.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
            await operator.execute(_HANG_UP)
        finally:
            await operator.close()
        await eventually(lambda: ledger.undurable_seconds == 0, 10)
        await ledger.intend(books.intent())
        await ledger.close()


async def test_a_statement_that_was_cancelled_leaves_no_broken_connection(stores: TestStores) -> None:
    writer = Writer(stores.database_url, statement_seconds_max=0.2)
    with pytest.raises(TimeoutError):
        await writer.fetch("SELECT pg_sleep(5)")
    assert (await writer.fetch("SELECT 1"))[0][0] == 1
    with pytest.raises(asyncpg.PostgresError):
        await writer.fetch("SELECT nonsense")
    assert (await writer.fetch("SELECT 1"))[0][0] == 1
    await writer.close()
