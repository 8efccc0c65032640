"""What the twin claims of Stripe, asked of both. Without STRIPE_SANDBOX_KEY only the twin is asked, and Stripe never."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import stripe

from tests.billing_twin.backends import SANDBOX_KEY, Backend, backend_named

DAY = 86_400
BACKENDS = [
    "twin",
    *([pytest.param("stripe", marks=pytest.mark.enable_socket)] if SANDBOX_KEY else []),
]


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest) -> AsyncGenerator[Backend]:
    async with backend_named(request.param) as made:
        yield made


@pytest.fixture
async def meter(backend: Backend) -> Any:
    wish = {"display_name": "Usage", "default_aggregation": {"formula": "sum"}}
    return await backend.v1.billing.meters.create_async({**wish, "event_name": backend.unique("usage")})


@pytest.fixture
async def customer(backend: Backend) -> Any:
    return await backend.v1.customers.create_async({"email": "a@example.com"})


async def use(backend: Backend, meter: Any, customer: Any, value: str = "5", **more: Any) -> Any:
    payload = {"stripe_customer_id": customer.id, "value": value}
    wish = {"event_name": meter.event_name, "payload": payload, **more}
    return await backend.v1.billing.meter_events.create_async(wish)


async def test_a_duplicate_identifier_is_refused_and_not_to_be_retried(
    backend: Backend, meter: Any, customer: Any
) -> None:
    identifier = backend.unique("a")
    await use(backend, meter, customer, identifier=identifier)
    with pytest.raises(stripe.InvalidRequestError) as raised:
        await use(backend, meter, customer, identifier=identifier)
    assert raised.value.http_status == 400
    assert identifier in raised.value.user_message
    assert raised.value.headers["stripe-should-retry"] == "false"


@pytest.mark.parametrize("age", [36 * DAY, -600])
async def test_times_outside_of_the_window_are_refused(backend: Backend, meter: Any, customer: Any, age: int) -> None:
    with pytest.raises(stripe.InvalidRequestError) as raised:
        await use(backend, meter, customer, timestamp=backend.now - age)
    assert raised.value.http_status == 400


@pytest.mark.parametrize("value", ["1.5", "x", "1" * 16])
async def test_values_that_cannot_be_added_up_are_refused(
    backend: Backend, meter: Any, customer: Any, value: str
) -> None:
    with pytest.raises(stripe.InvalidRequestError):
        await use(backend, meter, customer, value)


async def test_an_unknown_event_name_is_refused(backend: Backend, customer: Any) -> None:
    wish = {"event_name": backend.unique("nothing"), "payload": {"stripe_customer_id": customer.id, "value": "1"}}
    with pytest.raises(stripe.InvalidRequestError) as raised:
        await backend.v1.billing.meter_events.create_async(wish)
    assert raised.value.http_status == 400


async def test_an_unknown_customer_is_not_refused_at_once(backend: Backend, meter: Any) -> None:
    payload = {"stripe_customer_id": "cus_doesnotexist", "value": "1"}
    made = await backend.v1.billing.meter_events.create_async({"event_name": meter.event_name, "payload": payload})
    assert made.object == "billing.meter_event"


async def test_the_summary_is_what_was_sent(backend: Backend, meter: Any, customer: Any) -> None:
    for value in ("5", "7", "-2"):
        await use(backend, meter, customer, value, timestamp=backend.now - 60)
    start = (backend.now - 3_600) // 3_600 * 3_600
    span = {"customer": customer.id, "start_time": start, "end_time": start + 7_200}

    async def holds() -> bool:
        found = await backend.v1.billing.meters.event_summaries.list_async(meter.id, span)
        return sum(one.aggregated_value for one in found.data) == 10

    await backend.eventually(holds)


async def test_summaries_are_aligned(backend: Backend, meter: Any, customer: Any) -> None:
    start = backend.now // DAY * DAY
    span = {"customer": customer.id, "start_time": start + 30, "end_time": start + DAY}
    with pytest.raises(stripe.InvalidRequestError):
        await backend.v1.billing.meters.event_summaries.list_async(meter.id, span)


async def test_an_idempotency_key_repeats_its_answer_and_takes_no_other_parameters(backend: Backend) -> None:
    options = {"idempotency_key": backend.unique("key")}
    first = await backend.v1.customers.create_async({"name": "A"}, options)
    again = await backend.v1.customers.create_async({"name": "A"}, options)
    assert again.id == first.id
    assert again.last_response.headers["idempotent-replayed"] == "true"
    with pytest.raises(stripe.IdempotencyError):
        await backend.v1.customers.create_async({"name": "B"}, options)


async def test_errors_are_named_alike(backend: Backend) -> None:
    with pytest.raises(stripe.InvalidRequestError) as raised:
        await backend.v1.customers.retrieve_async("cus_doesnotexist")
    assert (raised.value.http_status, raised.value.code) == (404, "resource_missing")
    with pytest.raises(stripe.InvalidRequestError) as raised:
        await backend.v1.customers.create_async({"colour": "red"})
    assert (raised.value.code, raised.value.param) == ("parameter_unknown", "colour")


async def test_a_metered_price_needs_a_meter(backend: Backend) -> None:
    wish = {"currency": "usd", "unit_amount": 1, "product_data": {"name": "Pro"}}
    with pytest.raises(stripe.InvalidRequestError):
        await backend.v1.prices.create_async({**wish, "recurring": {"interval": "month", "usage_type": "metered"}})


async def test_usage_of_a_month_is_on_its_invoice(backend: Backend, meter: Any) -> None:
    """Guarantee: plan ahead, usage behind, in one invoice that is a draft for an hour and then paid."""
    v1 = backend.v1
    clock = await v1.test_helpers.test_clocks.create_async({"frozen_time": backend.now})
    customer = await v1.customers.create_async({"test_clock": clock.id})
    card = await v1.payment_methods.attach_async("pm_card_visa", {"customer": customer.id})
    await v1.customers.update_async(customer.id, {"invoice_settings": {"default_payment_method": card.id}})
    product = await v1.products.create_async({"name": "Pro"})
    common = {"currency": "usd", "product": product.id}
    month = {"interval": "month"}
    plan = await v1.prices.create_async({**common, "unit_amount": 9_900, "recurring": month})
    by_meter = {**month, "usage_type": "metered", "meter": meter.id}
    metered = await v1.prices.create_async({**common, "unit_amount_decimal": "0.0001", "recurring": by_meter})
    wish = {"customer": customer.id, "items": [{"price": plan.id}, {"price": metered.id}]}
    subscription = await v1.subscriptions.create_async(wish)
    assert subscription.status == "active"
    await use(backend, meter, customer, "12345678", timestamp=backend.now)
    end = subscription["items"].data[0].current_period_end

    async def is_ready() -> bool:
        return (await v1.test_helpers.test_clocks.retrieve_async(clock.id)).status == "ready"

    for target in (end + 60, end + 2 * 3_600):
        await v1.test_helpers.test_clocks.advance_async(clock.id, {"frozen_time": target})
        await backend.eventually(is_ready)

    async def is_paid() -> bool:
        newest = (await v1.invoices.list_async({"customer": customer.id})).data[0]
        return (newest.status, newest.total) == ("paid", 9_900 + 1_235)

    await backend.eventually(is_paid)
    await v1.test_helpers.test_clocks.delete_async(clock.id)
