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
from webhooks.housekeeping import GIVE_UP, give_up_on_disabled
from webhooks.lanes import IN_FLIGHT_MAX
from webhooks.recording import ORGANIZATION_UNWRITTEN_MAX, UNWRITTEN_MAX
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
    attempts = "SELECT count(*) AS n FROM webhook_attempts WHERE organization_id = $1"

    async def are_written(organization_id: str, count: int) -> bool:
        return (await sql(own, attempts, organization_id))[0].n == count

    holding = held(own, _DELIVERIES, mine.id)
    await holding.__aenter__()
    async with worker(own.url) as made:
        ids = await publish_many(own.database, [other] * 200)
        await eventually(lambda: held_event in receiver.counts)
        await eventually(lambda: are_written(other, len(ids)))
        assert await are_written(own.organization_id, 0)
        await holding.__aexit__(None, None, None)
        await eventually(lambda: are_written(own.organization_id, 1))
        await eventually(lambda: not len(made._records))
    assert set(receiver.counts.values()) == {1}


async def test_an_organization_whose_deliveries_are_all_held_stops_nobody_else(own: Own, receiver: Sink) -> None:
    other = await own.new_organization()
    receiver.keeps = False
    for number in range(20):
        await new_endpoint(own.database, receiver.url(f"/{number}"), own.organization_id)
    await new_endpoint(own.database, receiver.url("/other"), other)
    await publish_many(own.database, [own.organization_id] * 300)
    await fan_out(own)
    holding = held(own, "SELECT 1 FROM webhook_deliveries FOR UPDATE")
    await holding.__aenter__()
    async with worker(own.url) as made:
        await eventually(lambda: len(made._records) >= ORGANIZATION_UNWRITTEN_MAX)
        theirs = await publish_many(own.database, [other] * 100)
        await eventually(lambda: all(one in receiver.counts for one in theirs))
        # What was under way when the bound was reached.
        mine = sum(receiver.counts.values()) - len(theirs)
        assert mine <= ORGANIZATION_UNWRITTEN_MAX + ORGANIZATION_MAX
        await holding.__aexit__(None, None, None)
        await eventually(lambda: sum(receiver.counts.values()) == 20 * 300 + len(theirs), 30)


async def test_what_is_held_at_a_stop_is_written_while_there_is_time(own: Own, receiver: Sink) -> None:
    """Guarantee: and what is not held is written, whatever comes before it."""
    other = await own.new_organization()
    mine, _ = await new_endpoint(own.database, receiver.url("/mine"), own.organization_id)
    await new_endpoint(own.database, receiver.url("/other"), other)
    receiver.answers.update({"/mine": lambda _: None, "/other": lambda _: None})
    await publish_many(own.database, [own.organization_id, other])
    await fan_out(own)
    async with held(own, _DELIVERIES, mine.id):
        stopping = worker(own.url, pace=Pace(drain_seconds=3.0))
        await stopping.__aenter__()
        await eventually(lambda: receiver.waiting["/mine"] and receiver.waiting["/other"])
        stop = asyncio.create_task(stopping.__aexit__(None, None, None))
        receiver.answer_late("/mine", status(200))
        await moment(0.5)
        receiver.answer_late("/other", status(200))
        await eventually(lambda: sql(own, "SELECT 1 FROM webhook_deliveries WHERE state = 'succeeded'"))
        assert not stop.done()
    await stop
    rows = await sql(own, "SELECT state, attempts FROM webhook_deliveries")
    assert [tuple(row) for row in rows] == [("succeeded", 1)] * 2


async def test_no_more_is_sent_than_may_go_unwritten(own: Own, receiver: Sink) -> None:
    """Guarantee: what has no record of having been sent is bounded, in memory and in duplicates after a kill."""
    organizations = [await own.new_organization() for _ in range(10)]
    receiver.keeps = False
    for place, organization in enumerate(organizations):
        await new_endpoint(own.database, receiver.url(f"/{place}"), organization)
    await publish_many(own.database, organizations * 800)
    await fan_out(own)
    holding = held(own, "LOCK TABLE webhook_attempts IN ACCESS EXCLUSIVE MODE")
    await holding.__aenter__()
    async with worker(own.url) as made:
        await eventually(lambda: len(made._records) >= UNWRITTEN_MAX, 20)
        await moment(1.0)
        # What was under way when the bound was reached.
        assert sum(receiver.counts.values()) <= UNWRITTEN_MAX + len(organizations) * IN_FLIGHT_MAX
        await holding.__aexit__(None, None, None)
        await eventually(lambda: sum(receiver.counts.values()) == 10 * 800, 30)


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


async def test_what_is_held_is_not_waited_for_to_be_given_up(own: Own) -> None:
    first, second = [
        (await new_endpoint(own.database, f"http://127.0.0.1:9/{one}", own.organization_id))[0] for one in "ab"
    ]
    await publish_many(own.database, [own.organization_id] * 5)
    await fan_out(own)
    for one in (first, second):
        async with own.database.transaction() as session:
            await disable_endpoint(session, one.id, SEALER, organization_id=own.organization_id)
    async with held(own, _DELIVERIES, first.id):
        assert await asyncio.wait_for(give_up_on_disabled(own.database), 5) == 5
    async with held(own, _ENDPOINT, first.id):
        assert await asyncio.wait_for(give_up_on_disabled(own.database), 5) == 0
    assert await give_up_on_disabled(own.database) == 5


async def test_what_is_recovered_is_not_given_up(own: Own) -> None:
    """Guarantee: who enables an endpoint while its deliveries are being given up waits until that is done."""
    view, _ = await new_endpoint(own.database, "http://127.0.0.1:9/", own.organization_id)
    since = datetime.now(UTC) - timedelta(minutes=1)
    await publish_many(own.database, [own.organization_id] * 5)
    await fan_out(own)
    async with own.database.transaction() as session:
        await disable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)

    async def enable() -> None:
        async with own.database.transaction() as session:
            await enable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)

    async with held(own, GIVE_UP, 1):
        enabling = asyncio.create_task(enable())
        await eventually(lambda: sql(own, "SELECT 1 FROM pg_locks WHERE NOT granted"))
        assert not enabling.done()
    await enabling
    async with own.database.transaction() as session:
        assert await recover(session, view.id, since, organization_id=own.organization_id, is_dry_run=False) == 5
    assert await give_up_on_disabled(own.database) == 0


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


async def test_endpoints_that_are_held_do_not_stop_the_verdicts_of_others(own: Own, receiver: Sink) -> None:
    """Guarantee: whatever number of rows is held."""
    other = await own.new_organization()
    receiver.answers = {path: lambda _: None for path in ["/other", *(f"/{number}" for number in range(25))]}
    for number in range(25):
        await new_endpoint(own.database, receiver.url(f"/{number}"), own.organization_id)
    last, _ = await new_endpoint(own.database, receiver.url("/other"), other)
    gone = "SELECT 1 FROM webhook_endpoints WHERE id = $1 AND disabled_reason = 'gone'"
    async with worker(own.url):
        await publish_many(own.database, [own.organization_id, other])
        await eventually(lambda: all(receiver.waiting[path] for path in receiver.answers))
        mine = "SELECT 1 FROM webhook_endpoints WHERE organization_id = $1 FOR UPDATE"
        async with held(own, mine, own.organization_id):
            for path in receiver.answers:
                receiver.answer_late(path, status(410))
            await eventually(lambda: sql(own, gone, last.id), 10)
