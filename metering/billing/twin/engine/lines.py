"""Invoice lines: what a licensed price costs for a period ahead, and a metered one for a period past."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Any, NamedTuple

from metering.billing.twin.engine.periods import Interval
from metering.billing.twin.errors import Object, part
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World


class Span(NamedTuple):
    """A time from *start* up to, and without, *end*."""

    start: int
    end: int


def is_metered(price: Object) -> bool:
    """Whether *price* is billed by a meter."""
    return part(price, "recurring").get("usage_type") == "metered"


def interval_of(price: Object) -> Interval:
    """How often *price* recurs."""
    return Interval(price["recurring"]["interval"], price["recurring"]["interval_count"])


def cents(quantity: int, unit_amount_decimal: str) -> int:
    """What *quantity* units cost, rounded half up to a cent; a negative sum of corrections costs nothing."""
    exact = Decimal(max(quantity, 0)) * Decimal(unit_amount_decimal)
    return int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP))


def line(world: World, price: Object, amount: int, quantity: int, span: Span, **values: Any) -> Object:
    """An invoice line for *price*."""
    return blank(
        "line_item",
        id=world.make_id("il"),
        amount=amount,
        subtotal=amount,
        currency=price["currency"],
        period={"start": span.start, "end": span.end},
        quantity=quantity,
        _price=price,
        pricing={
            "type": "price_details",
            "unit_amount_decimal": price["unit_amount_decimal"],
            "price_details": {"price": price["id"], "product": price["product"]},
        },
        **values,
    )


def of_item(item: Object, *, is_proration: bool = False) -> Object:
    """The `parent` of a line that comes from a subscription's item."""
    return {
        "type": "subscription_item_details",
        "invoice_item_details": None,
        "subscription_item_details": {
            "invoice_item": None,
            "proration": is_proration,
            "proration_details": {"credited_items": None},
            "subscription": item["subscription"],
            "subscription_item": item["id"],
        },
    }


def licensed_line(world: World, item: Object, span: Span, *, share: Decimal = Decimal(1)) -> Object:
    """What *item* costs for *span*; *share* is the part of a whole period, 0 in a trial."""
    price, quantity = item["price"], item["quantity"]
    whole = Decimal(quantity) * Decimal(price["unit_amount_decimal"]) * share
    amount = int(whole.quantize(Decimal(1), rounding=ROUND_HALF_UP))
    name = world.tables["product"][price["product"]]["name"]
    what = f"Trial period for {name}" if share == 0 else f"{quantity} x {name}"
    parent = of_item(item)
    return line(
        world, price, amount, quantity, span, parent=parent, description=what, subscription=item["subscription"]
    )


def metered_line(world: World, customer: str, item: Object, span: Span) -> Object:
    """What the meter of *item* counted in *span*. While the invoice is a draft, `recount` keeps it up to date."""
    made = line(world, item["price"], 0, 0, span, parent=of_item(item), subscription=item["subscription"])
    name = world.tables["product"][item["price"]["product"]]["name"]
    made["_usage"] = {"customer": customer, "price": item["price"], "name": name}
    recount(world, made)
    return made


def recount(world: World, made: Object) -> None:
    """Bring a metered line up to what its meter shows now."""
    usage = made.get("_usage")
    if usage is None:
        return
    price, period = usage["price"], made["period"]
    meter = world.tables["billing.meter"][price["recurring"]["meter"]]
    counted = world.visible_usage(meter, usage["customer"], period["start"], period["end"])
    made["quantity"] = max(counted, 0)
    made["amount"] = made["subtotal"] = cents(counted, price["unit_amount_decimal"])
    made["description"] = f"{made['quantity']} x {usage['name']}"


def line_of_pending(world: World, pending: Object) -> Object:
    """The line that a pending invoice item becomes."""
    span = Span(pending["period"]["start"], pending["period"]["end"])
    subscription = part(pending, "parent", "subscription_details").get("subscription")
    parent: Object = {
        "type": "invoice_item_details",
        "subscription_item_details": None,
        "invoice_item_details": {
            "invoice_item": pending["id"],
            "proration": pending["proration"],
            "proration_details": {"credited_items": None},
            "subscription": subscription,
        },
    }
    made = line(world, pending["_price"], pending["amount"], pending["quantity"], span, parent=parent)
    made["description"] = pending["description"]
    made["subscription"] = subscription
    if pending.get("_usage"):
        made["_usage"] = pending["_usage"]
    return made
