"""An organization that reads too much: what it takes from others, which is nothing, and what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import warnings
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest
from litestar.exceptions import LitestarDeprecationWarning
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from structlog.testing import capture_logs

from core.clock import ManualClock
from core.database import Database
from core.log_writer import LogWriter
from core.settings import load
from gateway.app import Application
from gateway.http1.connection import ServerConnection
from gateway.http1.listener import Listener
from gateway.routes.places import ShareTaken
from gateway.routes.reading import CONNECTIONS_MAX, EXPORT_SECONDS_MAX, Reading
from gateway.runtime import Runtime, running
from keys.lifecycle import NewKey
from keys.scopes import ADMIN_SCOPES
from metering.entry_pages import EntryFilter
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway, config_for, free_port
from tests.harness.provider import FakeProvider
from tests.harness.raw import RawAnswer, RawConnection, call
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant
from tests.harness.usage_rows import add_entries, make_month

NOON = datetime(2026, 2, 28, 12, tzinfo=UTC)
USAGE = "/v1/organization/usage/completions?start_time=1772409600"
LIST = "/v1/organization/ledger_entries"
EXPORT = f"{LIST}/export?format=jsonl&start_time=0&end_time=9999999999"
NOTHING = f"{LIST}/export?start_time=0&end_time=1"
FLOOD = 40
# What one organization may have: places, and requests that wait for one.
RUNNING = 2
WAITING = 16
ENTRIES = 60_000


@pytest.fixture
async def admins(database: Database, stores: TestStores) -> list[Tenant]:
    """The keys to the books of some organizations."""
    return [await new_admin(database, stores) for _ in range(4)]


async def new_admin(database: Database, stores: TestStores) -> Tenant:
    return await new_tenant(database, stores.pepper, NewKey(name="admin", scopes=ADMIN_SCOPES))


class Lock:
    def __init__(self, connection: asyncpg.Connection, table: str) -> None:
        self._connection = connection
        self._table = table

    async def is_waited_for_by(self, count: int) -> bool:
        """Whether that many statements wait for it."""
        return count == await self._connection.fetchval(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = $1::regclass", self._table
        )

    async def release(self) -> None:
        await self._connection.close()


@contextlib.asynccontextmanager
async def locked(stores: TestStores, table: str) -> AsyncIterator[Lock]:
    """A table that nobody else can read until `release`."""
    connection = await asyncpg.connect(stores.database_url)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
    lock = Lock(connection, table)
    try:
        yield lock
    finally:
        await lock.release()


async def ask(port: int, key: str, target: str) -> RawAnswer:
    return await call(port, request(key, target))


def request(key: str, target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n\r\n".encode()


async def stalled(port: int, key: str, target: str) -> RawConnection:
    """A caller who has read the head of a file, and nothing behind it."""
    connection = RawConnection(*await asyncio.open_connection("127.0.0.1", port, limit=2**16))
    await connection.send(request(key, target))
    assert (await connection.head())[0] == 200
    return connection


class TestAFlood:
    async def test_takes_nothing_from_keys_from_readiness_and_from_another_organization(
        self, gateway: Gateway, stores: TestStores, database: Database, admins: list[Tenant], tenant: Tenant
    ) -> None:
        flooding, other, *_ = admins
        assert (await ask(gateway.port, other.key, LIST)).status == 200
        async with locked(stores, "spend_windows") as lock:
            flood = [asyncio.create_task(ask(gateway.port, flooding.key, USAGE)) for _ in range(FLOOD)]
            await eventually(lambda: sum(task.done() for task in flood) >= FLOOD - RUNNING - WAITING)
            also = asyncio.create_task(ask(gateway.port, other.key, USAGE))
            await eventually(lambda: lock.is_waited_for_by(RUNNING + 1))
            for key, target in ((tenant.key, "/v1/models"), (tenant.key, "/readyz"), (other.key, LIST)):
                assert (await asyncio.wait_for(ask(gateway.port, key, target), 3)).status == 200, target
            assert not also.done()
            await lock.release()
            assert (await also).status == 200
        answers = await asyncio.gather(*flood)
        served = [got for got in answers if got.status == 200]
        refused = [got for got in answers if got.status != 200]
        assert len(served) >= RUNNING
        for got in refused:
            assert (got.status, got.error()["code"], got.error()["type"]) == (429, "rate_limit_exceeded", "requests")
            assert got.headers["retry-after"] == "1"
        assert (await ask(gateway.port, flooding.key, USAGE)).status == 200

    async def test_of_several_organizations_leaves_each_its_turn(
        self, gateway: Gateway, stores: TestStores, admins: list[Tenant]
    ) -> None:
        """Guarantee: who finds the process's places taken by others is told so, and not that it asks too much itself."""
        first, second, third, _ = admins
        async with locked(stores, "spend_windows") as lock:
            tasks = [asyncio.create_task(ask(gateway.port, one.key, USAGE)) for one in (first, first, second, second)]
            await eventually(lambda: lock.is_waited_for_by(len(tasks)))
            refused = await ask(gateway.port, third.key, USAGE)
            assert (refused.status, refused.error()["code"], refused.headers["retry-after"]) == (503, "overloaded", "1")
            also = asyncio.create_task(ask(gateway.port, third.key, USAGE))
            await lock.release()
            assert [got.status for got in await asyncio.gather(*tasks, also)] == [200] * 5

    async def test_of_exports_is_bounded_by_itself(
        self, gateway: Gateway, stores: TestStores, database: Database, admins: list[Tenant]
    ) -> None:
        """Guarantee: one for an organization, three in all; pages go on beside them."""
        async with database.transaction() as session:
            await make_month(session, NOON)
        first, second, third, fourth = admins
        async with locked(stores, "ledger_entries") as lock:
            begun = [asyncio.create_task(ask(gateway.port, one.key, NOTHING)) for one in (first, second, third)]
            await eventually(lambda: lock.is_waited_for_by(len(begun)))
            own, full = await asyncio.gather(*(ask(gateway.port, one.key, NOTHING) for one in (first, fourth)))
            assert (await ask(gateway.port, first.key, USAGE)).status == 200
            await lock.release()
            assert [got.status for got in await asyncio.gather(*begun)] == [200] * 3
        assert (own.status, own.error()["code"], own.headers["retry-after"]) == (429, "rate_limit_exceeded", "5")
        assert (full.status, full.error()["code"], full.headers["retry-after"]) == (503, "overloaded", "5")
        assert (await ask(gateway.port, fourth.key, NOTHING)).status == 200

    async def test_with_every_place_taken_leaves_keys_and_readiness_alone(
        self, gateway: Gateway, stores: TestStores, database: Database, admins: list[Tenant], tenant: Tenant
    ) -> None:
        """Guarantee: what reads has connections of its own, as many as it has places."""
        async with database.transaction() as session:
            await make_month(session, NOON)
        async with locked(stores, "spend_windows") as pages, locked(stores, "ledger_entries") as exports:
            reads = [(admin, USAGE) for admin in admins[:2] * RUNNING] + [(admin, NOTHING) for admin in admins[:3]]
            tasks = [asyncio.create_task(ask(gateway.port, admin.key, target)) for admin, target in reads]
            await eventually(lambda: pages.is_waited_for_by(4))
            await eventually(lambda: exports.is_waited_for_by(3))
            for target in ("/v1/models", "/readyz"):
                assert (await asyncio.wait_for(ask(gateway.port, tenant.key, target), 3)).status == 200, target
        assert [got.status for got in await asyncio.gather(*tasks)] == [200] * CONNECTIONS_MAX

    async def test_that_is_none_is_answered_whole(self, gateway: Gateway, admins: list[Tenant]) -> None:
        """Guarantee: a screen that asks for everything at once gets it."""
        asked = [ask(gateway.port, admins[0].key, USAGE) for _ in range(RUNNING + WAITING)]
        assert [got.status for got in await asyncio.gather(*asked)] == [200] * (RUNNING + WAITING)

    async def test_while_postgresql_is_stuck_ends_with_its_statements(
        self, gateway: Gateway, stores: TestStores, admins: list[Tenant]
    ) -> None:
        """Guarantee: who holds places hears of it, and the places are free again."""
        async with locked(stores, "spend_windows"):
            stuck = await asyncio.gather(*(ask(gateway.port, admins[0].key, USAGE) for _ in range(RUNNING)))
            assert [(got.status, got.error()["code"]) for got in stuck] == [(503, "usage_unavailable")] * RUNNING
            assert (await ask(gateway.port, admins[0].key, LIST)).status == 200


async def test_connections_for_reading_cannot_write(stores: TestStores, tenant: Tenant) -> None:
    made = Database(stores.database_url, is_read_only=True)
    change = text("UPDATE organizations SET name = 'x' WHERE id = :id")
    with pytest.raises(DBAPIError, match="read-only transaction"):
        async with made.transaction() as session:
            await session.execute(change, {"id": tenant.organization_id})
    await made.close()


class Served(NamedTuple):
    """A gateway in this process, whose exports go by a clock of ours."""

    port: int
    listener: Listener
    clock: ManualClock
    runtime: Runtime

    async def is_free(self, admin: Tenant) -> bool:
        """Whether the organization may export again."""
        return (await ask(self.port, admin.key, NOTHING)).status == 200

    def connections(self) -> list[ServerConnection]:
        return [one for one in self.listener.state.connections if isinstance(one, ServerConnection)]


@pytest.fixture
async def served(stores: TestStores, shared_provider: FakeProvider, workdir: Path) -> AsyncIterator[Served]:
    port = free_port()
    (workdir / "aap.toml").write_text(config_for(shared_provider.base_url))
    own = {"AAP_PORT": str(port), "AAP_CONFIG": str(workdir / "aap.toml"), "AAP_DATA_DIR": str(workdir)}
    settings = load({**stores.environ(), **own})
    descriptor = os.open(workdir / "log", os.O_WRONLY | os.O_CREAT)
    log = LogWriter(descriptor)
    async with running(settings, log) as runtime:
        clock = ManualClock(datetime.now(UTC))
        await runtime.reading.close()
        reading = Database(stores.database_url, connections_max=CONNECTIONS_MAX, is_read_only=True)
        runtime.reading = Reading(reading, clock)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LitestarDeprecationWarning)  # of what Litestar 3 will want
            application = Application(runtime)
        listener = runtime.listener = Listener(application.dispatch, settings.edge)
        await listener.start()
        yield Served(port, listener, clock, runtime)
        listener.stop_accepting()
        await listener.close()
    log.close()
    os.close(descriptor)


@pytest.fixture(scope="module")
async def large(database: Database, stores: TestStores) -> Tenant:
    """An organization whose ledger is larger than all buffers between here and there."""
    admin = await new_admin(database, stores)
    async with database.transaction() as session:
        await make_month(session, NOON)
        await add_entries(session, admin.organization_id, NOON, ENTRIES)
    return admin


class TestAnExportEnds:
    async def test_whole_within_its_time(self, served: Served, large: Tenant) -> None:
        connection = await stalled(served.port, large.key, EXPORT)
        served.clock.advance(timedelta(seconds=EXPORT_SECONDS_MAX))
        body = await asyncio.wait_for(connection.body({}), 60)
        connection.close()
        assert body.count(b"\n") == ENTRIES

    async def test_cut_off_beyond_it(self, served: Served, large: Tenant) -> None:
        """Guarantee: not as if it were whole, and not as if something were broken."""
        with capture_logs() as lines:
            connection = await stalled(served.port, large.key, EXPORT)
            served.clock.advance(timedelta(seconds=EXPORT_SECONDS_MAX + 1))
            with pytest.raises(asyncio.IncompleteReadError):
                await asyncio.wait_for(connection.body({}), 60)
            connection.close()
            await eventually(lambda: served.is_free(large))
        [cut] = [line for line in lines if line["event"] == "export.cut"]
        assert cut["organization_id"] == large.organization_id
        assert "request.broke" not in {line["event"] for line in lines}

    async def test_when_its_reader_takes_nothing_for_a_minute(self, served: Served, large: Tenant) -> None:
        connection = await stalled(served.port, large.key, EXPORT)
        [sending] = await eventually(lambda: [one for one in served.connections() if one.is_blocked])
        sending.check(served.listener.state.now + 30)
        refused = await ask(served.port, large.key, NOTHING)
        assert (refused.status, refused.error()["code"]) == (429, "rate_limit_exceeded")
        sending.check(served.listener.state.now + 61)
        await eventually(lambda: served.is_free(large))
        connection.close()

    async def test_when_its_reader_hangs_up(self, served: Served, large: Tenant) -> None:
        (await stalled(served.port, large.key, EXPORT)).reset()
        await eventually(lambda: served.is_free(large))

    async def test_when_nobody_reads_it(self, served: Served, large: Tenant) -> None:
        """Guarantee: also an answer that was begun and never sent gives its place back."""
        reading, query = served.runtime.reading, EntryFilter()
        pieces = reading.export(query, organization_id=large.organization_id, form="csv")
        assert await anext(pieces)
        with pytest.raises(ShareTaken):
            await anext(reading.export(query, organization_id=large.organization_id, form="csv"))
        await pieces.aclose()
        assert await served.is_free(large)
