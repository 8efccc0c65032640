"""What the parameters of a subscription ask for, read and refused before anything is changed."""

from __future__ import annotations

import copy

from metering.billing.twin.engine import payments
from metering.billing.twin.engine.lines import interval_of, is_metered
from metering.billing.twin.engine.subscribing import MIXED_INTERVALS, ItemWish, Wish, add_item, set_price
from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.fields import Fields, merge_metadata
from metering.billing.twin.options import DAY_SECONDS
from metering.billing.twin.resources.products import price_of
from metering.billing.twin.world import World

PRORATIONS = ("create_prorations", "none", "always_invoice")
BEHAVIORS = ("allow_incomplete", "default_incomplete", "error_if_incomplete", "pending_if_incomplete")
LAST_ITEM = "A subscription must have at least one active plan."
# Stripe's limit: two years.
TRIAL_DAYS_MAX = 730


def wish_of(world: World, customer: str, fields: Fields, rows: list[Fields]) -> Wish:
    """What the parameters of a subscription ask for; checkout's `subscription_data` has the same names."""
    method = fields.string("default_payment_method")
    if method is not None:
        method = payments.attach(world, customer, method, "default_payment_method")["id"]
    ending = fields.inner("trial_settings").inner("end_behavior")
    return Wish(
        customer=customer,
        items=[item_wish(world, row) for row in rows],
        trial_end=trial_end_of(world, customer, fields),
        anchor=None if fields.string("billing_cycle_anchor") == "now" else fields.moment("billing_cycle_anchor"),
        cancel_at=fields.moment("cancel_at"),
        cancel_at_period_end=fields.flag("cancel_at_period_end") or False,
        default_payment_method=method,
        collection_method=fields.one_of("collection_method", "charge_automatically", "send_invoice")
        or "charge_automatically",
        days_until_due=fields.whole("days_until_due"),
        billing_mode=fields.inner("billing_mode").one_of("type", "classic", "flexible") or "flexible",
        payment_behavior=behavior_of(fields),
        prorates=fields.one_of("proration_behavior", *PRORATIONS) != "none",
        missing_payment_method=ending.one_of("missing_payment_method", "cancel", "create_invoice", "pause")
        or "create_invoice",
        description=fields.string("description"),
        metadata=merge_metadata({}, fields),
    )


def behavior_of(fields: Fields) -> str:
    """What becomes of a subscription whose payment fails. Errors: 400 for pending updates, which the twin lacks."""
    behavior = fields.one_of("payment_behavior", *BEHAVIORS) or "allow_incomplete"
    if behavior == "pending_if_incomplete":
        raise invalid("payment_behavior", "This twin has no pending updates.")
    return behavior


def item_wish(world: World, row: Fields) -> ItemWish:
    """An item of a subscription as sent: a price by id, or described."""
    described = row.inner("price_data")
    if described.values:
        price = world.add(price_of(world, described))
    else:
        price = world.refer("price", row.must("price"), row.name_of("price"))
    if price["recurring"] is None:
        message = (
            "The price specified is set to `type=one_time` but this field only accepts prices with `type=recurring`."
        )
        raise invalid(row.name_of("price"), message)
    quantity = row.whole("quantity")
    if quantity is not None and is_metered(price):
        message = "You cannot set the quantity of an item with a metered price."
        raise invalid(row.name_of("quantity"), message)
    return ItemWish(price=price, quantity=quantity, metadata=merge_metadata({}, row))


def trial_end_of(world: World, customer: str, fields: Fields) -> int | None:
    """When the trial shall end, by date or by days; `now` is no trial."""
    days = fields.whole("trial_period_days")
    if days is not None:
        if days > TRIAL_DAYS_MAX:
            raise invalid("trial_period_days", f"The trial can have at most {TRIAL_DAYS_MAX} days.")
        return world.now(customer) + days * DAY_SECONDS if days > 0 else None
    return None if fields.string("trial_end") == "now" else fields.moment("trial_end")


def check_items(world: World, subscription: Object, rows: list[Fields]) -> None:
    """Refuse rows that cannot be, before anything is changed: unknown items and prices, and mixed intervals."""
    described = 0
    prices = {item["id"]: item["price"] for item in subscription["items"]["data"]}
    for index, row in enumerate(rows):
        identity = row.string("id")
        if identity is not None and identity not in prices:
            raise invalid(row.name_of("id"), f"No such subscription item: '{identity}'", "resource_missing")
        if row.has("price") or (identity is None and not row.has("price_data")):
            prices[identity or f"new {index}"] = item_wish(world, row).price
        described += row.has("price_data")
        if row.flag("deleted"):
            prices.pop(identity or "", None)
    if not prices and not described:
        raise invalid("items", LAST_ITEM)
    if len({interval_of(price) for price in prices.values()}) > 1:
        raise invalid("items", MIXED_INTERVALS)
    check_no_price_twice(list(prices.values()))


def check_no_price_twice(prices: list[Object]) -> None:
    """Refuse two items of one price: each would bill the same."""
    twice = [price["id"] for index, price in enumerate(prices) if price["id"] in {one["id"] for one in prices[:index]}]
    if twice:
        raise invalid("items", f"Cannot add multiple subscription items with the same plan: {twice[0]}")


def tried(world: World, subscription: Object, rows: list[Fields]) -> Object:
    """A copy of *subscription* with its items as *rows* would make them. Nothing is kept, told or billed."""
    copied = copy.deepcopy(subscription)
    for row in rows:
        _try_item(world, copied, row)
    return copied


def _try_item(world: World, copied: Object, row: Fields) -> None:
    items: list[Object] = copied["items"]["data"]
    item = next((one for one in items if one["id"] == row.string("id")), None)
    if item is None:
        add_item(world, copied, item_wish(world, row))
    elif row.flag("deleted"):
        items.remove(item)
    else:
        if row.has("price"):
            set_price(item, item_wish(world, row).price)
        if (quantity := row.whole("quantity")) is not None and not is_metered(item["price"]):
            item["quantity"] = quantity
