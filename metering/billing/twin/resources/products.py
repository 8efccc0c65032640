"""Products and prices."""

from __future__ import annotations

import re
from decimal import Decimal

from metering.billing.twin.errors import Object, invalid, missing, part
from metering.billing.twin.fields import Fields, merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.routing import Call, get, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

# Of a cent.
DECIMAL_PLACES_MAX = 12
_DECIMAL = re.compile(r"-?\d+(?:\.(\d+))?")


def create_product(world: World, call: Call) -> Object:
    """Create a product."""
    fields = call.fields
    identity = fields.string("id") or world.make_id("prod")
    if identity in world.tables["product"]:
        raise invalid("id", "Product already exists.", "resource_already_exists")
    made = blank(
        "product",
        id=identity,
        name=fields.must("name"),
        description=fields.string("description"),
        unit_label=fields.string("unit_label"),
        metadata=merge_metadata({}, fields),
        created=world.wall(),
        updated=world.wall(),
    )
    if fields.flag("active") is False:
        made["active"] = False
    world.add(made)
    world.emit("product.created", made)
    return made


def update_product(world: World, call: Call) -> Object:
    """Change what was sent."""
    held, fields = world.find("product", call.id), call.fields
    for name in ("name", "description", "unit_label", "default_price"):
        if fields.has(name):
            held[name] = fields.string(name)
    if (active := fields.flag("active")) is not None:
        held["active"] = active
    held["metadata"] = merge_metadata(held["metadata"], fields)
    held["updated"] = world.wall()
    world.emit("product.updated", held)
    return held


def retrieve_product(world: World, call: Call) -> Object:
    """One product."""
    return world.find("product", call.id)


def list_products(world: World, call: Call) -> Object:
    """Products, by `active` and `ids`."""
    ids = call.fields.strings("ids")
    found = only(world.tables["product"].values(), call.fields, "active")
    return page([one for one in found if not ids or one["id"] in ids], call.fields, call.url)


def create_price(world: World, call: Call) -> Object:
    """Create a price. Errors: 400 for a metered price without a meter, or more than twelve decimals of a cent."""
    _check_lookup_key(world, call.fields)
    made = price_of(world, call.fields)
    _take_lookup_key(world, made, call.fields)
    world.add(made)
    world.emit("price.created", made)
    return made


def price_of(world: World, fields: Fields) -> Object:
    """The price that parameters describe; also for `price_data` of checkout's lines."""
    if fields.string("billing_scheme") == "tiered" or fields.has("tiers"):
        raise invalid("billing_scheme", "This twin has no tiered prices.")
    recurring = _recurring_of(world, fields.inner("recurring"))
    whole, exact = _amounts_of(fields)
    return blank(
        "price",
        id=world.make_id("price"),
        created=world.wall(),
        currency=fields.must("currency").lower(),
        product=_product_of(world, fields),
        recurring=recurring,
        type="recurring" if recurring else "one_time",
        unit_amount=whole,
        unit_amount_decimal=exact,
        nickname=fields.string("nickname"),
        tax_behavior=fields.string("tax_behavior") or "unspecified",
        metadata=merge_metadata({}, fields),
    )


def _product_of(world: World, fields: Fields) -> str:
    described = fields.inner("product_data")
    if not described.values:
        return str(world.refer("product", fields.must("product"), fields.name_of("product"))["id"])
    call = Call(names={}, fields=described, url="")
    return str(create_product(world, call)["id"])


def _recurring_of(world: World, fields: Fields) -> Object | None:
    if not fields.values:
        return None
    if fields.has("aggregate_usage"):
        raise invalid("recurring[aggregate_usage]", "Received unknown parameter: recurring[aggregate_usage]")
    usage_type = fields.one_of("usage_type", "licensed", "metered") or "licensed"
    meter = fields.string("meter")
    if usage_type == "metered" and meter is None:
        raise missing(fields.name_of("meter"))
    if meter is not None:
        world.refer("billing.meter", meter, fields.name_of("meter"))
    fields.must("interval")
    return {
        "interval": fields.one_of("interval", "day", "week", "month", "year"),
        "interval_count": fields.whole("interval_count") or 1,
        "meter": meter,
        "trial_period_days": fields.whole("trial_period_days"),
        "usage_type": usage_type,
    }


def _amounts_of(fields: Fields) -> tuple[int | None, str]:
    whole, exact = fields.whole("unit_amount"), fields.string("unit_amount_decimal")
    if (whole is None) == (exact is None):
        raise missing("unit_amount") if whole is None else invalid("unit_amount", "Send one of the two amounts.")
    if exact is None:
        return whole, str(whole)
    shape = _DECIMAL.fullmatch(exact)
    if shape is None or len(shape[1] or "") > DECIMAL_PLACES_MAX:
        raise invalid(
            "unit_amount_decimal", f"Invalid decimal: {exact}; at most {DECIMAL_PLACES_MAX} decimal places are allowed"
        )
    number = Decimal(exact)
    plain = f"{number:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return (int(number) if number == int(number) else None), plain


def _check_lookup_key(world: World, fields: Fields, *, own: Object | None = None) -> None:
    """Errors: 400 if another price has the key and is not to lose it."""
    key = fields.string("lookup_key")
    for other in world.tables["price"].values():
        if (
            key is not None
            and other["lookup_key"] == key
            and other is not own
            and not fields.flag("transfer_lookup_key")
        ):
            message = f"A price (`{other['id']}`) already uses that lookup key."
            raise invalid("lookup_key", message, "resource_already_exists")


def _take_lookup_key(world: World, made: Object, fields: Fields) -> None:
    key = fields.string("lookup_key")
    if key is None:
        return
    for other in world.tables["price"].values():
        if other["lookup_key"] == key and other is not made:
            other["lookup_key"] = None
            world.emit("price.updated", other, {"lookup_key": key})
    made["lookup_key"] = key


def update_price(world: World, call: Call) -> Object:
    """Change what may be changed of a price: not its amount."""
    held, fields = world.find("price", call.id), call.fields
    _check_lookup_key(world, fields, own=held)
    if (active := fields.flag("active")) is not None:
        held["active"] = active
    if fields.has("nickname"):
        held["nickname"] = fields.string("nickname")
    _take_lookup_key(world, held, fields)
    held["metadata"] = merge_metadata(held["metadata"], fields)
    world.emit("price.updated", held)
    return held


def retrieve_price(world: World, call: Call) -> Object:
    """One price."""
    return world.find("price", call.id)


def list_prices(world: World, call: Call) -> Object:
    """Prices, by `active`, `currency`, `product`, `type`, `lookup_keys` and `recurring`."""
    fields = call.fields
    keys, recurring = fields.strings("lookup_keys"), fields.inner("recurring").values
    found = only(world.tables["price"].values(), fields, "active", "currency", "product", "type")
    chosen = [
        one
        for one in found
        if (not keys or one["lookup_key"] in keys)
        and all(part(one, "recurring").get(name) == value for name, value in recurring.items())
    ]
    return page(chosen, fields, call.url)


ROUTES = [
    post("/v1/products", create_product),
    get("/v1/products", list_products),
    get("/v1/products/{id}", retrieve_product),
    post("/v1/products/{id}", update_product),
    post("/v1/prices", create_price),
    get("/v1/prices", list_prices),
    get("/v1/prices/{id}", retrieve_price),
    post("/v1/prices/{id}", update_price),
]
