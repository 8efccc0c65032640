"""Test clocks: forward only, two intervals at most, `advancing` and then `ready`."""

from __future__ import annotations

from typing import Any

import pytest
import stripe

from tests.harness.stripe_twin import Place, pro_subscriber, shop_at

DAY = 86_400


async def clock_at(place: Place) -> Any:
    return await place.v1.test_helpers.test_clocks.create_async({"frozen_time": place.now, "name": "mine"})


async def advance(place: Place, clock: str, to: int) -> Any:
    return await place.v1.test_helpers.test_clocks.advance_async(clock, {"frozen_time": to})


async def test_it_answers_advancing_and_is_ready_afterwards(place: Place) -> None:
    clock = await clock_at(place)
    moving = await advance(place, clock.id, place.now + 5)
    assert (moving.status, moving.status_details.advancing.target_frozen_time) == ("advancing", place.now + 5)
    ready = await place.v1.test_helpers.test_clocks.retrieve_async(clock.id)
    assert (ready.status, ready.frozen_time) == ("ready", place.now + 5)
    types = [one for one in place.event_types() if one.startswith("test_helpers")]
    assert types == [f"test_helpers.test_clock.{step}" for step in ("created", "advancing", "ready")]


async def test_it_gets_ready_without_being_asked(place: Place) -> None:
    clock = await clock_at(place)
    await advance(place, clock.id, place.now + 5)
    await place.server.deliver_due()
    assert place.twin.state.tables["test_helpers.test_clock"][clock.id]["status"] == "ready"


@pytest.mark.parametrize("step", [0, -1])
async def test_it_goes_forward_only(place: Place, step: int) -> None:
    clock = await clock_at(place)
    with pytest.raises(stripe.InvalidRequestError):
        await advance(place, clock.id, place.now + step)


async def test_it_goes_two_intervals_at_most(place: Place) -> None:
    shop = await pro_subscriber(place)
    with pytest.raises(stripe.InvalidRequestError):
        await advance(place, shop.clock, place.now + 60 * DAY)
    await advance(place, shop.clock, place.now + 59 * DAY)
    assert len(await shop.invoices()) == 3


async def test_clocks_do_not_move_each_other(place: Place) -> None:
    shop = await pro_subscriber(place)
    other = await clock_at(place)
    await advance(place, other.id, place.now + 50 * DAY)
    assert len(await shop.invoices()) == 1


async def test_what_happens_on_the_way_happens_in_its_order(place: Place) -> None:
    shop = await shop_at(place)
    await shop.subscribe(trial_period_days=5)
    await shop.advance(days=50)
    times = [one["created"] for one in place.events() if one["data"]["object"].get("customer") == shop.customer]
    assert times == sorted(times)
    assert [one.created for one in await shop.invoices()] == sorted(
        (one.created for one in await shop.invoices()), reverse=True
    )


async def test_its_customers_go_with_it(place: Place) -> None:
    shop = await pro_subscriber(place)
    assert len((await place.v1.test_helpers.test_clocks.list_async()).data) == 1
    assert (await place.v1.customers.list_async()).data == []
    assert len((await place.v1.customers.list_async({"test_clock": shop.clock})).data) == 1
    assert (await place.v1.test_helpers.test_clocks.delete_async(shop.clock)).deleted
    assert (await place.v1.customers.retrieve_async(shop.customer)).deleted
    with pytest.raises(stripe.InvalidRequestError):
        await place.v1.test_helpers.test_clocks.retrieve_async(shop.clock)
