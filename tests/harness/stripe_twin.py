"""A twin on a socket with the real Stripe client in front of it, on a clock that tests move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import stripe
from stripe import StripeClient

from core.clock import ManualClock
from metering.billing.twin.app import Twin
from metering.billing.twin.options import TwinOptions
from metering.billing.twin.server import TwinServer, serving

START = datetime(2027, 1, 15, 12, 0, tzinfo=UTC)


def client_of(url: str, key: str = "sk_test_twin", retries: int = 0) -> StripeClient:
    """The real client, towards the twin."""
    return StripeClient(
        key,
        base_addresses={"api": url, "meter_events": url},
        http_client=stripe.HTTPXClient(timeout=20),
        max_network_retries=retries,
    )


@dataclass
class Place:
    """A twin, its server, its clock, and a client."""

    twin: Twin
    server: TwinServer
    clock: ManualClock
    client: StripeClient

    @property
    def v1(self) -> Any:
        return self.client.v1

    @property
    def now(self) -> int:
        return self.twin.state.wall()

    def pass_time(self, **step: float) -> None:
        self.clock.advance(timedelta(**step))
        self.twin.tick()

    def events(self, *types: str) -> list[dict[str, Any]]:
        """The snapshot events so far, oldest first."""
        return [one for one in self.twin.state.tables["event"].values() if not types or one["type"] in types]

    def event_types(self) -> list[str]:
        return [one["type"] for one in self.events()]


@asynccontextmanager
async def twin_place(options: TwinOptions | None = None, start: datetime = START) -> AsyncGenerator[Place]:
    """A fresh twin for a block."""
    clock = ManualClock(start)
    twin = Twin(clock, options)
    async with serving(twin) as server:
        client = client_of(server.url, twin.options.api_key)
        try:
            yield Place(twin, server, clock, client)
        finally:
            await client._requestor._client.close_async()


async def wait_for(condition: asyncio.Event) -> None:
    async with asyncio.timeout(10):
        await condition.wait()


@dataclass
class Shop:
    """A product with a plan and a metered price, and a customer on a test clock."""

    place: Place
    product: str
    meter: str
    plan: str
    metered: str
    clock: str
    customer: str
    subscription: str = ""

    async def use(self, value: int, identifier: str | None = None, at: int | None = None) -> Any:
        """Send one meter event."""
        event: dict[str, Any] = {
            "event_name": "usage",
            "payload": {"stripe_customer_id": self.customer, "value": str(value)},
            "timestamp": at if at is not None else await self.now(),
        }
        if identifier is not None:
            event["identifier"] = identifier
        return await self.place.v1.billing.meter_events.create_async(event)

    async def now(self) -> int:
        held = await self.place.v1.test_helpers.test_clocks.retrieve_async(self.clock)
        return held.frozen_time

    async def advance(self, **step: float) -> None:
        """Move the customer's test clock, and the twin's own with it."""
        target = await self.now() + int(timedelta(**step).total_seconds())
        await self.place.v1.test_helpers.test_clocks.advance_async(self.clock, {"frozen_time": target})
        self.place.twin.tick()

    async def subscribe(self, **more: Any) -> Any:
        items = more.pop("items", [{"price": self.plan, "quantity": 1}, {"price": self.metered}])
        made = await self.place.v1.subscriptions.create_async({"customer": self.customer, "items": items, **more})
        self.subscription = made.id
        return made

    async def reread(self) -> Any:
        return await self.place.v1.subscriptions.retrieve_async(self.subscription)

    async def invoices(self) -> list[Any]:
        """Newest first."""
        return (await self.place.v1.invoices.list_async({"customer": self.customer, "limit": 100})).data


async def shop_at(place: Place, card: str | None = "pm_card_visa", **meter: Any) -> Shop:
    """A shop whose customer has *card*, or no card."""
    v1 = place.v1
    product = await v1.products.create_async({"name": "Pro"})
    wanted = {"event_name": "usage", "display_name": "Usage", "default_aggregation": {"formula": "sum"}}
    made = await v1.billing.meters.create_async(wanted | meter)
    month = {"interval": "month"}
    common = {"product": product.id, "currency": "usd"}
    plan = await v1.prices.create_async({**common, "unit_amount": 9_900, "recurring": month})
    by_meter = {**month, "usage_type": "metered", "meter": made.id}
    metered = await v1.prices.create_async({**common, "unit_amount_decimal": "0.0001", "recurring": by_meter})
    clock = await v1.test_helpers.test_clocks.create_async({"frozen_time": place.now})
    wish: dict[str, Any] = {"email": "a@example.com", "test_clock": clock.id}
    if card is not None:
        wish |= {"payment_method": card, "invoice_settings": {"default_payment_method": card}}
    customer = await v1.customers.create_async(wish)
    return Shop(place, product.id, made.id, plan.id, metered.id, clock.id, customer.id)


async def pro_subscriber(place: Place, **more: Any) -> Shop:
    """A shop whose customer subscribed to the plan."""
    shop = await shop_at(place)
    await shop.subscribe(**more)
    return shop
