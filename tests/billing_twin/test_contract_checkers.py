"""The contract checkers themselves: they find what is wrong."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import stripe

from tests.harness.stripe_twin import Place, pro_subscriber
from tests.harness.stripe_types import answer_problems, check_answers, check_requests, request_problems


async def problems(place: Place, method: str, params: dict[str, Any]) -> list[str]:
    """What the checker says about a call of `v1.<method>`, refused or not."""
    service = place.v1
    *path, last = method.split(".")
    for name in path:
        service = getattr(service, name)
    with contextlib.suppress(stripe.StripeError):  # Refusals are as good.
        await getattr(service, f"{last}_async")(params)
    return request_problems(place.twin.journal.entries[-1])


@pytest.mark.parametrize(
    ("method", "params", "found"),
    [
        ("customers.create", {"email": "a@example.com", "metadata": {"a": "b"}}, ""),
        ("customers.create", {"colour": "red"}, "colour: unknown"),
        ("customers.create", {"address": {"planet": "Mars"}}, "address.planet: unknown"),
        ("prices.create", {"unit_amount": 5}, "currency: missing"),
        ("prices.create", {"currency": "usd", "unit_amount": "five"}, "unit_amount: 'five'"),
        ("prices.create", {"currency": "usd", "recurring": {"interval": "moon"}}, "recurring.interval: 'moon'"),
        ("prices.create", {"currency": "usd", "recurring": {}}, ""),
        ("checkout.sessions.create", {"line_items": [{"prize": "x"}]}, "line_items[0].prize: unknown"),
        ("checkout.sessions.create", {"mode": "gift"}, "mode: 'gift'"),
        ("subscriptions.create", {"items": [{"price": "p", "quantity": 1}], "trial_end": "now"}, ""),
        ("subscriptions.create", {"trial_end": "later"}, "trial_end: 'later'"),
        ("subscriptions.create", {"cancel_at_period_end": "maybe"}, "cancel_at_period_end: 'maybe'"),
        ("billing.meter_events.create", {"event_name": "x"}, "payload: missing"),
        ("prices.list", {"lookup_keys": ["a"], "created": {"gte": 5}}, ""),
        ("prices.list", {"created": {"since": 5}}, "created"),
    ],
)
async def test_requests(place: Place, method: str, params: dict[str, Any], found: str) -> None:
    seen = await problems(place, method, params)
    assert any(found in one for one in seen) if found else seen == []
    place.twin.journal.entries.clear()


async def test_a_wrong_request_fails_the_check(place: Place) -> None:
    await problems(place, "customers.create", {"colour": "red"})
    with pytest.raises(AssertionError, match="colour: unknown"):
        check_requests(place.twin)
    check_requests(place.twin, only_accepted=True)


@pytest.mark.parametrize(
    ("hurt", "found"),
    [
        (lambda one: one.pop("schedule"), "subscription.schedule: missing"),
        (lambda one: one.update(status=None), "subscription.status: null"),
        (lambda one: one["automatic_tax"].update(enabled=None), "subscription.automatic_tax.enabled: null"),
        (lambda one: one["items"]["data"][0].update(price=None), "items.data.subscription_item.price: null"),
        (lambda one: one.update(object="planet"), "planet: no example"),
    ],
)
async def test_answers(place: Place, hurt: Any, found: str) -> None:
    await pro_subscriber(place)
    (entry,) = place.twin.journal.of("POST", "/v1/subscriptions")
    assert list(answer_problems(entry.answer)) == []
    hurt(entry.answer)
    assert any(found in one for one in answer_problems(entry.answer))
    with pytest.raises(AssertionError):
        check_answers(place.twin)
    place.twin.journal.entries.clear()
