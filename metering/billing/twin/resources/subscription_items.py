"""Items of subscriptions, one by one."""

from __future__ import annotations

from metering.billing.twin.engine import changing, entitlements
from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.listing import page
from metering.billing.twin.resources.subscriptions import change_item
from metering.billing.twin.resources.wishes import LAST_ITEM, check_no_price_twice, item_wish
from metering.billing.twin.routing import Call, delete, get, post
from metering.billing.twin.world import World


def create_item(world: World, call: Call) -> Object:
    """Put a further item on a subscription."""
    subscription = world.refer("subscription", call.fields.must("subscription"), "subscription")
    prorates = call.fields.string("proration_behavior") != "none"
    wish = item_wish(world, call.fields)
    check_no_price_twice([*(item["price"] for item in subscription["items"]["data"]), wish.price])
    changing.add(world, subscription, wish, prorates=prorates)
    _tell(world, subscription)
    return subscription["items"]["data"][-1]


def retrieve_item(world: World, call: Call) -> Object:
    """One item."""
    return world.find("subscription_item", call.id)


def list_items(world: World, call: Call) -> Object:
    """The items of one subscription, oldest first."""
    subscription = world.refer("subscription", call.fields.must("subscription"), "subscription")
    return page(subscription["items"]["data"], call.fields, call.url, newest_first=False)


def update_item(world: World, call: Call) -> Object:
    """Change the item's price, quantity or metadata."""
    item = world.find("subscription_item", call.id)
    subscription = world.tables["subscription"][item["subscription"]]
    behavior = call.fields.string("proration_behavior")
    change_item(world, subscription, item, call.fields, prorates=behavior != "none")
    if behavior == "always_invoice":
        changing.bill_pending(world, subscription)
    _tell(world, subscription)
    return item


def delete_item(world: World, call: Call) -> Object:
    """Take the item off its subscription."""
    item = world.find("subscription_item", call.id)
    subscription = world.tables["subscription"][item["subscription"]]
    if len(subscription["items"]["data"]) == 1:
        raise invalid("id", LAST_ITEM)
    prorates = call.fields.string("proration_behavior") != "none"
    changing.remove(world, subscription, item, prorates=prorates)
    _tell(world, subscription)
    return {"id": item["id"], "object": "subscription_item", "deleted": True}


def _tell(world: World, subscription: Object) -> None:
    entitlements.take_features(world, subscription)
    world.emit("customer.subscription.updated", subscription)
    entitlements.refresh(world, subscription["customer"])


ROUTES = [
    post("/v1/subscription_items", create_item),
    get("/v1/subscription_items", list_items),
    get("/v1/subscription_items/{id}", retrieve_item),
    post("/v1/subscription_items/{id}", update_item),
    delete("/v1/subscription_items/{id}", delete_item),
]
