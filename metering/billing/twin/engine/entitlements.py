"""What customers may use: the features of the products they are subscribed to, as of each period's start."""

from __future__ import annotations

from metering.billing.twin.errors import Object
from metering.billing.twin.world import World

_ENTITLED = {"active", "trialing", "past_due"}


def take_features(world: World, subscription: Object) -> None:
    """Fix what *subscription* entitles to: a product's later changes wait for its next period."""
    products = {item["price"]["product"] for item in subscription["items"]["data"]}
    attached = world.tables["product_feature"].values()
    subscription["_features"] = [one["entitlement_feature"]["id"] for one in attached if one["_product"] in products]


def refresh(world: World, customer: str) -> None:
    """Bring the customer's active entitlements up to date; tells when they changed."""
    wanted = {
        feature
        for subscription in world.tables["subscription"].values()
        if subscription["customer"] == customer and subscription["status"] in _ENTITLED
        for feature in subscription.get("_features", [])
    }
    held = active(world, customer)
    if {one["feature"] for one in held} == wanted:
        return
    table = world.tables["entitlements.active_entitlement"]
    for one in held:
        if one["feature"] not in wanted:
            del table[one["id"]]
    for feature in sorted(wanted - {one["feature"] for one in held}):
        _entitle(world, customer, feature)
    world.emit("entitlements.active_entitlement_summary.updated", _summary(world, customer))


def active(world: World, customer: str) -> list[Object]:
    """The active entitlements of *customer*."""
    table = world.tables["entitlements.active_entitlement"]
    return [one for one in table.values() if one["_customer"] == customer]


def _entitle(world: World, customer: str, feature: str) -> None:
    identity = world.make_id("ent")
    key = world.tables["entitlements.feature"][feature]["lookup_key"]
    world.tables["entitlements.active_entitlement"][identity] = {
        "object": "entitlements.active_entitlement",
        "id": identity,
        "feature": feature,
        "lookup_key": key,
        "livemode": False,
        "_customer": customer,
    }


def _summary(world: World, customer: str) -> Object:
    url = f"/v1/customer/{customer}/entitlements"
    listed = {"object": "list", "data": active(world, customer), "has_more": False, "url": url}
    kind = "entitlements.active_entitlement_summary"
    return {"object": kind, "customer": customer, "entitlements": listed, "livemode": False}
