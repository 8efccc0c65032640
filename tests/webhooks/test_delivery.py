"""From an event to its delivery, by a worker in this process or several of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from core.clock import ManualClock, SystemClock
from core.ids import OrganizationId
from core.plain_sql import fetch
from tests.harness.eventually import eventually, moment
from tests.harness.webhook_place import WorkerProcess, new_endpoint, publish_many, worker
from tests.harness.webhook_sink import Sink, status
from tests.webhooks.conftest import Own
from webhooks.attempts import RESPONSE_BYTES_MAX
from webhooks.deliveries import DeliveryDetails, DeliveryFilter, get_delivery, list_deliveries
from webhooks.events import KeyCreated, Ping
from webhooks.publish import publish
from webhooks.worker_parts import Pace


async def deliveries(own: Own, organization_id: OrganizationId | None = None) -> list[DeliveryDetails]:
    organization_id = organization_id or own.organization_id
    async with own.database.transaction() as session:
        found = await list_deliveries(session, DeliveryFilter(), 1_000, organization_id=organization_id)
        return [await get_delivery(session, one.id, organization_id=organization_id) for one in found]


async def states(own: Own, organization_id: OrganizationId | None = None) -> list[str]:
    return [one.delivery.state for one in await deliveries(own, organization_id)]


async def test_an_event_is_delivered_to_who_wants_it_once(own: Own, receiver: Sink) -> None:
    other = await own.new_organization()
    wanted, _ = await new_endpoint(
        own.database, receiver.url("/keys"), own.organization_id, event_types=["key.created"]
    )
    await new_endpoint(
        own.database, receiver.url("/budgets"), own.organization_id, event_types=["budget.threshold_reached"]
    )
    await new_endpoint(own.database, receiver.url("/other"), other)
    async with worker(own.url):
        (event_id,) = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.counts)
        (found,) = await eventually(lambda: _succeeded(own))
    assert receiver.counts == {event_id: 1}
    assert list(receiver.arrivals) == ["/keys"]
    (arrival,) = receiver.arrivals["/keys"]
    body = msgspec.json.decode(arrival.body)
    assert body["id"] == event_id == arrival.headers["webhook-id"]
    assert (body["object"], body["type"]) == ("event", "key.created")
    assert body["data"]["object" if "object" in body["data"] else "id"].startswith("key_")
    assert arrival.headers["content-type"] == "application/json"
    assert found.delivery.endpoint_id == wanted.id
    assert found.body == arrival.body
    assert [(one.status, one.problem) for one in found.attempts] == [(200, None)]


async def _succeeded(own: Own) -> list[DeliveryDetails]:
    return [one for one in await deliveries(own) if one.delivery.state == "succeeded"]


async def test_a_test_goes_to_one_endpoint_alone_and_past_its_filter(own: Own, receiver: Sink) -> None:
    one, _ = await new_endpoint(own.database, receiver.url("/one"), own.organization_id, filter="name == 'never'")
    await new_endpoint(own.database, receiver.url("/two"), own.organization_id)
    async with own.database.transaction() as session:
        await publish(session, Ping(message="hi"), organization_id=own.organization_id, endpoint_id=one.id)
    async with worker(own.url):
        await eventually(lambda: receiver.counts)
        await eventually(lambda: _succeeded(own))
    assert list(receiver.arrivals) == ["/one"]


async def test_what_a_transaction_takes_back_is_not_told(own: Own, receiver: Sink) -> None:
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with own.database.transaction() as session:
        await publish(session, _created("gone"), organization_id=own.organization_id)
        await session.rollback()
    async with own.database.transaction() as session:
        kept = await publish(session, _created("kept"), organization_id=own.organization_id)
    async with worker(own.url):
        await eventually(lambda: receiver.counts)
    assert receiver.counts == {kept: 1}


def _created(name: str) -> KeyCreated:
    return KeyCreated(id="key_1", project_id="proj_1", name=name, hint="sk-aap-1...2", expires_at=None)


async def test_a_filter_chooses_by_data(own: Own, receiver: Sink) -> None:
    await new_endpoint(own.database, receiver.url("/a"), own.organization_id, filter="name == 'a'")
    await new_endpoint(own.database, receiver.url("/b"), own.organization_id, filter='name == `"b"` && !expires_at')
    async with worker(own.url):
        ids = {}
        for name in ("a", "b", "c"):
            async with own.database.transaction() as session:
                ids[name] = await publish(session, _created(name), organization_id=own.organization_id)
        await eventually(lambda: len(receiver.counts) == 2)
    assert [one.headers["webhook-id"] for one in receiver.arrivals["/a"]] == [ids["a"]]
    assert [one.headers["webhook-id"] for one in receiver.arrivals["/b"]] == [ids["b"]]


async def test_a_failure_is_tried_again_by_the_schedule_with_the_same_id_and_body(own: Own, receiver: Sink) -> None:
    answers = [status(500, b"broken"), status(503), status(200)]
    receiver.answers["/hook"] = lambda _: answers.pop(0)
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url):
        (event_id,) = await publish_many(own.database, [own.organization_id])
        for count in (1, 2):
            (failed,) = await eventually(lambda count=count: _with_attempts(own, count))
            waits = (failed.delivery.due_at - failed.attempts[-1].started_at).total_seconds()
            # Standard Webhooks: 5 s after the first, 5 min after the second; with a fifth of jitter.
            low, high = ((4, 6.5), (240, 361))[count - 1]
            assert low <= waits <= high
            await _bring_forward(own)
        await eventually(lambda: _succeeded(own))
    arrivals = receiver.arrivals["/hook"]
    assert {one.headers["webhook-id"] for one in arrivals} == {event_id}
    assert len({one.body for one in arrivals}) == 1
    (found,) = await deliveries(own)
    assert [(one.status, one.problem, one.response_body) for one in found.attempts] == [
        (500, "answered 500", "broken"),
        (503, "answered 503", None),
        (200, None, None),
    ]


async def _with_attempts(own: Own, count: int) -> list[DeliveryDetails]:
    # A delivery and its attempts are read one after the other.
    return [one for one in await deliveries(own) if one.delivery.attempts == len(one.attempts) == count]


async def _bring_forward(own: Own) -> None:
    """Let what waits be due now."""
    async with own.database.transaction() as session:
        await fetch(session, "UPDATE webhook_deliveries SET due_at = now() WHERE state = 'pending'")


async def test_after_the_last_attempt_it_is_given_up(own: Own, receiver: Sink) -> None:
    receiver.answers["/hook"] = lambda _: status(500)
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id])
    async with worker(own.url):
        await eventually(lambda: _with_attempts(own, 1))
        async with own.database.transaction() as session:
            await fetch(session, "UPDATE webhook_deliveries SET step = 9, due_at = now()")
        (found,) = await eventually(lambda: _with_attempts(own, 2))
    assert found.delivery.state == "failed"
    assert found.delivery.finished_at is not None


async def test_a_redirect_is_not_followed(own: Own, receiver: Sink) -> None:
    receiver.answers["/hook"] = lambda _: status(302, more=b"location: /elsewhere\r\n")
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id])
    async with worker(own.url):
        (found,) = await eventually(lambda: _with_attempts(own, 1))
    assert found.attempts[0].problem == "answered 302: redirects are not followed"
    assert list(receiver.arrivals) == ["/hook"]


async def test_of_a_long_answer_the_beginning_is_kept(own: Own, receiver: Sink) -> None:
    receiver.answers["/hook"] = lambda _: status(200, b"x" * 1_000_000)
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id])
    async with worker(own.url):
        (found,) = await eventually(lambda: _succeeded(own))
    assert found.attempts[0].response_body == "x" * RESPONSE_BYTES_MAX


async def test_an_answer_whose_body_drips_is_an_answer(own: Own, receiver: Sink) -> None:
    receiver.answers["/hook"] = lambda _: b"HTTP/1.1 200 x\r\ncontent-length: 100000\r\n\r\nbeginning"
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id])
    async with worker(own.url):
        (found,) = await eventually(lambda: _succeeded(own))
    assert found.attempts[0].response_body == "beginning"
    assert found.attempts[0].duration_ms < 4_000


async def test_a_body_with_odd_bytes_is_kept_and_shown(own: Own, receiver: Sink) -> None:
    receiver.answers["/hook"] = lambda _: status(500, b"\x00\xff\xfe<b>")
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id])
    async with worker(own.url):
        (found,) = await eventually(lambda: _with_attempts(own, 1))
    assert found.attempts[0].response_body == "\x00\ufffd\ufffd<b>"


async def test_a_worker_that_is_killed_loses_its_endpoints_to_another(own: Own, receiver: Sink, workdir: Path) -> None:
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    first = WorkerProcess(own.stores, workdir)
    await first.start()
    ids = await publish_many(own.database, [own.organization_id])
    await eventually(lambda: receiver.counts, 20)
    await first.kill()
    async with worker(own.url, pace=Pace(lease_seconds=2.0, beat_seconds=0.2, drain_seconds=0.5)):
        ids += await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.counts.keys() == set(ids), 10)


async def test_a_worker_that_stops_leaves_at_once(own: Own, receiver: Sink) -> None:
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url):
        ids = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.counts)
    async with own.database.transaction() as session:
        assert await fetch(session, "SELECT worker_id FROM webhook_workers") == []
    async with worker(own.url):
        ids += await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.counts.keys() == set(ids), 3)


async def test_two_workers_share_the_endpoints(own: Own, receiver: Sink) -> None:
    for number in range(12):
        await new_endpoint(own.database, receiver.url(f"/{number}"), own.organization_id)
    pace = Pace(beat_seconds=0.1, drain_seconds=0.5)
    async with worker(own.url, pace=pace) as one:
        # Always something to do, so that no endpoint is left because it is idle.
        receiver.answers.update({f"/{number}": lambda _: None for number in range(12)})
        await publish_many(own.database, [own.organization_id] * 20)
        await eventually(lambda: len(one._workload) == 12)
        assert len(one._workload) == 12
        receiver.answers.clear()
        async with worker(own.url, pace=pace) as two:
            feeding = asyncio.create_task(_feed(own))
            await eventually(lambda: len(two._workload) >= 5, 30)
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            assert len(one._workload) <= 7


async def _feed(own: Own) -> None:
    while True:
        await publish_many(own.database, [own.organization_id] * 5)
        await moment(0.05)


async def test_an_endpoint_gets_no_more_a_second_than_it_wants(own: Own, receiver: Sink) -> None:
    await new_endpoint(own.database, receiver.url(), own.organization_id, requests_per_second=20)
    ids = await publish_many(own.database, [own.organization_id] * 30)
    async with worker(own.url):
        await eventually(lambda: len(receiver.counts) == 30, 10)
    times = sorted(one.at for one in receiver.arrivals["/hook"])
    assert receiver.counts.keys() == set(ids)
    assert times[-1] - times[0] >= 29 / 20 * 0.9


async def test_a_clock_that_is_moved_does_not_matter_to_what_is_sent(own: Own, receiver: Sink) -> None:
    clock = ManualClock(SystemClock().now())
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id])
    async with worker(own.url, clock=clock):
        await eventually(lambda: receiver.counts)
    assert int(receiver.arrivals["/hook"][0].headers["webhook-timestamp"]) == int(clock.now().timestamp())
