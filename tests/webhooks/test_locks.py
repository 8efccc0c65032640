"""What somebody holds in PostgreSQL, a replay, a migration or a psql, holds up nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from core.plain_sql import fetch
from tests.harness.eventually import eventually, moment
from tests.harness.webhook_place import POLICY, SEALER, new_endpoint, publish_many, worker
from tests.harness.webhook_sink import Sink, status
from tests.webhooks.conftest import Own
from webhooks.dispatch import ORGANIZATION_MAX
from webhooks.endpoints import EndpointChange, disable_endpoint, enable_endpoint, update_endpoint
from webhooks.fan_out import FanOut
from webhooks.housekeeping import give_up_on_disabled
from webhooks.recording import UNWRITTEN_MAX
from webhooks.resend import Replay, recover, replay
from webhooks.worker_parts import Pace

_TABLE = "LOCK TABLE webhook_deliveries IN ACCESS EXCLUSIVE MODE"
_DELIVERIES = "SELECT 1 FROM webhook_deliveries WHERE endpoint_id = $1 FOR UPDATE"
_ENDPOINT = "SELECT 1 FROM webhook_endpoints WHERE id = $1 FOR UPDATE"


async def sql(own: Own, statement: str, *arguments: object) -> list[Any]:
    async with own.database.transaction() as session:
        return await fetch(session, statement, *arguments)


@asynccontextmanager
async def held(own: Own, statement: str, *arguments: object) -> AsyncGenerator[None]:
    """Somebody has run *statement*, and does not commit."""
    connection = await asyncpg.connect(own.url)
    transaction = connection.transaction()
    await transaction.start()
    await connection.fetch(statement, *arguments)
    try:
        yield
    finally:
        await transaction.rollback()
        await connection.close()


async def fan_out(own: Own) -> None:
    while (await FanOut(own.database).once()).has_more:
        pass


async def test_attempts_of_others_are_written_while_a_delivery_is_held(own: Own, receiver: Sink) -> None:
    """Guarantee: one organization's replay does not have everybody's deliveries sent again after a kill."""
    other = await own.new_organization()
    mine, _ = await new_endpoint(own.database, receiver.url("/mine"), own.organization_id)
    await new_endpoint(own.database, receiver.url("/other"), other)
    (held_event,) = await publish_many(own.database, [own.organization_id])
    await fan_out(own)
    theirs = "SELECT count(*) AS n FROM webhook_attempts WHERE organization_id = $1"
    async with worker(own.url) as made:
        async with held(own, _DELIVERIES, mine.id):
            ids = await publish_many(own.database, [other] * 200)
            await eventually(lambda: held_event in receiver.counts)

            async def are_written() -> bool:
                return (await sql(own, theirs, other))[0].n == len(ids)

            await eventually(are_written)
            assert (await sql(own, theirs, own.organization_id))[0].n == 0
        await eventually(lambda: sql(own, f"{theirs} HAVING count(*) = 1", own.organization_id))
        await eventually(lambda: not len(made._records))
    assert set(receiver.counts.values()) == {1}


async def test_what_is_held_at_a_stop_is_written_while_there_is_time(own: Own, receiver: Sink) -> None:
    mine, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id])
    await fan_out(own)
    stopping = worker(own.url)
    await stopping.__aenter__()
    async with held(own, _DELIVERIES, mine.id):
        await eventually(lambda: receiver.counts)
        stop = asyncio.create_task(stopping.__aexit__(None, None, None))
        await moment(1.0)
        assert not stop.done()
    await stop
    (row,) = await sql(own, "SELECT state, attempts FROM webhook_deliveries")
    assert tuple(row) == ("succeeded", 1)


async def test_no_more_is_sent_than_may_go_unwritten(own: Own, receiver: Sink) -> None:
    """Guarantee: what has no record of having been sent is bounded, in memory and in duplicates after a kill."""
    for number in range(20):
        await new_endpoint(own.database, receiver.url(f"/{number}"), own.organization_id)
    receiver.keeps = False
    await publish_many(own.database, [own.organization_id] * 400)
    await fan_out(own)
    async with worker(own.url) as made:
        async with held(own, "LOCK TABLE webhook_attempts IN ACCESS EXCLUSIVE MODE"):
            await eventually(lambda: made._records.is_full, 20)
            await moment(1.0)
            # What was under way when the bound was reached.
            assert sum(receiver.counts.values()) <= UNWRITTEN_MAX + ORGANIZATION_MAX
        await eventually(lambda: sum(receiver.counts.values()) == 20 * 400, 30)


async def test_an_endpoint_whose_deliveries_are_held_leaves_room_for_the_others(own: Own, receiver: Sink) -> None:
    mine, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    receiver.keeps = False
    await publish_many(own.database, [own.organization_id] * 2_000)
    await fan_out(own)
    async with worker(own.url) as made:
        async with held(own, _DELIVERIES, mine.id):
            await eventually(lambda: len(made._records) >= 256)
            await moment(0.5)
            assert len(made._records) < 400
        await eventually(lambda: len(receiver.counts) == 2_000, 20)


async def test_what_was_taken_while_it_was_looked_for_is_not_sent_again(own: Own) -> None:
    now = datetime.now(UTC)
    view, _ = await new_endpoint(own.database, "http://127.0.0.1:9/", own.organization_id)
    await publish_many(own.database, [own.organization_id] * 3)
    await fan_out(own)

    async def act(kind: str) -> int:
        since = now - timedelta(minutes=1)
        async with own.database.transaction() as session:
            if kind == "recover":
                return await recover(session, view.id, since, organization_id=own.organization_id, is_dry_run=False)
            chosen = Replay(since=since, state="pending")
            return await replay(session, view.id, chosen, organization_id=own.organization_id, is_dry_run=False)

    for count, kind in ((2, "recover"), (1, "replay")):
        async with held(own, _ENDPOINT, view.id):
            acting = asyncio.create_task(act(kind))
            await eventually(lambda: sql(own, "SELECT 1 FROM pg_locks WHERE NOT granted"))
            taken = "UPDATE webhook_deliveries SET state = 'succeeded' WHERE id IN (SELECT min(id)"
            await sql(own, f"{taken} FROM webhook_deliveries WHERE state = 'pending')")
        assert await acting == count
    states = await sql(own, "SELECT state FROM webhook_deliveries ORDER BY 1")
    assert [row.state for row in states] == ["pending", "succeeded", "succeeded"]


async def test_what_is_recovered_is_not_given_up(own: Own) -> None:
    first, _ = await new_endpoint(own.database, "http://127.0.0.1:9/a", own.organization_id)
    second, _ = await new_endpoint(own.database, "http://127.0.0.1:9/b", own.organization_id)
    since = datetime.now(UTC) - timedelta(minutes=1)
    await publish_many(own.database, [own.organization_id] * 5)
    await fan_out(own)
    for one in (first, second):
        async with own.database.transaction() as session:
            await disable_endpoint(session, one.id, SEALER, organization_id=own.organization_id)
    async with held(own, _DELIVERIES, first.id):
        giving_up = asyncio.create_task(give_up_on_disabled(own.database))
        async with own.database.transaction() as session:
            await enable_endpoint(session, second.id, SEALER, organization_id=own.organization_id)
        async with own.database.transaction() as session:
            assert await recover(session, second.id, since, organization_id=own.organization_id, is_dry_run=False) == 5
    await giving_up
    await give_up_on_disabled(own.database)
    rows = await sql(own, "SELECT DISTINCT endpoint_id, state FROM webhook_deliveries")
    assert {tuple(row) for row in rows} == {(first.id, "failed"), (second.id, "pending")}


async def test_a_stop_hands_over_whatever_row_is_held(own: Own, receiver: Sink) -> None:
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    stopping = worker(own.url)
    await stopping.__aenter__()
    await publish_many(own.database, [own.organization_id])
    await eventually(lambda: receiver.counts)
    async with held(own, _ENDPOINT, view.id):
        await asyncio.wait_for(stopping.__aexit__(None, None, None), 3)
        assert await sql(own, "SELECT 1 FROM webhook_workers") == []
    async with worker(own.url):
        (later,) = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: later in receiver.counts, 3)


async def test_who_was_disabled_is_sent_nothing_while_deliveries_cannot_be_read(own: Own, receiver: Sink) -> None:
    """Guarantee: a VACUUM FULL, or a migration, keeps no worker from hearing of it, nor from being heard of."""
    changed, _ = await new_endpoint(own.database, receiver.url("/changed"), own.organization_id)
    paced, _ = await new_endpoint(own.database, receiver.url("/paced"), own.organization_id, requests_per_second=5)
    async with worker(own.url, pace=Pace(beat_seconds=0.1, lease_seconds=2.0, drain_seconds=0.5)):
        await publish_many(own.database, [own.organization_id] * 60)
        await eventually(lambda: len(receiver.arrivals["/paced"]) >= 3)
        await eventually(lambda: len(receiver.arrivals["/changed"]) == 60)
        async with held(own, _TABLE):
            # Somebody's read waits by now.
            await eventually(lambda: sql(own, "SELECT 1 FROM pg_locks WHERE NOT granted"))
            async with own.database.transaction() as session:
                change = EndpointChange(description="changed")
                await update_endpoint(session, changed.id, change, POLICY, SEALER, organization_id=own.organization_id)
            async with own.database.transaction() as session:
                await disable_endpoint(session, paced.id, SEALER, organization_id=own.organization_id)
            await moment(0.5)
            sent = len(receiver.arrivals["/paced"])
            await moment(2.0)
            assert len(receiver.arrivals["/paced"]) == sent
            (row,) = await sql(own, "SELECT seen_at > now() - interval '1 second' AS is_heard FROM webhook_workers")
            assert row.is_heard


async def test_a_held_endpoint_holds_up_no_other_verdict(own: Own, receiver: Sink) -> None:
    first, second = [
        (await new_endpoint(own.database, receiver.url(path), own.organization_id))[0] for path in ("/a", "/b")
    ]
    receiver.answers.update({"/a": lambda _: None, "/b": lambda _: None})
    gone = "SELECT 1 FROM webhook_endpoints WHERE id = $1 AND disabled_reason = 'gone'"
    async with worker(own.url):
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.arrivals["/a"] and receiver.arrivals["/b"])
        async with held(own, _ENDPOINT, first.id):
            for path in ("/a", "/b"):
                receiver.answer_late(path, status(410))
            await eventually(lambda: sql(own, gone, second.id))
            assert await sql(own, gone, first.id) == []
        await eventually(lambda: sql(own, gone, first.id))
