"""Idempotency keys: saved answers, errors included; other parameters; the same key at once; the end after a day."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import stripe

from metering.billing.twin.faults import FaultPlan
from tests.harness.stripe_twin import Place, wait_for


async def create(place: Place, key: str, **params: Any) -> Any:
    return await place.v1.customers.create_async(params, {"idempotency_key": key})


def customers(place: Place) -> int:
    return len(place.twin.state.tables["customer"])


async def test_the_same_call_is_answered_again_and_not_done_again(place: Place) -> None:
    first = await create(place, "k", email="a@example.com")
    again = await create(place, "k", email="a@example.com")
    assert again.id == first.id
    assert customers(place) == 1
    headers = again.last_response.headers
    assert headers["idempotent-replayed"] == "true"
    assert headers["original-request"] == first.last_response.headers["request-id"]
    assert "idempotent-replayed" not in first.last_response.headers
    assert [entry.is_replayed for entry in place.twin.journal.entries] == [False, True]


async def test_other_parameters_are_a_mistake(place: Place) -> None:
    await create(place, "k", email="a@example.com")
    with pytest.raises(stripe.IdempotencyError) as raised:
        await create(place, "k", email="b@example.com")
    assert raised.value.http_status == 400


async def test_the_same_key_on_another_route_is_a_mistake(place: Place) -> None:
    await create(place, "k")
    with pytest.raises(stripe.IdempotencyError):
        await place.v1.products.create_async({"name": "Pro"}, {"idempotency_key": "k"})


async def test_a_saved_500_is_repeated(place: Place) -> None:
    """Guarantee: v1 keeps 500s too; the same key never gets the work done."""
    place.twin.faults.add(FaultPlan(kind="error_before_commit"))
    for _ in range(3):
        with pytest.raises(stripe.APIError) as raised:
            await create(place, "k")
        assert raised.value.http_status == 500
    assert raised.value.headers["idempotent-replayed"] == "true"
    assert customers(place) == 0
    await create(place, "k2")


async def test_a_500_after_the_work_is_repeated_and_the_work_stays(place: Place) -> None:
    place.twin.faults.add(FaultPlan(kind="error_after_commit"))
    for _ in range(2):
        with pytest.raises(stripe.APIError):
            await create(place, "k")
    assert customers(place) == 1


async def test_a_lost_answer_is_found_again(place: Place) -> None:
    place.twin.faults.add(FaultPlan(kind="drop_after_commit"))
    with pytest.raises(stripe.APIConnectionError):
        await create(place, "k")
    again = await create(place, "k")
    assert again.last_response.headers["idempotent-replayed"] == "true"
    assert customers(place) == 1


async def test_the_same_key_at_once_conflicts(place: Place) -> None:
    hold = place.twin.faults.add(FaultPlan(kind="hold"))
    first = asyncio.create_task(create(place, "k"))
    await wait_for(hold.entered)
    with pytest.raises(stripe.StripeError) as raised:
        await create(place, "k")
    assert (raised.value.http_status, raised.value.error.code) == (409, "idempotency_key_in_use")
    hold.release()
    assert (await create(place, "k")).id == (await first).id


async def test_a_refused_parameter_does_not_use_up_the_key(place: Place) -> None:
    with pytest.raises(stripe.InvalidRequestError):
        await place.v1.products.create_async({}, {"idempotency_key": "k"})
    assert (await place.v1.products.create_async({"name": "Pro"}, {"idempotency_key": "k"})).name == "Pro"


async def test_a_key_is_forgotten_after_24_hours(place: Place) -> None:
    first = await create(place, "k")
    place.pass_time(hours=24, seconds=-1)
    assert (await create(place, "k")).id == first.id
    place.pass_time(seconds=1)
    assert (await create(place, "k")).id != first.id


async def test_a_key_has_at_most_255_characters(place: Place) -> None:
    await create(place, "k" * 255)
    with pytest.raises(stripe.IdempotencyError):
        await create(place, "k" * 256)


async def test_v2_runs_failed_work_again(place: Place) -> None:
    sessions = place.client.v2.billing.meter_event_session
    place.twin.faults.add(FaultPlan(kind="error_before_commit"))
    with pytest.raises(stripe.StripeError):
        await sessions.create_async(options={"idempotency_key": "k"})
    made = await sessions.create_async(options={"idempotency_key": "k"})
    again = await sessions.create_async(options={"idempotency_key": "k"})
    assert again.authentication_token == made.authentication_token
