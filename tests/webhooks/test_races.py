"""Moments in which a delivery could be forgotten, sent twice without need, or held against an endpoint wrongly."""

from __future__ import annotations

import asyncio
import resource
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.clock import SystemClock
from core.egress import EgressPolicy
from core.ids import id_range_start
from core.plain_sql import fetch
from keys.lifecycle import NewKey
from keys.tenants import create_project
from tests.conftest import PEPPER
from tests.harness.eventually import eventually, moment
from tests.harness.webhook_place import POLICY, SEALER, WorkerProcess, new_endpoint, publish_many, worker
from tests.harness.webhook_sink import Arrival, Sink, status
from tests.webhooks.conftest import Own
from webhooks import key_acts
from webhooks.endpoints import EndpointChange, disable_endpoint, enable_endpoint, get_endpoint, update_endpoint
from webhooks.fan_out import FanOut
from webhooks.housekeeping import delete_old
from webhooks.ownership import TAKEN_AT_ONCE_MAX
from webhooks.resend import Replay, recover, replay, resend
from webhooks.worker_parts import Bounds, Pace


async def sql(own: Own, statement: str, *arguments: object) -> list[Any]:
    async with own.database.transaction() as session:
        return await fetch(session, statement, *arguments)


async def test_who_was_not_heard_of_goes_on_where_it_stopped(own: Own, receiver: Sink) -> None:
    """Guarantee: what is buffered while nothing may be begun is sent once it may, without anything new to fetch."""
    await new_endpoint(own.database, receiver.url(), own.organization_id, requests_per_second=50)
    ids = await publish_many(own.database, [own.organization_id] * 40)
    async with worker(own.url) as made:
        await eventually(lambda: len(receiver.counts) >= 3)
        made._dispatcher._may_begin = lambda _: False
        stopped = len(receiver.counts)
        await moment(0.3)
        assert len(receiver.counts) <= stopped + 2
        made._dispatcher._may_begin = lambda _: True
        await eventually(lambda: receiver.counts.keys() == set(ids))


async def test_a_rest_shorter_than_a_beat_ends_too(own: Own, receiver: Sink) -> None:
    answers = [status(503, more=b"retry-after: 1\r\n")]
    receiver.answers["/hook"] = lambda _: answers.pop() if answers and len(receiver.counts) >= 3 else status(200)
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url, pace=Pace(beat_seconds=30.0, lease_seconds=100.0, drain_seconds=0.5)):
        await publish_many(own.database, [own.organization_id] * 100)
        await eventually(lambda: not answers)
        taken = len(receiver.counts)
        # The next that anybody hears of wakes it.
        await moment(1.1)
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: len(receiver.counts) >= min(taken + 50, 100))


async def test_an_orderly_stop_sends_nothing_twice(own: Own, receiver: Sink) -> None:
    """Guarantee: a worker that finishes what is under way is heard of until then, and nobody sends beside it."""
    held: list[Arrival] = []
    receiver.answers["/slow"] = held.append
    await new_endpoint(own.database, receiver.url("/slow"), own.organization_id)
    pace = Pace(beat_seconds=0.1, lease_seconds=0.6, drain_seconds=3.0)
    stopping = worker(own.url, pace=pace)
    await stopping.__aenter__()
    await publish_many(own.database, [own.organization_id] * 2)
    await eventually(lambda: len(held) == 2)
    async with worker(own.url, pace=msgspec.structs.replace(pace, drain_seconds=0.1)):
        stop = asyncio.create_task(stopping.__aexit__(None, None, None))
        # Several leases later.
        await moment(2.0)
        assert (len(held), stop.done()) == (2, False)
        await stop
        # What had no answer is sent by the other one now.
        await eventually(lambda: len(held) == 4)
    assert len({arrival.headers["webhook-id"] for arrival in held}) == 2


async def test_who_mends_an_endpoint_and_describes_it_is_not_disabled(own: Own, receiver: Sink) -> None:
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    await sql(own, "UPDATE webhook_endpoints SET failing_since = now() - interval '6 days', consecutive_failures = 3")
    slow_beat = Pace(beat_seconds=0.5, drain_seconds=0.5)
    async with worker(own.url, pace=slow_beat) as made:
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.counts)
        await _describe(own, view.id)
        await eventually(lambda: all(not lane.is_unsaved for lane in made._workload.lanes.values()))
        receiver.answers["/hook"] = lambda _: status(500)
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: len(receiver.arrivals["/hook"]) == 2)
        await eventually(lambda: _is_failing(own, view.id))
    async with own.database.transaction() as session:
        found = await get_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
    assert (found.status, found.consecutive_failures) == ("failing", 1)


async def _describe(own: Own, endpoint_id: str) -> None:
    async with own.database.transaction() as session:
        change = EndpointChange(description="mended")
        await update_endpoint(session, endpoint_id, change, POLICY, SEALER, organization_id=own.organization_id)


async def _is_failing(own: Own, endpoint_id: str) -> bool:
    rows = await sql(own, "SELECT failing_since FROM webhook_endpoints WHERE id = $1", endpoint_id)
    return rows[0].failing_since is not None


async def test_another_address_begins_anew(own: Own, receiver: Sink) -> None:
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    await sql(own, "UPDATE webhook_endpoints SET failing_since = now() - interval '4 days', consecutive_failures = 9")
    async with own.database.transaction() as session:
        change = EndpointChange(url=receiver.url("/other"))
        found = await update_endpoint(session, view.id, change, POLICY, SEALER, organization_id=own.organization_id)
    assert (found.status, found.consecutive_failures) == ("enabled", 0)


async def test_what_a_process_bears_is_no_bound_for_who_has_little(own: Own, receiver: Sink) -> None:
    other = await own.new_organization()
    for number in range(10):
        await new_endpoint(own.database, receiver.url(f"/slow{number}"), own.organization_id)
        receiver.answers[f"/slow{number}"] = lambda _: None
    await new_endpoint(own.database, receiver.url("/well"), other)
    async with worker(own.url, bounds=Bounds(process_max=10)) as made:
        await publish_many(own.database, [own.organization_id] * 3)
        await eventually(lambda: made._dispatcher.in_flight == 10)
        await publish_many(own.database, [other] * 30)
        await eventually(lambda: len(receiver.arrivals["/well"]) == 30)
        await eventually(lambda: made._dispatcher.in_flight == 10)


async def test_an_error_of_ours_uses_up_no_attempt_and_is_no_fault_of_the_endpoint(own: Own, receiver: Sink) -> None:
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url, policy_of=_broken):
        await publish_many(own.database, [own.organization_id] * 6)
        await eventually(lambda: _attempted(own, 6))
    rows = await sql(own, "SELECT DISTINCT state, step, last_problem, due_at > now() AS later FROM webhook_deliveries")
    assert [tuple(row) for row in rows] == [("pending", 0, "an error of ours", True)]
    async with own.database.transaction() as session:
        found = await get_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
    assert found.status == "enabled"


def _broken() -> EgressPolicy:
    raise ZeroDivisionError


async def _attempted(own: Own, count: int) -> bool:
    return (await sql(own, "SELECT count(*) AS n FROM webhook_attempts"))[0].n == count


async def test_a_key_that_expires_is_told_once_however_short_events_are_kept(own: Own) -> None:
    now = SystemClock().now()
    async with own.database.transaction() as session:
        project = await create_project(session, "p", organization_id=own.organization_id)
        new = NewKey(name="short", expires_at=now + timedelta(days=1))
        await key_acts.create_key(
            session, new, organization_id=own.organization_id, project_id=project.id, pepper=PEPPER
        )
    for passed in (timedelta(), timedelta(days=0.4)):
        assert await key_acts.tell_expiring(own.database, now + passed) == (0 if passed else 1)
        # The shortest that can be set.
        await delete_old(own.database, timedelta(days=10) - passed)
    rows = await sql(own, "SELECT data::text AS data FROM webhook_events WHERE type = 'key.expiring'")
    assert [msgspec.json.decode(row.data)["name"] for row in rows] == ["short"]


async def test_an_answer_that_is_lost_when_endpoints_are_taken_loses_no_endpoint(own: Own, receiver: Sink) -> None:
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url) as made:
        # As PostgreSQL has it then: the endpoint is this worker's, and it knows nothing of that.
        await sql(own, "UPDATE webhook_endpoints SET worker_id = $1", made._ownership.worker_id)
        ids = await publish_many(own.database, [own.organization_id] * 3)
        await eventually(lambda: receiver.counts.keys() == set(ids))


async def test_whoever_holds_an_endpoints_row_stops_no_worker(own: Own, receiver: Sink) -> None:
    held, _ = await new_endpoint(own.database, receiver.url("/held"), own.organization_id)
    other = await own.new_organization()
    await new_endpoint(own.database, receiver.url("/well"), other)
    async with worker(own.url, pace=Pace(beat_seconds=0.1, lease_seconds=1.0, drain_seconds=0.5)):
        await publish_many(own.database, [own.organization_id, other])
        await eventually(lambda: len(receiver.counts) == 2)
        async with own.database.transaction() as session:
            await fetch(session, "SELECT id FROM webhook_endpoints WHERE id = $1 FOR UPDATE", held.id)
            # Something to write down of it, and longer than a lease.
            await publish_many(own.database, [own.organization_id])
            await moment(2.0)
            (later,) = await publish_many(own.database, [other])
            await eventually(lambda: later in receiver.counts, 2)


async def test_an_answer_from_where_it_was_says_nothing_of_where_it_is(own: Own, receiver: Sink) -> None:
    gone = asyncio.Event()
    view, _ = await new_endpoint(own.database, receiver.url("/old"), own.organization_id)
    receiver.answers["/old"] = lambda _: gone.set()
    async with worker(own.url, pace=Pace(beat_seconds=0.1, drain_seconds=0.5)) as made:
        (event_id,) = await publish_many(own.database, [own.organization_id])
        await asyncio.wait_for(gone.wait(), 5)
        async with own.database.transaction() as session:
            change = EndpointChange(url=receiver.url("/new"))
            await update_endpoint(session, view.id, change, POLICY, SEALER, organization_id=own.organization_id)
        lane = made._workload.lanes[view.id]
        await eventually(lambda: lane.target.url.endswith("/new"))
        receiver.answer_late("/old", status(410))
        await eventually(lambda: _attempted(own, 1))
        await sql(own, "UPDATE webhook_deliveries SET due_at = now() WHERE state = 'pending'")
        await eventually(lambda: receiver.counts[event_id])
    assert [arrival.headers["webhook-id"] for arrival in receiver.arrivals["/new"]] == [event_id]
    async with own.database.transaction() as session:
        found = await get_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
    assert found.status == "enabled"


async def test_an_endpoint_that_comes_back_counts_what_is_still_under_way(own: Own, receiver: Sink) -> None:
    held: list[Arrival] = []
    receiver.answers["/hook"] = held.append
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url, pace=Pace(beat_seconds=0.1, drain_seconds=0.5)) as made:
        await publish_many(own.database, [own.organization_id] * 2)
        await eventually(lambda: len(held) == 2)
        async with own.database.transaction() as session:
            await disable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
        await eventually(lambda: not made._workload.lanes)
        async with own.database.transaction() as session:
            await enable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
            await fetch(session, "UPDATE webhook_deliveries SET state = 'pending', due_at = now()")
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: made._workload.lanes)
        await moment(0.5)
        assert (len(held), made._dispatcher.in_flight) == (2, 2)


async def test_a_replay_finds_what_was_told_since_however_old_it_is(own: Own, receiver: Sink) -> None:
    """A call's event is as old, by its id, as the call's beginning."""
    now = SystemClock().now()
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    event_id = id_range_start("evt", now - timedelta(hours=1)) + "0" * 16
    await sql(
        own,
        "INSERT INTO webhook_events (id, organization_id, type, data) VALUES ($1, $2, 'key.created', '{}')",
        event_id,
        own.organization_id,
    )
    async with worker(own.url):
        await eventually(lambda: sql(own, "SELECT id FROM webhook_deliveries WHERE state = 'succeeded'"))
        async with own.database.transaction() as session:
            chosen = Replay(since=now - timedelta(minutes=1))
            owner = own.organization_id
            assert await replay(session, view.id, chosen, organization_id=owner, is_dry_run=False) == 1
            assert await recover(session, view.id, chosen.since, organization_id=owner, is_dry_run=True) == 1
        await eventually(lambda: receiver.counts[event_id] == 2)


class _Ahead(SystemClock):
    def now(self) -> datetime:
        return super().now() + timedelta(days=60)


async def test_a_worker_whose_clock_is_ahead_deletes_nothing(own: Own, receiver: Sink) -> None:
    receiver.answers["/hook"] = lambda _: status(500)
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url, clock=_Ahead()) as made:
        await publish_many(own.database, [own.organization_id] * 3)
        await eventually(lambda: _attempted(own, 3))
        assert await made.delete_old() == 0
    assert (await sql(own, "SELECT count(*) AS n FROM webhook_deliveries WHERE state = 'pending'"))[0].n == 3


async def test_a_surplus_is_left_once_however_often_it_is_looked_at(own: Own, receiver: Sink) -> None:
    for number in range(20):
        await new_endpoint(own.database, receiver.url(f"/{number}"), own.organization_id)
    pace = Pace(beat_seconds=5.0, lease_seconds=30.0, drain_seconds=0.5)
    async with worker(own.url, pace=pace) as made:
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: sum(receiver.counts.values()) == 20)
        lanes = made._workload.lanes
        await eventually(lambda: not any(lane.busy for lane in lanes.values()))
        await made.keep()
        assert len(lanes) == 20
        # Another worker, with a share of half of them.
        await sql(own, "INSERT INTO webhook_workers (worker_id) VALUES ('whw_other')")
        await made.beat()
        for _ in range(3):
            await made.keep()
            assert len(made._workload) == 10


async def test_what_ends_after_its_delivery_was_given_up_is_counted(own: Own, receiver: Sink) -> None:
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    receiver.answers["/hook"] = lambda _: None
    async with worker(own.url, pace=Pace(tidy_seconds=0.1, drain_seconds=0.5)):
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.waiting["/hook"])
        async with own.database.transaction() as session:
            await disable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
        await eventually(lambda: sql(own, "SELECT 1 FROM webhook_deliveries WHERE state = 'failed'"))
        receiver.answer_late("/hook", status(500))
        await eventually(lambda: _attempted(own, 1))
    (row,) = await sql(own, "SELECT state, attempts, last_status, last_problem FROM webhook_deliveries")
    assert tuple(row) == ("failed", 1, 500, "answered 500")


async def test_how_long_a_first_attempt_was_waited_for_is_counted_from_when_it_was_asked_for(
    own: Own, receiver: Sink
) -> None:
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url) as made:
        (event_id,) = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: sql(own, "SELECT 1 FROM webhook_deliveries WHERE state = 'succeeded'"))
        await sql(own, "UPDATE webhook_events SET created_at = now() - interval '3 days'")
        (row,) = await sql(own, "SELECT id FROM webhook_deliveries")
        async with own.database.transaction() as session:
            await resend(session, row.id, organization_id=own.organization_id)
        await eventually(lambda: receiver.counts[event_id] == 2)
        assert (sum(made.stats.waits.counts), made.stats.waits.counts[-1]) == (2, 0)


async def test_more_endpoints_than_are_taken_at_once_are_taken_without_anything_new(own: Own, receiver: Sink) -> None:
    receiver.keeps = False
    organizations = [await own.new_organization() for _ in range(5)]
    for organization in organizations:
        for number in range(50):
            await new_endpoint(own.database, receiver.url(f"/{number}"), organization)
    await publish_many(own.database, organizations)
    await FanOut(own.database).once()
    slow = Pace(poll_seconds=60.0, spread_seconds=60.0, beat_seconds=60.0, lease_seconds=200.0, drain_seconds=0.5)
    async with worker(own.url, pace=slow):
        await eventually(lambda: sum(receiver.counts.values()) == 250 > TAKEN_AT_ONCE_MAX)


async def test_what_is_due_grows_older_while_postgresql_is_away(own: Own, receiver: Sink) -> None:
    await new_endpoint(own.database, receiver.url(), own.organization_id, requests_per_second=1)
    async with worker(own.url) as made:
        await publish_many(own.database, [own.organization_id] * 30)
        await eventually(lambda: receiver.counts)
        await made.measure()
        now = SystemClock().monotonic_seconds()
        age = made.stats.oldest_due_seconds(now)
        assert made.stats.due > 0
        assert 0 < age < 30
        assert made.stats.oldest_due_seconds(now + 100) == pytest.approx(age + 100)


async def test_want_of_descriptors_is_no_fault_of_the_endpoint(own: Own, receiver: Sink) -> None:
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with worker(own.url) as made:
        await eventually(made._is_heard_of)
        (event_id,) = await publish_many(own.database, [own.organization_id])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            await eventually(lambda: made.stats.results["postponed"])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await eventually(lambda: _attempted(own, 1))
        (row,) = await sql(own, "SELECT state, step, last_problem FROM webhook_deliveries")
        assert tuple(row) == ("pending", 0, "there was no connection to spare here")
        await sql(own, "UPDATE webhook_deliveries SET due_at = now()")
        await eventually(lambda: event_id in receiver.counts)
    async with own.database.transaction() as session:
        found = await get_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
    assert found.status == "enabled"


async def test_a_worker_has_as_many_descriptors_as_it_may(own: Own, workdir: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = WorkerProcess(own.stores, workdir)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        await process.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert process.process is not None
    try:
        await eventually(lambda: "webhooks.started" in process.log, 20)
        assert resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        await process.stop()


async def test_nothing_is_begun_at_an_endpoint_that_is_being_released(own: Own, receiver: Sink) -> None:
    """Guarantee: whatever a beat finds meanwhile, nobody else may be sending there already."""
    for number in range(4):
        await new_endpoint(own.database, receiver.url(f"/{number}"), own.organization_id)
    async with worker(own.url, pace=Pace(beat_seconds=5.0, lease_seconds=30.0, drain_seconds=0.5)) as made:
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: sum(receiver.counts.values()) == 4)
        lanes = made._workload.lanes
        await eventually(lambda: not any(lane.busy for lane in lanes.values()))
        await made.keep()
        await sql(own, "INSERT INTO webhook_workers (worker_id) VALUES ('whw_other')")
        await made.beat()
        slow = asyncio.create_task(made._stores.reads.fetch("SELECT pg_sleep(0.5)"))
        keeping = asyncio.create_task(made.keep())
        await eventually(lambda: any(lane.is_being_released for lane in lanes.values()))
        # The other is gone again: there is no surplus any more.
        await sql(own, "DELETE FROM webhook_workers WHERE worker_id = 'whw_other'")
        await made.beat()
        assert [lane.may_begin for lane in lanes.values()] == [False, False, True, True]
        await slow
        await keeping
        assert [lane.may_begin for lane in lanes.values()] == [True, True]
