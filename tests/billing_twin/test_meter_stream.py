"""The stream of meter events: a session of 15 minutes, a hundred events, and all checks afterwards."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import stripe

from metering.billing.twin.options import TwinOptions
from tests.harness.stripe_twin import Place, Shop, client_of, shop_at, twin_place


@asynccontextmanager
async def stream_of(place: Place) -> AsyncGenerator[Any]:
    session = await place.client.v2.billing.meter_event_session.create_async()
    client = client_of(place.server.url, session.authentication_token)
    yield client.v2.billing.meter_event_stream
    await client._requestor._client.close_async()


def event(shop: Shop, value: str = "1", **more: Any) -> dict[str, Any]:
    return {"event_name": "usage", "payload": {"stripe_customer_id": shop.customer, "value": value}} | more


async def test_a_hundred_events_are_counted(place: Place) -> None:
    shop = await shop_at(place)
    async with stream_of(place) as stream:
        await stream.create_async({"events": [event(shop, identifier=f"s:{number}") for number in range(100)]})
    assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == 100


async def test_a_hundred_and_one_are_refused(place: Place) -> None:
    shop = await shop_at(place)
    async with stream_of(place) as stream:
        with pytest.raises(stripe.InvalidRequestError):
            await stream.create_async({"events": [event(shop) for _ in range(101)]})
    assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == 0


async def test_a_session_ends_after_15_minutes(place: Place) -> None:
    shop = await shop_at(place)
    async with stream_of(place) as stream:
        place.pass_time(seconds=899)
        await stream.create_async({"events": [event(shop)]})
        place.pass_time(seconds=1)
        with pytest.raises(stripe.TemporarySessionExpiredError) as raised:
            await stream.create_async({"events": [event(shop)]})
    assert (raised.value.http_status, raised.value.code) == (401, "billing_meter_event_session_expired")


async def test_the_api_key_does_not_open_the_stream(place: Place) -> None:
    shop = await shop_at(place)
    with pytest.raises(stripe.StripeError) as raised:
        await place.client.v2.billing.meter_event_stream.create_async({"events": [event(shop)]})
    assert raised.value.http_status == 401


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"payload": {"stripe_customer_id": "cus_nobody", "value": "1"}}, "meter_event_customer_not_found"),
        ({"payload": {"value": "1"}}, "meter_event_no_customer_defined"),
        ({"payload": {"stripe_customer_id": "cus_1", "value": "0.5"}}, "meter_event_invalid_value"),
        ({"payload": {"stripe_customer_id": "cus_1", "value": "1" * 16}}, "meter_event_value_too_many_digits"),
        ({"timestamp": "2020-01-01T00:00:00Z"}, "timestamp_too_far_in_past"),
        ({"timestamp": "2030-01-01T00:00:00Z"}, "timestamp_in_future"),
        ({"event_name": "nothing"}, "no_meter"),
    ],
)
async def test_what_is_wrong_is_told_later(place: Place, wrong: dict[str, Any], code: str) -> None:
    """Guarantee: the stream answers 200, the wrong event is not counted, and a thin event says why."""
    shop = await shop_at(place)
    async with stream_of(place) as stream:
        await stream.create_async({"events": [event(shop, "7"), event(shop) | wrong]})
    place.pass_time(seconds=1)
    assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == 7
    (report,) = place.twin.state.tables["v2.core.event"].values()
    assert [kind["code"] for kind in report["data"]["reason"]["error_types"]] == [code]
    is_without_meter = code == "no_meter"
    assert report["type"].endswith("no_meter_found" if is_without_meter else "error_report_triggered")


async def test_a_duplicate_in_the_stream_is_dropped(place: Place) -> None:
    shop = await shop_at(place)
    async with stream_of(place) as stream:
        await stream.create_async({"events": [event(shop, "7", identifier="a"), event(shop, "7", identifier="a")]})
        await stream.create_async({"events": [event(shop, "7", identifier="a")]})
    assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == 7


async def test_the_stream_has_its_own_limit() -> None:
    async with twin_place(TwinOptions(stream_requests_per_second=2)) as place:
        shop = await shop_at(place)
        async with stream_of(place) as stream:
            for _ in range(2):
                await stream.create_async({"events": [event(shop)]})
            with pytest.raises(stripe.RateLimitError):
                await stream.create_async({"events": [event(shop)]})
            await place.v1.customers.create_async({})
            place.pass_time(seconds=1)
            await stream.create_async({"events": [event(shop)]})
