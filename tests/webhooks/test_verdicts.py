"""What becomes of endpoints that fail: warnings to the organization's others, and their end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from core.plain_sql import fetch
from tests.harness.eventually import eventually
from tests.harness.webhook_place import SEALER, new_endpoint, publish_many, worker
from tests.harness.webhook_sink import Sink, status
from tests.webhooks.conftest import Own
from webhooks.deliveries import DeliveryFilter, DeliveryView, list_deliveries
from webhooks.endpoints import EndpointView, enable_endpoint, get_endpoint
from webhooks.worker_parts import Pace

BRISK = Pace(poll_seconds=0.1, beat_seconds=0.1, tidy_seconds=0.1, drain_seconds=0.5)


async def sql(own: Own, statement: str, *arguments: object) -> list[Any]:
    async with own.database.transaction() as session:
        return await fetch(session, statement, *arguments)


async def seen(own: Own, endpoint: EndpointView) -> EndpointView:
    async with own.database.transaction() as session:
        return await get_endpoint(session, endpoint.id, SEALER, organization_id=own.organization_id)


async def due(own: Own, endpoint: EndpointView) -> list[DeliveryView]:
    async with own.database.transaction() as session:
        chosen = DeliveryFilter(endpoint_id=endpoint.id)
        return await list_deliveries(session, chosen, 100, organization_id=own.organization_id)


def told(receiver: Sink, path: str, kind: str) -> list[dict[str, Any]]:
    """The data of the events of a type that came to *path*."""
    bodies = [msgspec.json.decode(one.body) for one in receiver.arrivals[path]]
    return [body["data"] for body in bodies if body["type"] == kind]


async def failing_for(own: Own, endpoint: EndpointView, age: str) -> None:
    """Let *endpoint*, which no worker has, have failed for *age*, with what it is due to be tried now."""
    await sql(
        own,
        "UPDATE webhook_endpoints e SET failing_since = now() - $2::text::interval, consecutive_failures = 1 "
        "WHERE id = $1 AND NOT EXISTS (SELECT FROM webhook_workers w WHERE w.worker_id = e.worker_id)",
        endpoint.id,
        age,
    )
    await bring_forward(own)


async def bring_forward(own: Own) -> None:
    await sql(own, "UPDATE webhook_deliveries SET due_at = now() WHERE state = 'pending'")


async def attempted(own: Own, endpoint: EndpointView, count: int) -> list[DeliveryView]:
    """What *endpoint* was due, once that was tried so often in all."""

    async def found() -> list[DeliveryView] | None:
        now = await due(own, endpoint)
        return now if sum(one.attempts for one in now) >= count else None

    return await eventually(found)


@pytest.fixture
async def ill(own: Own, receiver: Sink) -> EndpointView:
    """An endpoint that answers 500, beside one at /well that takes everything."""
    receiver.answers["/ill"] = lambda _: status(500)
    await new_endpoint(own.database, receiver.url("/well"), own.organization_id)
    types = ["key.created", "webhook.endpoint.failing", "webhook.endpoint.disabled"]
    endpoint, _ = await new_endpoint(
        own.database, receiver.url("/ill"), own.organization_id, event_types=types, description="orders"
    )
    return endpoint


async def test_gone_is_disabled_at_once_and_the_others_are_told(own: Own, receiver: Sink, ill: EndpointView) -> None:
    receiver.answers["/ill"] = lambda _: status(410)
    elsewhere = await own.new_organization()
    await new_endpoint(own.database, receiver.url("/elsewhere"), elsewhere)
    async with worker(own.url):
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: told(receiver, "/well", "webhook.endpoint.disabled"))
        (other,) = await publish_many(own.database, [elsewhere])
        await eventually(lambda: other in receiver.counts)
    now = await seen(own, ill)
    assert (now.status, now.disabled_reason, now.last_problem) == ("disabled", "gone", "answered 410")
    assert told(receiver, "/well", "webhook.endpoint.disabled") == [
        {"endpoint_id": ill.id, "description": "orders", "reason": "gone"}
    ]
    (failed,) = await due(own, ill)
    assert (failed.state, failed.last_status, failed.attempts) == ("failed", 410, 1)
    assert len(receiver.arrivals["/ill"]) == 1
    assert [one.headers["webhook-id"] for one in receiver.arrivals["/elsewhere"]] == [other]


@pytest.mark.parametrize(("age", "hours"), [("2 days 12 hours", 60), ("3 days 12 hours", 84), ("4 days 12 hours", 108)])
async def test_a_threshold_is_told_once_to_the_others_and_not_to_itself(
    own: Own, receiver: Sink, ill: EndpointView, age: str, hours: int
) -> None:
    await publish_many(own.database, [own.organization_id])
    await failing_for(own, ill, age)
    async with worker(own.url, pace=BRISK):
        (warning,) = await eventually(lambda: told(receiver, "/well", "webhook.endpoint.failing"))
        for count in (2, 3):
            await bring_forward(own)
            await attempted(own, ill, count)
        (later,) = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: later in receiver.counts)
    now = await seen(own, ill)
    assert now.failing_since is not None
    assert now.status == "failing"
    since = int(now.failing_since.timestamp())
    assert warning == {
        "endpoint_id": ill.id,
        "description": "orders",
        "failing_since": since,
        "disabled_after": since + 5 * 86_400,
        "problem": "answered 500",
    }
    assert now.last_problem == "answered 500"
    assert abs(_first_failure(receiver) - since - hours * 3_600) < 30
    assert len(told(receiver, "/well", "webhook.endpoint.failing")) == 1
    assert {one.event_type for one in await due(own, ill)} == {"key.created"}


def _first_failure(receiver: Sink) -> float:
    return receiver.arrivals["/ill"][0].at


async def test_each_threshold_is_told_whichever_worker_comes_to_it(own: Own, receiver: Sink, ill: EndpointView) -> None:
    await publish_many(own.database, [own.organization_id])
    for count, age in enumerate(("1 day", "2 days 12 hours", "2 days 13 hours", "3 days 13 hours", "4 days 13 hours")):
        await failing_for(own, ill, age)
        async with worker(own.url, pace=BRISK):
            await attempted(own, ill, count + 1)
            expected = (0, 1, 1, 2, 3)[count]
            await eventually(
                lambda expected=expected: len(told(receiver, "/well", "webhook.endpoint.failing")) == expected
            )
    percents = [row.warned_percent for row in await sql(own, "SELECT warned_percent FROM webhook_endpoints ORDER BY 1")]
    assert percents == [0, 90]
    assert len(told(receiver, "/well", "webhook.endpoint.failing")) == 3


async def test_after_five_days_it_is_disabled_and_what_it_was_due_has_failed(
    own: Own, receiver: Sink, ill: EndpointView
) -> None:
    # More than are tried at a time.
    await publish_many(own.database, [own.organization_id] * 12)
    await failing_for(own, ill, "5 days")
    async with worker(own.url, pace=BRISK):
        await eventually(lambda: told(receiver, "/well", "webhook.endpoint.disabled"))

        async def are_failed() -> bool:
            return {one.state for one in await due(own, ill)} == {"failed"}

        await eventually(are_failed)
    now = await seen(own, ill)
    assert (now.status, now.disabled_reason, now.last_problem) == ("disabled", "failing", "answered 500")
    assert now.failing_since is not None
    assert told(receiver, "/well", "webhook.endpoint.disabled") == [
        {"endpoint_id": ill.id, "description": "orders", "reason": "failing"}
    ]
    deliveries = await due(own, ill)
    assert len(deliveries) == 12
    assert all(one.finished_at is not None for one in deliveries)
    assert {one.last_problem for one in deliveries if not one.attempts} == {"the endpoint was disabled"}
    assert sum(one.attempts for one in deliveries) == len(receiver.arrivals["/ill"]) < 12


async def test_who_is_enabled_again_begins_anew(own: Own, receiver: Sink, ill: EndpointView) -> None:
    await publish_many(own.database, [own.organization_id])
    await failing_for(own, ill, "5 days")
    async with worker(own.url, pace=BRISK):
        await eventually(lambda: told(receiver, "/well", "webhook.endpoint.disabled"))
        async with own.database.transaction() as session:
            back = await enable_endpoint(session, ill.id, SEALER, organization_id=own.organization_id)
        assert (back.status, back.disabled_at, back.disabled_reason) == ("enabled", None, None)
        assert (back.failing_since, back.consecutive_failures, back.resting_until) == (None, 0, None)
        (fresh,) = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: any(one.headers["webhook-id"] == fresh for one in receiver.arrivals["/ill"]))
        # It fails as before, and has five days again.
        await eventually(lambda: _is_failing(own, ill))
    now = await seen(own, ill)
    assert (now.status, now.consecutive_failures) == ("failing", 1)
    assert told(receiver, "/well", "webhook.endpoint.failing") == []
    assert len(told(receiver, "/well", "webhook.endpoint.disabled")) == 1


async def _is_failing(own: Own, endpoint: EndpointView) -> bool:
    return (await seen(own, endpoint)).status == "failing"


async def test_one_success_ends_what_it_was_warned_of(own: Own, receiver: Sink, ill: EndpointView) -> None:
    await publish_many(own.database, [own.organization_id])
    await failing_for(own, ill, "4 days")
    async with worker(own.url, pace=BRISK):
        await eventually(lambda: told(receiver, "/well", "webhook.endpoint.failing"))
        receiver.answers["/ill"] = lambda _: status(204)
        await bring_forward(own)

        async def is_well() -> bool:
            return (await seen(own, ill)).status == "enabled"

        await eventually(is_well)
    now = await seen(own, ill)
    assert (now.failing_since, now.consecutive_failures) == (None, 0)
    assert now.last_success_at is not None
    assert [row.warned_percent for row in await sql(own, "SELECT warned_percent FROM webhook_endpoints")] == [0, 0]


async def test_the_fifth_failure_opens_the_circuit_and_enabling_closes_it(
    own: Own, receiver: Sink, ill: EndpointView
) -> None:
    ids = await publish_many(own.database, [own.organization_id] * 20)
    async with worker(own.url, pace=BRISK):
        await eventually(lambda: _is_resting(own, ill))
        arrivals = receiver.arrivals["/ill"]
        # One more may have been under way when the fifth failed.
        assert 5 <= len(arrivals) <= 6
        (row,) = await sql(own, "SELECT resting_until FROM webhook_endpoints WHERE id = $1", ill.id)
        assert 29 <= row.resting_until.timestamp() - arrivals[4].at <= 31
        receiver.answers["/ill"] = lambda _: status(200)
        await bring_forward(own)
        (later,) = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: len(receiver.arrivals["/well"]) == 21)
        assert len(arrivals) <= 6
        async with own.database.transaction() as session:
            await enable_endpoint(session, ill.id, SEALER, organization_id=own.organization_id)

        async def are_taken() -> bool:
            return {one.state for one in await due(own, ill)} == {"succeeded"}

        await eventually(are_taken)
    assert {one.headers["webhook-id"] for one in arrivals} == {*ids, later}


async def _is_resting(own: Own, endpoint: EndpointView) -> bool:
    return (await seen(own, endpoint)).resting_until is not None
