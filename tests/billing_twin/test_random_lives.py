"""Random lives of customers: whatever they do in whatever order, the twin keeps Stripe's invariants and shapes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from random import Random
from typing import Any
from urllib.parse import urlencode

import msgspec
from hypothesis import given, settings
from hypothesis.strategies import integers

from core.clock import ManualClock
from metering.billing.twin.app import Twin
from metering.billing.twin.options import TwinOptions
from metering.billing.twin.wire import Request
from tests.harness.stripe_twin import START
from tests.harness.stripe_types import check_answers

DAY = 86_400
CARDS = ["pm_card_visa", "pm_card_chargeCustomerFail"]
RUNNING = {"active", "trialing", "past_due", "unpaid"}


def flat(tree: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in flat(value, f"{path}[{key}]" if path else key)]
    if isinstance(tree, list):
        return [pair for index, value in enumerate(tree) for pair in flat(value, f"{path}[{index}]")]
    return [(path, str(tree))]


class Life:
    """Four customers, two of them on a test clock, and what may happen to them."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.clock = ManualClock(START)
        outcome: Any = chance.choice(["canceled", "unpaid", "past_due"])
        self.twin = Twin(self.clock, TwinOptions(after_last_retry=outcome))
        self.subscriptions: list[str] = []
        self._make_catalogue()
        self._make_customers()
        self.acts: list[Callable[[], Any]] = [
            *(self.subscribe, self.subscribe, self.use, self.use, self.use, self.swap, self.cancel_later, self.cancel),
            *(
                self.pause,
                self.resume,
                self.change_trial,
                self.move_invoice,
                self.grant,
                self.preview,
                self.change_card,
            ),
            *(self.add_item, self.advance_clock),
        ]

    def call(self, method: str, path: str, **params: Any) -> Any:
        """The answer, or None where it was refused."""
        encoded = urlencode(flat(params))
        query, body = ("", encoded.encode()) if method == "POST" else (encoded, b"")
        headers = {"authorization": "Bearer sk_test_twin"}
        reply = self.twin.call(Request(method=method, path=path, query=query, body=body, headers=headers))
        assert reply.status < 500
        return msgspec.json.decode(reply.body) if reply.status == 200 else None

    def _make_catalogue(self) -> None:
        product = self.call("POST", "/v1/products", name="Pro")["id"]
        formula = {"formula": "sum"}
        path = "/v1/billing/meters"
        meter = self.call("POST", path, event_name="usage", display_name="Usage", default_aggregation=formula)["id"]
        common = {"product": product, "currency": "usd"}
        # (plan, metered price) of one interval
        self.prices: list[tuple[str, str]] = []
        for interval in ("month", "month", "year", "week"):
            amount, recurring = self.chance.randint(0, 10_000), {"interval": interval}
            plan = self.call("POST", "/v1/prices", **common, unit_amount=amount, recurring=recurring)
            by_meter = {**recurring, "usage_type": "metered", "meter": meter}
            metered = self.call("POST", "/v1/prices", **common, unit_amount_decimal="0.0001", recurring=by_meter)
            self.prices.append((plan["id"], metered["id"]))
        feature = self.call("POST", "/v1/entitlements/features", name="Agents", lookup_key="agents")["id"]
        self.call("POST", f"/v1/products/{product}/features", entitlement_feature=feature)

    def _make_customers(self) -> None:
        path = "/v1/test_helpers/test_clocks"
        self.test_clock = self.call("POST", path, frozen_time=self.twin.state.wall())["id"]
        self.customers: list[str] = []
        for number in range(4):
            wish: dict[str, Any] = {"test_clock": self.test_clock} if number % 2 else {}
            if number:
                card = self.chance.choice(CARDS)
                wish |= {"payment_method": card, "invoice_settings": {"default_payment_method": card}}
            self.customers.append(self.call("POST", "/v1/customers", **wish)["id"])

    def now(self, customer: str) -> int:
        return self.twin.state.now(customer)

    def one_of_them(self) -> str:
        return self.chance.choice(self.subscriptions or ["sub_none"])

    def maybe(self, share: float, **values: Any) -> dict[str, Any]:
        return values if self.chance.random() < share else {}

    def subscribe(self) -> None:
        chance, customer = self.chance, self.chance.choice(self.customers)
        plan, metered = chance.choice(self.prices)
        behaviour = chance.choice(["cancel", "pause", "create_invoice"])
        wish = {
            "items": [{"price": plan}, *([{"price": metered}] if chance.random() < 0.7 else [])],
            **self.maybe(0.3, trial_period_days=chance.randint(1, 20)),
            **self.maybe(0.3, trial_settings={"end_behavior": {"missing_payment_method": behaviour}}),
            **self.maybe(0.2, collection_method="send_invoice"),
            **self.maybe(0.2, payment_behavior="default_incomplete"),
            **self.maybe(0.2, billing_cycle_anchor=self.now(customer) + chance.randint(1, 6 * DAY)),
            **self.maybe(0.5, billing_mode={"type": chance.choice(["classic", "flexible"])}),
        }
        if made := self.call("POST", "/v1/subscriptions", customer=customer, **wish):
            self.subscriptions.append(made["id"])

    def use(self) -> None:
        customer = self.chance.choice(self.customers)
        payload = {"stripe_customer_id": customer, "value": self.chance.randint(-(10**6), 10**9)}
        at = self.now(customer) - self.chance.randint(0, 9 * DAY)
        self.call("POST", "/v1/billing/meter_events", event_name="usage", payload=payload, timestamp=at)

    def swap(self) -> None:
        subscription = self.twin.state.tables["subscription"].get(self.one_of_them())
        if subscription:
            item = self.chance.choice(subscription["items"]["data"])["id"]
            price = self.chance.choice(self.chance.choice(self.prices))
            behavior = self.chance.choice(["none", "create_prorations", "always_invoice"])
            change = {"items": [{"id": item, "price": price}], "proration_behavior": behavior}
            self.call("POST", f"/v1/subscriptions/{subscription['id']}", **change)

    def cancel_later(self) -> None:
        wanted = self.chance.choice(["true", "false"])
        self.call("POST", f"/v1/subscriptions/{self.one_of_them()}", cancel_at_period_end=wanted)

    def cancel(self) -> None:
        flags = {name: self.chance.choice(["true", "false"]) for name in ("invoice_now", "prorate")}
        if self.chance.random() < 0.4:
            self.call("DELETE", f"/v1/subscriptions/{self.one_of_them()}", **flags)

    def pause(self) -> None:
        behavior = self.chance.choice(["void", "keep_as_draft", "mark_uncollectible"])
        pause = {"behavior": behavior, "resumes_at": self.twin.state.wall() + self.chance.randint(1, 50) * DAY}
        self.call("POST", f"/v1/subscriptions/{self.one_of_them()}", pause_collection=pause)

    def resume(self) -> None:
        self.call("POST", f"/v1/subscriptions/{self.one_of_them()}/resume")

    def change_trial(self) -> None:
        end = self.chance.choice(["now", self.twin.state.wall() + 20 * DAY])
        self.call("POST", f"/v1/subscriptions/{self.one_of_them()}", trial_end=end)

    def move_invoice(self) -> None:
        invoice = self.chance.choice(list(self.twin.state.tables["invoice"]) or ["in_none"])
        act = self.chance.choice(["pay", "finalize", "void", "mark_uncollectible"])
        self.call("POST", f"/v1/invoices/{invoice}/{act}")

    def grant(self) -> None:
        amount = {"type": "monetary", "monetary": {"currency": "usd", "value": self.chance.randint(1, 5_000)}}
        scope = {"scope": {"price_type": "metered"}}
        wish = {"customer": self.chance.choice(self.customers), "amount": amount, "applicability_config": scope}
        self.call("POST", "/v1/billing/credit_grants", **wish)

    def preview(self) -> None:
        self.call("POST", "/v1/invoices/create_preview", subscription=self.one_of_them())

    def change_card(self) -> None:
        settings_ = {"default_payment_method": self.chance.choice(CARDS)}
        self.call("POST", f"/v1/customers/{self.chance.choice(self.customers)}", invoice_settings=settings_)

    def add_item(self) -> None:
        price = self.chance.choice(self.chance.choice(self.prices))
        self.call("POST", "/v1/subscription_items", subscription=self.one_of_them(), price=price)

    def advance_clock(self) -> None:
        held = self.twin.state.tables["test_helpers.test_clock"][self.test_clock]
        target = held["frozen_time"] + self.chance.randint(1, 30) * DAY
        self.call("POST", f"/v1/test_helpers/test_clocks/{self.test_clock}/advance", frozen_time=target)

    def check(self) -> None:
        tables = self.twin.state.tables
        for invoice in tables["invoice"].values():
            if invoice["status"] != "draft":
                assert invoice["amount_paid"] in {0, invoice["amount_due"]}
                assert invoice["amount_paid"] + invoice["amount_remaining"] == invoice["amount_due"] >= 0
        for subscription in tables["subscription"].values():
            if subscription["status"] in RUNNING:
                assert subscription["_period_start"] <= self.now(subscription["customer"]) < subscription["_period_end"]
        for credit in tables["billing.credit_grant"].values():
            assert 0 <= credit["_used"] <= credit["amount"]["monetary"]["value"]


@settings(max_examples=25, deadline=None)
@given(seed=integers(0, 2**32))
def test_any_life_keeps_the_invariants(seed: int) -> None:
    """Guarantee: paid + remaining = due, now is in the current period, no grant pays more than it has, no field is lost."""
    chance = Random(seed)
    life = Life(chance)
    for _ in range(60):
        chance.choice(life.acts)()
        life.clock.advance(timedelta(hours=chance.choice([0, 0, 1, 30, 200])))
        life.twin.tick()
        life.check()
    check_answers(life.twin)
