"""At least once, whoever dies: workers that are killed at random, and a PostgreSQL that is restarted under them."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from core.database import DOWN, Database
from core.ids import OrganizationId
from core.plain_sql import fetch
from tests.harness.eventually import eventually, moment
from tests.harness.private_stores import PrivatePostgres, private_postgres
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant
from tests.harness.webhook_place import WorkerProcess, new_endpoint, publish_many
from tests.harness.webhook_sink import Arrival, Sink

IS_FULL = os.environ.get("AAP_TEST_SCALE") == "full"
EVENTS = 100_000 if IS_FULL else 6_000
ORGANIZATIONS, ENDPOINTS_EACH, WORKERS = 10, 2, 2
_BATCH = 250


class Private(NamedTuple):
    postgres: PrivatePostgres
    stores: TestStores
    database: Database
    organizations: list[OrganizationId]


@pytest.fixture
async def private(workdir: Path, stores: TestStores, receiver: Sink) -> AsyncIterator[Private]:
    """A PostgreSQL that the test may hurt, with organizations and their endpoints."""
    async with private_postgres(workdir, stores.redis_url, stores.pepper) as (postgres, mine):
        database = Database(mine.database_url)
        organizations = [(await new_tenant(database, mine.pepper)).organization_id for _ in range(ORGANIZATIONS)]
        for number, organization_id in enumerate(organizations):
            for one in range(ENDPOINTS_EACH):
                await new_endpoint(database, receiver.url(f"/{number}/{one}"), organization_id)
        yield Private(postgres, mine, database, organizations)
        await database.close()


async def _publish(private: Private, count: int, per_second: int) -> list[str]:
    """Publish *count* events at a pace, more where PostgreSQL went down; return those that it says to have taken."""
    ids: list[str] = []
    started = time.monotonic()
    while len(ids) < count:
        chosen = [private.organizations[(len(ids) + n) % ORGANIZATIONS] for n in range(_BATCH)]
        try:
            ids += await publish_many(private.database, chosen)
        except DOWN:
            await moment(0.2)
        await moment(max(0.0, started + len(ids) / per_second - time.monotonic()))
    return ids


async def _hurt(private: Private, workers: list[WorkerProcess], seed: int, published: asyncio.Task[list[str]]) -> int:
    """Kill workers at random, and restart PostgreSQL now and then, as long as events come; return how often."""
    chosen, hurts = random.Random(seed), 0
    while not published.done():
        await moment(chosen.uniform(0.5, 2.5))
        victim = chosen.choice(workers)
        await victim.kill()
        if hurts % 4 == 1:
            if chosen.random() < 0.5:
                await private.postgres.stop_immediately()
            else:
                await private.postgres.stop()
            await private.postgres.start()
        await victim.start()
        hurts += 1
    return hurts


@pytest.mark.parametrize("seed", range(2 if IS_FULL else 1))
async def test_no_event_is_missed_and_duplicates_have_the_same_id(
    private: Private, receiver: Sink, workdir: Path, seed: int, record_testsuite_property: Callable[[str, object], None]
) -> None:
    receiver.keeps = False
    workers = [WorkerProcess(private.stores, _made(workdir / f"w{number}")) for number in range(WORKERS)]
    for one in workers:
        await one.start()
    published = asyncio.create_task(_publish(private, EVENTS, 1_000))
    hurts = await _hurt(private, workers, seed, published)
    said = await published
    assert hurts >= 2
    # One that went down in the middle of a commit may have taken more than it could say.
    ids = await _happened(private)
    assert ids >= set(said)
    expected = len(ids) * ENDPOINTS_EACH

    def is_whole() -> bool:
        return len(receiver.counts) == len(ids) and sum(receiver.counts.values()) >= expected

    await eventually(is_whole, 120)
    await eventually(lambda: _succeeded(private, expected), 60)
    for one in workers:
        assert await one.stop() == 0
    duplicates = sum(receiver.counts.values()) - expected
    # Each is an attempt that was under way, or not yet written down, when its worker died.
    record_testsuite_property(f"seed {seed}", f"{hurts} kills, {duplicates} duplicates")
    assert receiver.counts.keys() == ids
    assert duplicates <= hurts * 700


async def _happened(private: Private) -> set[str]:
    async with private.database.transaction() as session:
        return {row.id for row in await fetch(session, "SELECT id FROM webhook_events")}


async def _succeeded(private: Private, expected: int) -> bool:
    async with private.database.transaction() as session:
        rows = await fetch(session, "SELECT state, count(*) AS n FROM webhook_deliveries GROUP BY 1")
    return {row.state: row.n for row in rows} == {"succeeded": expected}


async def test_each_endpoint_got_every_event(private: Private, receiver: Sink, workdir: Path) -> None:
    """What `counts` cannot tell apart: one id taken twice by one endpoint and never by the other."""
    taken: dict[str, set[str]] = {}

    def note(arrival: Arrival) -> bytes:
        taken.setdefault(arrival.path, set()).add(arrival.headers["webhook-id"])
        return b"HTTP/1.1 204 x\r\n\r\n"

    for number in range(ORGANIZATIONS):
        for one in range(ENDPOINTS_EACH):
            receiver.answers[f"/{number}/{one}"] = note
    receiver.keeps = False
    first = WorkerProcess(private.stores, _made(workdir / "w"))
    await first.start()
    ids = await _publish(private, 2_000, 4_000)
    await eventually(lambda: sum(map(len, taken.values())) > 100, 20)
    await first.kill()
    await first.start()
    await eventually(lambda: sum(map(len, taken.values())) == len(ids) * ENDPOINTS_EACH, 60)
    assert await first.stop() == 0
    assert set().union(*taken.values()) == set(ids)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory
