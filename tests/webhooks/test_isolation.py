"""An endpoint that is slow, dead or hostile hurts nobody else."""

from __future__ import annotations

import asyncio

from tests.harness.eventually import eventually, moment
from tests.harness.webhook_place import SEALER, new_endpoint, publish_many, worker
from tests.harness.webhook_sink import Arrival, Sink, status
from tests.webhooks.conftest import Own
from webhooks.dispatch import ORGANIZATION_MAX
from webhooks.endpoints import get_endpoint
from webhooks.lanes import IN_FLIGHT_MAX
from webhooks.worker_parts import Bounds


async def test_what_never_answers_holds_little_and_others_are_served(own: Own, receiver: Sink) -> None:
    for number in range(5):
        await new_endpoint(own.database, receiver.url(f"/hole{number}"), own.organization_id)
        receiver.answers[f"/hole{number}"] = lambda _: None
    await new_endpoint(own.database, receiver.url("/well"), own.organization_id)
    async with worker(own.url) as made:
        await publish_many(own.database, [own.organization_id] * 300)
        await eventually(lambda: len(receiver.arrivals["/well"]) == 300, 10)
        # Of what nothing is known, two at a time.
        await eventually(lambda: made._dispatcher.in_flight == 5 * 2)
        assert all(len(receiver.arrivals[f"/hole{number}"]) <= 2 for number in range(5))


async def test_an_endpoint_never_has_more_under_way_than_its_bound(own: Own, receiver: Sink) -> None:
    held: list[Arrival] = []
    most = 0

    def answer(arrival: Arrival) -> bytes | None:
        # The first ones open the window; then nothing is answered.
        if len(receiver.arrivals["/hook"]) <= 20:
            return status(200)
        held.append(arrival)
        return None

    receiver.answers["/hook"] = answer
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id] * 100)
    async with worker(own.url):
        await eventually(lambda: len(held) == IN_FLIGHT_MAX)
        await moment(0.3)
        most = len(held)
    assert most == IN_FLIGHT_MAX


async def test_an_organization_never_has_more_under_way_than_its_bound(own: Own, receiver: Sink) -> None:
    """With as many endpoints as it may have, all slow, it leaves room for another organization's."""
    other = await own.new_organization()
    for number in range(45):
        await new_endpoint(own.database, receiver.url(f"/slow{number}"), own.organization_id)
        receiver.answers[f"/slow{number}"] = lambda _: None
    await new_endpoint(own.database, receiver.url("/well"), other)
    async with worker(own.url) as made:
        await publish_many(own.database, [own.organization_id] * 10)
        await eventually(lambda: made._dispatcher.in_flight == ORGANIZATION_MAX)
        await publish_many(own.database, [other] * 50)
        await eventually(lambda: len(receiver.arrivals["/well"]) == 50)
        assert made._dispatcher.in_flight == ORGANIZATION_MAX


async def test_room_that_comes_free_goes_to_every_endpoint_in_turn(own: Own, receiver: Sink) -> None:
    for number in range(45):
        await new_endpoint(own.database, receiver.url(f"/{number}"), own.organization_id)
    async with worker(own.url):
        await publish_many(own.database, [own.organization_id] * 40)
        await eventually(lambda: sum(map(len, receiver.arrivals.values())) == 45 * 40, 20)
    assert {len(arrivals) for arrivals in receiver.arrivals.values()} == {40}


async def test_a_circuit_opens_and_one_delivery_at_a_time_tries(own: Own, receiver: Sink) -> None:
    receiver.answers["/hook"] = lambda _: status(500)
    endpoint, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id] * 200)
    async with worker(own.url) as made:
        await eventually(lambda: not made._workload.lanes and len(receiver.arrivals["/hook"]) >= 5)
        opened = len(receiver.arrivals["/hook"])
        # Five failures, and what was under way beside the fifth.
        assert opened <= 5 + IN_FLIGHT_MAX
        await publish_many(own.database, [own.organization_id] * 20)
        await moment(1.5)
        assert len(receiver.arrivals["/hook"]) == opened
    async with own.database.transaction() as session:
        found = await get_endpoint(session, endpoint.id, SEALER, organization_id=own.organization_id)
    assert found.status == "failing"
    assert found.consecutive_failures == 5
    assert found.last_problem == "answered 500"
    assert found.resting_until is not None


async def test_endpoints_that_are_always_busy_leave_room_for_the_others(own: Own, receiver: Sink) -> None:
    """Guarantee: with more endpoints than a worker has at a time, all have their turn."""
    paths = [f"/{number}" for number in range(6)]
    for path in paths:
        await new_endpoint(own.database, receiver.url(path), own.organization_id, requests_per_second=2)
    await publish_many(own.database, [own.organization_id] * 100)
    async with worker(own.url, bounds=Bounds(endpoints_max=3)):
        await eventually(lambda: all(receiver.arrivals[path] for path in paths), 20)


async def test_a_full_process_gives_room_organization_by_organization(own: Own, receiver: Sink) -> None:
    """Guarantee: with more to send than a process bears, no organization has all the room."""
    loop = asyncio.get_running_loop()

    def slowly(arrival: Arrival) -> None:
        loop.call_later(0.02, receiver.answer_late, arrival.path, status(200))

    organizations = [await own.new_organization() for _ in range(6)]
    for place, organization in enumerate(organizations):
        for number in range(4):
            path = f"/{place}/{number}"
            receiver.answers[path] = slowly
            await new_endpoint(own.database, receiver.url(path), organization)
    async with worker(own.url, bounds=Bounds(process_max=40)):
        await publish_many(own.database, organizations * 150)
        await eventually(lambda: _taken(receiver) > 1_200, 30)
        counts = [sum(len(receiver.arrivals[f"/{place}/{number}"]) for number in range(4)) for place in range(6)]
    assert max(counts) < 2 * min(counts)


def _taken(receiver: Sink) -> int:
    return sum(len(arrivals) for arrivals in receiver.arrivals.values())
