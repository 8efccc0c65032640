"""Features, which products have them, and which customers are entitled to them."""

from __future__ import annotations

from metering.billing.twin.engine import entitlements
from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.fields import merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.routing import Call, delete, get, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

_FEATURE = "entitlements.feature"


def create_feature(world: World, call: Call) -> Object:
    """Create a feature. Errors: 400 if its lookup key is taken."""
    fields = call.fields
    key = fields.must("lookup_key")
    if any(one["lookup_key"] == key for one in world.tables[_FEATURE].values()):
        raise invalid("lookup_key", f"A feature with lookup key '{key}' already exists.", "resource_already_exists")
    identity, metadata = world.make_id("feat"), merge_metadata({}, fields)
    return world.add(blank(_FEATURE, id=identity, lookup_key=key, name=fields.must("name"), metadata=metadata))


def update_feature(world: World, call: Call) -> Object:
    """Change the name, the metadata, or whether it is active."""
    held, fields = world.find(_FEATURE, call.id), call.fields
    held["name"] = fields.string("name") or held["name"]
    if (active := fields.flag("active")) is not None:
        held["active"] = active
    held["metadata"] = merge_metadata(held["metadata"], fields)
    return held


def retrieve_feature(world: World, call: Call) -> Object:
    """One feature."""
    return world.find(_FEATURE, call.id)


def list_features(world: World, call: Call) -> Object:
    """Features, by `lookup_key`."""
    return page(only(world.tables[_FEATURE].values(), call.fields, "lookup_key"), call.fields, call.url)


def attach_feature(world: World, call: Call) -> Object:
    """Give a product a feature. Running subscriptions get it with their next period."""
    product = world.find("product", call.id)
    feature = world.refer(_FEATURE, call.fields.must("entitlement_feature"), "entitlement_feature")
    made = blank("product_feature", id=world.make_id("prodft"), entitlement_feature=feature)
    made["_product"] = product["id"]
    return world.add(made)


def list_product_features(world: World, call: Call) -> Object:
    """The features of a product."""
    product = world.find("product", call.id)["id"]
    held = world.tables["product_feature"].values()
    return page([one for one in held if one["_product"] == product], call.fields, call.url)


def detach_feature(world: World, call: Call) -> Object:
    """Take a feature from a product."""
    feature = world.find("product_feature", call.names["feature"])
    del world.tables["product_feature"][feature["id"]]
    return {"id": feature["id"], "object": "product_feature", "deleted": True}


def list_active(world: World, call: Call) -> Object:
    """What a customer is entitled to now."""
    customer = world.refer("customer", call.fields.must("customer"), "customer")["id"]
    return page(entitlements.active(world, customer), call.fields, call.url)


def retrieve_active(world: World, call: Call) -> Object:
    """One active entitlement."""
    return world.find("entitlements.active_entitlement", call.id)


ROUTES = [
    post("/v1/entitlements/features", create_feature),
    get("/v1/entitlements/features", list_features),
    get("/v1/entitlements/features/{id}", retrieve_feature),
    post("/v1/entitlements/features/{id}", update_feature),
    post("/v1/products/{id}/features", attach_feature),
    get("/v1/products/{id}/features", list_product_features),
    delete("/v1/products/{id}/features/{feature}", detach_feature),
    get("/v1/entitlements/active_entitlements", list_active),
    get("/v1/entitlements/active_entitlements/{id}", retrieve_active),
]
