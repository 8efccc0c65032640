"""Customers."""

from __future__ import annotations

from metering.billing.twin.engine import payments, standing
from metering.billing.twin.errors import Object, StripeError
from metering.billing.twin.fields import Fields, merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.routing import Call, delete, get, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

_TEXTS = ("description", "email", "name", "phone")


def create_customer(world: World, call: Call) -> Object:
    """Create a customer, on a test clock if one is named."""
    fields = call.fields
    clock = fields.string("test_clock")
    if clock is not None:
        world.refer("test_helpers.test_clock", clock, "test_clock")
    made = new_customer(world, clock)
    for name in _TEXTS:
        made[name] = fields.string(name)
    made["metadata"] = merge_metadata({}, fields)
    made["balance"] = fields.whole("balance") or 0
    made["address"] = _address(fields)
    try:
        _attach_first_method(world, made, fields)
    except StripeError:
        # Nothing is left of a customer who could not be created whole.
        del world.tables["customer"][made["id"]]
        raise
    world.emit("customer.created", made)
    return made


def _attach_first_method(world: World, customer: Object, fields: Fields) -> None:
    if (method := fields.string("payment_method")) is not None:
        attached = payments.attach(world, customer["id"], method)
        customer["_attached"] = {method: attached["id"]}
    _set_default_method(world, customer, fields)


def new_customer(world: World, clock: str | None = None) -> Object:
    """A customer of whom nothing is known yet. The caller tells of it."""
    identity = world.make_id("cus")
    nothing = {"custom_fields": None, "default_payment_method": None, "footer": None, "rendering_options": None}
    made = blank(
        "customer", id=identity, invoice_prefix=identity[4:12].upper(), invoice_settings=nothing, test_clock=clock
    )
    world.add(made)
    made["created"] = world.now(identity)
    return made


def _address(fields: Fields) -> Object | None:
    sent = fields.inner("address")
    if not sent.values:
        return None
    return {name: sent.string(name) for name in ("city", "country", "line1", "line2", "postal_code", "state")}


def _set_default_method(world: World, customer: Object, fields: Fields) -> None:
    settings = fields.inner("invoice_settings")
    if not settings.has("default_payment_method"):
        return
    chosen = settings.string("default_payment_method")
    if chosen is not None:
        # The token that was attached in this call stands for the method that it became.
        chosen = customer.get("_attached", {}).get(chosen, chosen)
        held = world.tables["payment_method"].get(chosen)
        if held is None or held["customer"] != customer["id"]:
            chosen = payments.attach(world, customer["id"], chosen, "invoice_settings[default_payment_method]")["id"]
    customer["invoice_settings"]["default_payment_method"] = chosen


def update_customer(world: World, call: Call) -> Object:
    """Change what was sent."""
    held, fields = world.find("customer", call.id), call.fields
    for name in _TEXTS:
        if fields.has(name):
            held[name] = fields.string(name)
    if (balance := fields.whole("balance")) is not None:
        held["balance"] = balance
    if fields.has("address"):
        held["address"] = _address(fields)
    held["metadata"] = merge_metadata(held["metadata"], fields)
    _set_default_method(world, held, fields)
    world.emit("customer.updated", held)
    return held


def retrieve_customer(world: World, call: Call) -> Object:
    """One customer; of a deleted one, that it is deleted."""
    held = world.tables["customer"].get(call.id)
    if held is not None and held.get("_is_deleted"):
        return {"id": call.id, "object": "customer", "deleted": True}
    return world.find("customer", call.id)


def list_customers(world: World, call: Call) -> Object:
    """Customers, by `email` and `test_clock`; those on test clocks are listed only with their clock."""
    found = only(world.tables["customer"].values(), call.fields, "email", "test_clock")
    has_clock = call.fields.has("test_clock")
    return page([one for one in found if has_clock or one["test_clock"] is None], call.fields, call.url)


def delete_customer(world: World, call: Call) -> Object:
    """Delete a customer, and cancel its subscriptions."""
    return remove(world, world.find("customer", call.id))


def remove(world: World, customer: Object) -> Object:
    """Cancel the customer's subscriptions and mark it as deleted."""
    for subscription in list(world.tables["subscription"].values()):
        if subscription["customer"] == customer["id"] and subscription["status"] not in standing.ENDED:
            standing.end(world, subscription, reason="cancellation_requested")
    customer["_is_deleted"] = True
    world.emit("customer.deleted", customer)
    return {"id": customer["id"], "object": "customer", "deleted": True}


ROUTES = [
    post("/v1/customers", create_customer),
    get("/v1/customers", list_customers),
    get("/v1/customers/{id}", retrieve_customer),
    post("/v1/customers/{id}", update_customer),
    delete("/v1/customers/{id}", delete_customer),
]
