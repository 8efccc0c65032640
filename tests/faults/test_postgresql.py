"""PostgreSQL goes away and comes back: known keys go on while the feed lives, unknown ones are refused, never guessed."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

from core.database import Database
from core.writer import Writer
from tests.faults.conftest import PATH
from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway, config_for
from tests.harness.private_stores import PrivatePostgres, private_postgres, private_redis
from tests.harness.provider import Exchange, FakeProvider, chunk
from tests.harness.raw import RawAnswer, RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant


class Place(NamedTuple):
    """A gateway on a PostgreSQL of its own, with one key that it knows and one that it does not."""

    gateway: Gateway
    postgres: PrivatePostgres
    known: Tenant
    unknown: Tenant


@pytest.fixture(scope="module")
async def standing(
    stores: TestStores, shared_provider: FakeProvider
) -> AsyncIterator[tuple[Gateway, PrivatePostgres, TestStores]]:
    directory = Path(tempfile.mkdtemp(prefix="aap-"))
    async with (
        private_redis(directory) as redis,
        private_postgres(directory, redis.url, stores.pepper) as (postgres, own),
        Gateway(
            own, directory, config_for(shared_provider.base_url).replace("idle_seconds = 3", "idle_seconds = 30")
        ) as gateway,
    ):
        yield gateway, postgres, own
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def place(standing: tuple[Gateway, PrivatePostgres, TestStores], provider: FakeProvider) -> AsyncIterator[Place]:
    gateway, postgres, own = standing
    database = Database(own.database_url, connections_max=1)
    known, unknown = [await new_tenant(database, own.pepper) for _ in range(2)]
    await database.close()
    assert (await _ask(gateway, known)).status == 200
    yield Place(gateway, postgres, known, unknown)
    await postgres.start()
    await eventually(lambda: _is_ready(gateway), 20)


async def _ask(gateway: Gateway, tenant: Tenant) -> RawAnswer:
    return await asyncio.wait_for(call(gateway.port, post(PATH, tenant.key, chat())), 40)


async def _is_ready(gateway: Gateway) -> bool:
    return (await call(gateway.port, b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")).status == 200


async def _works(gateway: Gateway, tenant: Tenant) -> bool:
    return (await _ask(gateway, tenant)).status == 200


class TestStopped:
    async def test_nothing_is_served_that_cannot_be_recorded_and_it_recovers_by_itself(
        self, place: Place, provider: FakeProvider
    ) -> None:
        """Guarantee: a key that is known does not help; after two seconds the provider is not asked any more."""
        gateway = place.gateway
        await place.postgres.stop()
        started = time.monotonic()
        got = await _ask(gateway, place.known)
        assert (got.status, got.error()["code"]) == (503, "ledger_unavailable")
        assert int(got.headers["retry-after"]) >= 1
        assert time.monotonic() - started < 4
        asked = len(provider.received)
        for _ in range(5):
            assert (await _ask(gateway, place.known)).error()["code"] == "ledger_unavailable"
            got = await _ask(gateway, place.unknown)
            assert (got.status, got.error()["code"]) == (503, "authentication_unavailable")
            assert int(got.headers["retry-after"]) >= 1
        assert len(provider.received) == asked
        assert not await _is_ready(gateway)
        await place.postgres.start()
        await eventually(lambda: _works(gateway, place.unknown), 10)
        await eventually(lambda: _is_ready(gateway), 10)

    async def test_a_stream_that_runs_is_finished_and_entered_when_it_is_back(
        self, place: Place, standing: tuple[Gateway, PrivatePostgres, TestStores], provider: FakeProvider
    ) -> None:
        go_on = asyncio.Event()

        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_events(chunk("a"), end=False)
            await go_on.wait()
            await exchange.send_events(chunk("b"), chunk(finish="stop"), chunk(usage=(3, 4)))

        provider.scripts.append(play)
        connection = await RawConnection.open(place.gateway.port)
        await connection.send(post(PATH, place.known.key, chat(stream=True)))
        await connection.head()
        await place.postgres.stop()
        go_on.set()
        read = b""
        while piece := await connection.chunk():
            read += piece
        assert read.endswith(b"data: [DONE]\n\n")
        connection.close()
        await place.postgres.start()
        writer = Writer(standing[2].database_url, statement_seconds_max=5)

        async def entered() -> list[int]:
            rows = await writer.fetch(
                "SELECT input_tokens, output_tokens FROM ledger_entries WHERE organization_id = $1 AND quality = 'exact'"
                " AND outcome = 'done' AND output_tokens = 4",
                place.known.organization_id,
            )
            return [row[0] for row in rows]

        assert await eventually(entered, 20) == [3]
        await writer.close()

    async def test_every_answer_during_a_crash_and_its_recovery_is_200_or_503(
        self, place: Place, standing: tuple[Gateway, PrivatePostgres, TestStores]
    ) -> None:
        """Guarantee: whatever PostgreSQL says while it dies and recovers, no caller reads a 500."""
        gateway = place.gateway
        database = Database(standing[2].database_url, connections_max=1)
        strangers = [await new_tenant(database, standing[2].pepper) for _ in range(90)]
        await database.close()
        statuses: list[int] = []
        for number, stranger in enumerate(strangers):
            if number % 30 == 0:
                place.postgres.crash()
            statuses.append((await _ask(gateway, stranger)).status)
            await moment(0.02)
        assert set(statuses) == {200, 503}
        await eventually(lambda: _works(gateway, place.unknown), 10)
        assert '"call.broke"' not in gateway.log
        assert '"request.broke"' not in gateway.log

    async def test_a_gateway_starts_while_it_is_down_and_finds_it_later(
        self, place: Place, standing: tuple[Gateway, PrivatePostgres, TestStores], provider: FakeProvider, workdir: Path
    ) -> None:
        await place.postgres.stop()
        async with Gateway(standing[2], workdir, config_for(provider.base_url)) as late:
            got = await _ask(late, place.known)
            assert (got.status, got.error()["code"]) == (503, "authentication_unavailable")
            assert not await _is_ready(late)
            await place.postgres.start()
            await eventually(lambda: _works(late, place.known), 10)


class TestFrozen:
    async def test_a_silent_postgresql_is_given_up_in_bounded_time(self, place: Place) -> None:
        gateway = place.gateway
        place.postgres.freeze()
        try:
            started = time.monotonic()
            refused = asyncio.create_task(_ask(gateway, place.unknown))
            for allowed_seconds in (4, 1, 1, 1):
                at = time.monotonic()
                assert (await _ask(gateway, place.known)).error()["code"] == "ledger_unavailable"
                assert time.monotonic() - at < allowed_seconds
            got = await refused
            assert (got.status, got.error()["code"]) == (503, "authentication_unavailable")
            assert time.monotonic() - started < 12
        finally:
            place.postgres.thaw()
        await eventually(lambda: _works(gateway, place.unknown), 20)
