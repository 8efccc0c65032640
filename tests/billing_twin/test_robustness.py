"""Whatever a caller sends, the twin answers in Stripe's form: a mistake of the twin's own is never the answer."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest
import stripe
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import DataObject, binary, data, dictionaries, lists, one_of, recursive, sampled_from, text

from core.clock import ManualClock
from metering.billing.twin.app import Twin
from metering.billing.twin.parameters import KNOWN
from metering.billing.twin.resources.catalogue import ROUTES
from metering.billing.twin.routing import Route
from metering.billing.twin.wire import Request
from tests.harness.stripe_twin import START, Place, pro_subscriber

HEADERS = {"authorization": "Bearer sk_test_twin"}
WORDS = [
    *("price", "quantity", "id", "type", "interval", "usage_type", "meter", "url", "value", "monetary", "currency"),
    *("scope", "price_type", "behavior", "data", "metadata", "identifier", "stripe_customer_id", "formula"),
]


def known_names(route: Route) -> list[str]:
    return KNOWN[f"{route.method} {route.path}"]


def values(held: list[str]) -> Any:
    """Values as callers send them: words, numbers, ids that exist, maps and lists, nested."""
    words = [
        "",
        "0",
        "1",
        "-1",
        "9" * 30,
        "1000000000000000",
        "1802000000",
        "true",
        "now",
        "usd",
        "month",
        "metered",
        "sum",
        "subscription",
        "void",
    ]
    leaf = one_of(sampled_from(words + held), text(max_size=5))
    return recursive(
        leaf,
        lambda inner: one_of(lists(inner, max_size=2), dictionaries(sampled_from(WORDS), inner, max_size=3)),
        max_leaves=5,
    )


def form_of(tree: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in form_of(value, f"{path}[{key}]" if path else key)]
    if isinstance(tree, list):
        return [pair for index, value in enumerate(tree) for pair in form_of(value, f"{path}[{index}]")]
    return [(path, str(tree))]


def call(twin: Twin, route: Route, path: str, params: dict[str, Any]) -> int:
    encoded = urlencode(form_of(params))
    body = msgspec.json.encode(params) if path.startswith("/v2/") else encoded.encode()
    query = "" if route.method == "POST" else encoded
    reply = twin.call(Request(method=route.method, path=path, query=query, headers=HEADERS, body=body))
    assert reply.status < 500
    if reply.status >= 400:
        assert msgspec.json.decode(reply.body)["error"]["message"]
    return reply.status


@pytest.fixture
async def lived_in(place: Place) -> list[str]:
    """Ids of everything that there is in a twin after some life, for random calls to name."""
    shop = await pro_subscriber(place)
    await shop.use(5, identifier="used")
    await shop.advance(days=31)
    tables = place.twin.state.tables
    names = ("customer", "product", "price", "billing.meter", "subscription", "subscription_item", "invoice")
    names += ("payment_method", "payment_intent", "test_helpers.test_clock", "event")
    return ["usage", "used", *(next(iter(tables[name])) for name in names)]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=data())
async def test_random_calls_are_answered(place: Place, lived_in: list[str], data: DataObject) -> None:
    """Guarantee: no parameters make the twin fail; what it refuses, it refuses with words."""
    route = data.draw(sampled_from(ROUTES))
    path = re.sub(r"\{\w+\}", data.draw(sampled_from(lived_in)), route.path)
    params = data.draw(dictionaries(sampled_from([*known_names(route), "zzz"]), values(lived_in), max_size=6))
    call(place.twin, route, path, params)
    # What was changed must not break what falls due later.
    place.pass_time(hours=data.draw(sampled_from([0, 0, 1, 200])))
    place.twin.journal.entries.clear()


@given(body=binary(max_size=60))
def test_random_bodies_are_answered(body: bytes) -> None:
    twin = Twin(ManualClock(START))
    for path in ("/v1/customers", "/v1/billing/meter_events", "/v2/core/event_destinations"):
        request = Request(method="POST", path=path, headers=HEADERS, body=body)
        assert twin.call(request).status < 500


async def test_a_mistake_of_the_twin_is_told_and_logged(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Guarantee: it gives its locks back, too."""
    shop = await pro_subscriber(place)
    options = {"idempotency_key": "k"}
    held = place.twin.state.tables["customer"][shop.customer].pop("metadata")
    with pytest.raises(stripe.APIError, match="mistake"):
        await place.v1.customers.update_async(shop.customer, {"name": "A"}, options)
    assert "twin.answer_failed" in caplog.text
    place.twin.state.tables["customer"][shop.customer]["metadata"] = held
    assert (await place.v1.customers.update_async(shop.customer, {"name": "A"}, options)).name == "A"
