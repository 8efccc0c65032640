"""Money: whatever the order of usage, time and late arrivals, each event is on the one invoice that it belongs to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

import msgspec
from hypothesis import given, settings
from hypothesis.strategies import integers, lists, sampled_from, tuples

from core.clock import ManualClock
from metering.billing.twin.app import Twin
from metering.billing.twin.wire import Request
from tests.harness.stripe_twin import START

HOUR = 3_600
HEADERS = {"authorization": "Bearer sk_test_twin"}
# (hours to let pass, value to report, hours ago that it was used)
STEPS = lists(tuples(integers(0, 500), integers(-(10**6), 10**9), sampled_from([0, 1, 30, 400, 800])), max_size=30)


class Caller:
    """Calls a twin without sockets."""

    def __init__(self) -> None:
        self.clock = ManualClock(START)
        self.twin = Twin(self.clock)

    def post(self, path: str, **params: str) -> Any:
        body = urlencode(
            {name.replace("__", "[") + ("]" if "__" in name else ""): value for name, value in params.items()}
        )
        reply = self.twin.call(Request(method="POST", path=path, headers=HEADERS, body=body.encode()))
        assert reply.status == 200, reply.body
        return msgspec.json.decode(reply.body)

    def subscribe(self) -> tuple[str, str]:
        formula = {"default_aggregation__formula": "sum"}
        meter = self.post("/v1/billing/meters", event_name="usage", display_name="Usage", **formula)["id"]
        product = self.post("/v1/products", name="Pro")["id"]
        recurring = {"recurring__interval": "month", "recurring__usage_type": "metered", "recurring__meter": meter}
        price = self.post("/v1/prices", product=product, currency="usd", unit_amount_decimal="0.0001", **recurring)[
            "id"
        ]
        customer = self.post("/v1/customers", payment_method="pm_card_visa")["id"]
        body = f"customer={customer}&items[0][price]={price}"
        made = self.twin.call(Request(method="POST", path="/v1/subscriptions", headers=HEADERS, body=body.encode()))
        assert made.status == 200
        return customer, price


@settings(max_examples=100, deadline=None)
@given(steps=STEPS)
def test_every_event_is_billed_once_in_its_period_or_came_too_late(steps: list[tuple[int, int, int]]) -> None:
    caller = Caller()
    customer, _ = caller.subscribe()
    begun = caller.twin.state.wall()
    sent: list[tuple[int, int, int]] = []
    for hours, value, ago in steps:
        caller.clock.advance(timedelta(hours=hours))
        used_at = caller.twin.state.wall() - ago * HOUR
        payload = {"payload__stripe_customer_id": customer, "payload__value": str(value)}
        caller.post("/v1/billing/meter_events", event_name="usage", timestamp=str(used_at), **payload)
        sent.append((used_at, caller.twin.state.wall(), value))
    caller.clock.advance(timedelta(days=40))
    caller.twin.tick()
    ends: list[int] = []
    for invoice in caller.twin.state.tables["invoice"].values():
        (line,) = invoice["lines"]["data"]
        start, end = line["period"]["start"], line["period"]["end"]
        if invoice["billing_reason"] == "subscription_create":
            continue
        final = invoice["status_transitions"]["finalized_at"] or 2**40
        # What arrives in the very second of the end is too late: the invoice is closed before the request is read.
        expected = sum(value for used, came, value in sent if start <= used < end and came < final)
        assert line["quantity"] == max(expected, 0)
        assert start == (ends[-1] if ends else begun)
        ends.append(end)
    assert ends
    assert caller.twin.meter_total(customer, "usage", 0, 2**40) == sum(value for _, _, value in sent)
