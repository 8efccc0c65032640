"""Changes of a running subscription: prorations, and what a swapped metered price does with usage so far."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from metering.billing.twin.engine import invoicing
from metering.billing.twin.engine.lines import Span, interval_of, is_metered
from metering.billing.twin.engine.subscribing import (
    ItemWish,
    add_item,
    ahead_and_behind,
    bill_now,
    period_of,
    plan_period_end,
    set_period,
    set_price,
)
from metering.billing.twin.errors import Object
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World


def change_item(world: World, subscription: Object, item: Object, wish: ItemWish, *, prorates: bool) -> None:
    """Put another price or quantity on *item*; *prorates* bills the difference for the rest of the period."""
    old = item["price"]
    if is_metered(old) or is_metered(wish.price):
        _swap_metered(world, subscription, item, wish, prorates=prorates)
        return
    same_interval = interval_of(old) == interval_of(wish.price)
    running = subscription["status"] in {"active", "past_due"}
    if prorates and running:
        _prorate(world, subscription, item, -1, "Unused time on")
    set_price(item, wish.price)
    if wish.quantity is not None:
        item["quantity"] = wish.quantity
    # With another interval a new period begins, which is billed whole.
    if prorates and running and same_interval:
        _prorate(world, subscription, item, 1, "Remaining time on")


def _swap_metered(world: World, subscription: Object, item: Object, wish: ItemWish, *, prorates: bool) -> None:
    """Classic billing forgets what was used at the old price; flexible billing keeps it as a pending line."""
    now = world.now(subscription["customer"])
    keeps_usage = subscription["billing_mode"]["type"] == "flexible" and prorates
    if keeps_usage and is_metered(item["price"]) and subscription["status"] != "trialing":
        keep_usage(world, subscription, item)
    set_price(item, wish.price)
    item["_usage_from"] = now


def keep_usage(world: World, subscription: Object, item: Object) -> None:
    """Turn what the item's meter counted so far into a pending line of the next invoice."""
    now = world.now(subscription["customer"])
    start = max(subscription["_period_start"], item["_usage_from"])
    product = world.tables["product"][item["price"]["product"]]
    usage = {"customer": subscription["customer"], "price": item["price"], "name": product["name"]}
    values: Object = {"description": product["name"], "_usage": usage, "quantity": 0}
    _pend(world, subscription, item["price"], Span(start, now), amount=0, **values)


def _prorate(world: World, subscription: Object, item: Object, sign: int, words: str) -> None:
    now = world.now(subscription["customer"])
    whole = period_of(subscription)
    share = Decimal(whole.end - now) / Decimal(whole.end - whole.start)
    exact = Decimal(item["price"]["unit_amount_decimal"]) * item["quantity"] * share
    amount = sign * int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP))
    name = world.tables["product"][item["price"]["product"]]["name"]
    values: Object = {"description": f"{words} {name}", "quantity": item["quantity"]}
    _pend(world, subscription, item["price"], Span(now, whole.end), amount=amount, **values)


def _pend(world: World, subscription: Object, price: Object, span: Span, **values: Any) -> None:
    """Keep an invoice item for the subscription's next invoice."""
    made = blank(
        "invoiceitem",
        id=world.make_id("ii"),
        currency=price["currency"],
        customer=subscription["customer"],
        date=world.now(subscription["customer"]),
        parent={"type": "subscription_details", "subscription_details": {"subscription": subscription["id"]}},
        period={"start": span.start, "end": span.end},
        proration=True,
        test_clock=subscription["test_clock"],
        **values,
    )
    made |= {"net_amount": made["amount"], "quantity_decimal": str(made["quantity"])}
    made |= {"_subscription": subscription["id"], "_price": price}
    world.add(made)
    world.emit("invoiceitem.created", made)


def add(world: World, subscription: Object, wish: ItemWish, *, prorates: bool) -> None:
    """Put a further item on a running subscription."""
    item = add_item(world, subscription, wish)
    world.add(item)
    if prorates and not is_metered(wish.price) and subscription["status"] in {"active", "past_due"}:
        _prorate(world, subscription, item, 1, "Remaining time on")


def remove(world: World, subscription: Object, item: Object, *, prorates: bool) -> None:
    """Take an item off. Flexible billing keeps its usage so far; a licensed one's rest is credited."""
    is_flexible = subscription["billing_mode"]["type"] == "flexible"
    if prorates and is_metered(item["price"]) and is_flexible and subscription["status"] != "trialing":
        keep_usage(world, subscription, item)
    elif prorates and not is_metered(item["price"]):
        _prorate(world, subscription, item, -1, "Unused time on")
    subscription["items"]["data"].remove(item)
    del world.tables["subscription_item"][item["id"]]


def restart_period(world: World, subscription: Object) -> None:
    """Begin a new period now, and bill it: after a change of interval, of the anchor, or the end of a trial."""
    now = world.now(subscription["customer"])
    past = period_of(subscription)
    interval = interval_of(subscription["items"]["data"][0]["price"])
    was_trial = subscription["status"] == "trialing"
    subscription["billing_cycle_anchor"] = now
    set_period(subscription, Span(now, interval.after(now)))
    if was_trial or subscription["status"] == "paused":
        subscription["status"] = "active"
    behind = Span(now, now) if was_trial else Span(past.start, now)
    lines = ahead_and_behind(world, subscription, period_of(subscription), behind)
    for item in subscription["items"]["data"]:
        item["_usage_from"] = now
    invoice = invoicing.draft(world, subscription, "subscription_update", lines, behind)
    bill_now(world, subscription, invoice)
    plan_period_end(world, subscription)


def bill_pending(world: World, subscription: Object) -> None:
    """Bill prorations at once instead of with the next period: `proration_behavior=always_invoice`."""
    if invoicing.pending_of(world, subscription):
        now = world.now(subscription["customer"])
        invoice = invoicing.draft(world, subscription, "subscription_update", [], Span(now, now))
        bill_now(world, subscription, invoice)


def credit_rest(world: World, subscription: Object, item: Object) -> None:
    """Credit what was paid for the rest of the period: for a cancellation that prorates."""
    if not is_metered(item["price"]) and subscription["status"] in {"active", "past_due"}:
        _prorate(world, subscription, item, -1, "Unused time on")


def due_at_once(world: World, subscription: Object, copied: Object, *, restarts: bool) -> int:
    """Cents that changing *subscription* into *copied* would charge now; *restarts* begins a new, whole period."""
    now = world.now(subscription["customer"])
    whole = period_of(subscription)
    left = Decimal(whole.end - now) / Decimal(whole.end - whole.start)
    unused = Decimal(0) if subscription["status"] == "trialing" else _licensed_cents(subscription) * left
    return int(_licensed_cents(copied) * (1 if restarts else left) - unused)


def _licensed_cents(subscription: Object) -> Decimal:
    items: list[Object] = [item for item in subscription["items"]["data"] if not is_metered(item["price"])]
    return sum((Decimal(item["price"]["unit_amount_decimal"]) * item["quantity"] for item in items), Decimal(0))
