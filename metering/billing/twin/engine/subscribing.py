"""How a subscription begins: its items, its anchor, its trial, its first invoice."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec

from metering.billing.twin.engine import entitlements, invoicing, payments
from metering.billing.twin.engine.lines import Span, interval_of, is_metered, licensed_line, metered_line
from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.options import DAY_SECONDS
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

TRIAL_NOTICE_SECONDS = 3 * DAY_SECONDS
# How long an incomplete subscription waits for its first payment.
INCOMPLETE_SECONDS = 23 * 3_600
MIXED_INTERVALS = "All prices on a subscription must have the same `recurring.interval` in this twin."


class ItemWish(msgspec.Struct, frozen=True, kw_only=True):
    """An item to be: a price, and how many of it (metered prices have no quantity)."""

    price: Object
    quantity: int | None = None
    metadata: dict[str, str] = {}


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a subscription shall be like. Times are Unix seconds."""

    customer: str
    items: list[ItemWish]
    trial_end: int | None = None
    anchor: int | None = None
    cancel_at: int | None = None
    cancel_at_period_end: bool = False
    default_payment_method: str | None = None
    collection_method: str = "charge_automatically"
    days_until_due: int | None = None
    billing_mode: str = "flexible"
    payment_behavior: str = "allow_incomplete"
    prorates: bool = True
    missing_payment_method: str = "create_invoice"
    description: str | None = None
    metadata: dict[str, str] = {}


def begin(world: World, wish: Wish) -> Object:
    """Create the subscription that *wish* describes, bill what is due at once, and tell. Errors: 402 if so wished."""
    _refuse_what_cannot_be(world, wish)
    subscription = _made(world, wish)
    _set_first_period(world, subscription, wish)
    for item in wish.items:
        add_item(world, subscription, item)
    entitlements.take_features(world, subscription)
    lines = _first_lines(world, subscription, prorates=wish.prorates)
    needs_money = any(line["amount"] for line in lines) and wish.collection_method == "charge_automatically"
    if needs_money and wish.payment_behavior in {"allow_incomplete", "error_if_incomplete"}:
        card = payments.require_card(payments.card_of(world, wish.customer, wish.default_payment_method))
        if wish.payment_behavior == "error_if_incomplete" and not card["_succeeds"]:
            raise payments.declined()
    if needs_money and subscription["status"] == "active":
        subscription["status"] = "incomplete"
    world.add(subscription)
    world.tables["customer"][wish.customer]["currency"] = subscription["currency"]
    for item in subscription["items"]["data"]:
        world.add(item)
    world.emit("customer.subscription.created", subscription)
    _bill_first(world, subscription, lines, collects=wish.payment_behavior != "default_incomplete")
    _plan_what_follows(world, subscription)
    entitlements.refresh(world, wish.customer)
    return subscription


def _refuse_what_cannot_be(world: World, wish: Wish) -> None:
    if not wish.items:
        raise invalid("items", "Missing required param: items.", "parameter_missing")
    intervals = {interval_of(item.price) for item in wish.items}
    if len(intervals) > 1:
        raise invalid("items", MIXED_INTERVALS)
    if len({item.price["currency"] for item in wish.items}) > 1:
        raise invalid("items", "All prices on a subscription must have the same currency.")
    now = world.now(wish.customer)
    for name, at in (
        ("trial_end", wish.trial_end),
        ("billing_cycle_anchor", wish.anchor),
        ("cancel_at", wish.cancel_at),
    ):
        if at is not None and at <= now:
            raise invalid(name, f"The `{name}` must be in the future.")


def _made(world: World, wish: Wish) -> Object:
    now = world.now(wish.customer)
    customer = world.tables["customer"][wish.customer]
    identity = world.make_id("sub")
    return blank(
        "subscription",
        id=identity,
        billing_mode={"type": wish.billing_mode, "flexible": None},
        cancel_at=wish.cancel_at,
        cancel_at_period_end=wish.cancel_at_period_end,
        collection_method=wish.collection_method,
        created=now,
        currency=wish.items[0].price["currency"],
        customer=wish.customer,
        days_until_due=wish.days_until_due,
        default_payment_method=wish.default_payment_method,
        description=wish.description,
        items={
            "object": "list",
            "data": [],
            "has_more": False,
            "url": f"/v1/subscription_items?subscription={identity}",
        },
        metadata=dict(wish.metadata),
        start_date=now,
        status="active",
        test_clock=customer["test_clock"],
        trial_settings={"end_behavior": {"missing_payment_method": wish.missing_payment_method}},
    )


def _set_first_period(world: World, subscription: Object, wish: Wish) -> None:
    now = world.now(wish.customer)
    interval = interval_of(wish.items[0].price)
    if wish.trial_end is not None:
        subscription |= {"status": "trialing", "trial_start": now, "trial_end": wish.trial_end}
        subscription["billing_cycle_anchor"] = wish.anchor or wish.trial_end
        set_period(subscription, Span(now, wish.trial_end))
        return
    anchor = wish.anchor or now
    subscription["billing_cycle_anchor"] = anchor
    # An anchor ahead of now makes a shorter first period.
    set_period(subscription, Span(now, interval.after(now) if anchor == now else interval.around(anchor, now)[1]))


def set_period(subscription: Object, span: Span) -> None:
    """Set the current period of the subscription and of its items."""
    subscription["_period_start"], subscription["_period_end"] = span
    for item in subscription["items"]["data"]:
        item["current_period_start"], item["current_period_end"] = span


def period_of(subscription: Object) -> Span:
    """The current period."""
    return Span(subscription["_period_start"], subscription["_period_end"])


def add_item(world: World, subscription: Object, wish: ItemWish) -> Object:
    """Put an item on the subscription. Errors: 400 for a metered price with a quantity."""
    if is_metered(wish.price) and wish.quantity is not None:
        raise invalid("items[0][quantity]", "You cannot set the quantity of a metered price.")
    now = world.now(subscription["customer"])
    span = period_of(subscription)
    item = blank(
        "subscription_item",
        id=world.make_id("si"),
        created=now,
        current_period_start=span.start,
        current_period_end=span.end,
        metadata=dict(wish.metadata),
        price=wish.price,
        plan=_plan_of(wish.price),
        quantity=None if is_metered(wish.price) else (1 if wish.quantity is None else wish.quantity),
        subscription=subscription["id"],
    )
    if is_metered(wish.price):
        del item["quantity"]
    item["_usage_from"] = now
    subscription["items"]["data"].append(item)
    return item


def _plan_of(price: Object) -> Object:
    recurring = price["recurring"]
    return blank(
        "plan",
        **{name: price[name] for name in ("id", "active", "created", "currency", "nickname", "product")},
        amount=price["unit_amount"],
        amount_decimal=price["unit_amount_decimal"],
        interval=recurring["interval"],
        interval_count=recurring["interval_count"],
        meter=recurring["meter"],
        usage_type=recurring["usage_type"],
    )


def set_price(item: Object, price: Object) -> None:
    """Put another price on *item*."""
    item["price"], item["plan"] = price, _plan_of(price)
    if is_metered(price):
        item.pop("quantity", None)
    else:
        item["quantity"] = item.get("quantity") or 1


def _first_lines(world: World, subscription: Object, *, prorates: bool) -> list[Object]:
    span = period_of(subscription)
    interval = interval_of(subscription["items"]["data"][0]["price"])
    share = Decimal(span.end - span.start) / Decimal(interval.after(span.start) - span.start)
    if subscription["status"] == "trialing" or (share < 1 and not prorates):
        share = Decimal(0)
    return ahead_and_behind(world, subscription, span, Span(span.start, span.start), share=share)


def ahead_and_behind(
    world: World, subscription: Object, ahead: Span | None, behind: Span | None, *, share: Decimal = Decimal(1)
) -> list[Object]:
    """The lines of an invoice: licensed items for the span *ahead*, metered ones for the span *behind*."""
    lines: list[Object] = []
    for item in subscription["items"]["data"]:
        if is_metered(item["price"]) and behind is not None:
            start = min(max(behind.start, item["_usage_from"]), behind.end)
            lines.append(metered_line(world, subscription["customer"], item, Span(start, behind.end)))
        elif not is_metered(item["price"]) and ahead is not None:
            lines.append(licensed_line(world, item, ahead, share=share))
    return lines


def _bill_first(world: World, subscription: Object, lines: list[Object], *, collects: bool) -> None:
    span = period_of(subscription)
    invoice = invoicing.draft(world, subscription, "subscription_create", lines, Span(span.start, span.start))
    bill_now(world, subscription, invoice, collects=collects)


def bill_now(world: World, subscription: Object, invoice: Object, *, collects: bool = True) -> None:
    """Finalise *invoice* at once, and charge it unless the customer is sent a bill or pays it by hand."""
    invoicing.finalise(world, invoice)
    if invoice["amount_due"] == 0:
        invoicing.mark_paid(world, invoice)
    elif subscription["collection_method"] == "send_invoice":
        set_due_date(world, subscription, invoice)
    elif collects:
        invoicing.collect(world, invoice)


def set_due_date(world: World, subscription: Object, invoice: Object) -> None:
    """Say until when a bill that was sent has to be paid."""
    days = subscription["days_until_due"] or 30
    invoice["due_date"] = world.now(invoice["customer"]) + days * DAY_SECONDS


def _plan_what_follows(world: World, subscription: Object) -> None:
    customer, identity = subscription["customer"], subscription["id"]
    if subscription["status"] == "incomplete":
        world.plan(customer, world.now(customer) + INCOMPLETE_SECONDS, "subscription.expire", identity)
    if subscription["cancel_at"]:
        world.plan(customer, subscription["cancel_at"], "subscription.cancel", identity)
    plan_trial_notice(world, subscription)
    plan_period_end(world, subscription)


def plan_trial_notice(world: World, subscription: Object) -> None:
    """Have the customer told three days before a trial ends; at once if it is shorter."""
    if subscription["trial_end"] and subscription["status"] == "trialing":
        customer = subscription["customer"]
        at = max(subscription["trial_end"] - TRIAL_NOTICE_SECONDS, world.now(customer))
        world.plan(customer, at, "subscription.trial_will_end", subscription["id"])


def plan_period_end(world: World, subscription: Object) -> None:
    """Plan the end of the current period, and the notice of the invoice that comes with it."""
    customer, end = subscription["customer"], subscription["_period_end"]
    notice = end - world.options.upcoming_days * DAY_SECONDS
    if notice > world.now(customer):
        world.plan(customer, notice, "subscription.upcoming", subscription["id"])
    world.plan(customer, end, "subscription.period_end", subscription["id"])


def changed(subscription: Object, values: dict[str, Any]) -> Object:
    """Write *values* on the subscription. Returns what they replaced: an event's `previous_attributes`."""
    before: Object = {}
    for name, value in values.items():
        if subscription[name] != value:
            before[name] = subscription[name]
            subscription[name] = value
    return before
