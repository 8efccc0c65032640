"""Subscriptions: beginning, changing, ending, pausing."""

from __future__ import annotations

from metering.billing.twin.engine import changing, entitlements, payments, standing, subscribing
from metering.billing.twin.engine.cycle import cancel_with_usage
from metering.billing.twin.engine.lines import interval_of, is_metered
from metering.billing.twin.engine.subscribing import MIXED_INTERVALS, ItemWish, Wish, changed
from metering.billing.twin.errors import Object, StripeError, invalid
from metering.billing.twin.fields import Fields, merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.options import DAY_SECONDS
from metering.billing.twin.resources.products import price_of
from metering.billing.twin.routing import Call, delete, get, post
from metering.billing.twin.world import World

# Stripe's limit: two years.
TRIAL_DAYS_MAX = 730
_PRORATIONS = ("create_prorations", "none", "always_invoice")


def create_subscription(world: World, call: Call) -> Object:
    """Create a subscription and bill what is due at once."""
    customer = world.refer("customer", call.fields.must("customer"), "customer")
    return subscribing.begin(world, wish_of(world, customer["id"], call.fields, call.fields.rows("items")))


def wish_of(world: World, customer: str, fields: Fields, rows: list[Fields]) -> Wish:
    """What the parameters of a subscription ask for; checkout's `subscription_data` has the same names."""
    method = fields.string("default_payment_method")
    if method is not None:
        method = payments.attach(world, customer, method, "default_payment_method")["id"]
    behaviors = ("allow_incomplete", "default_incomplete", "error_if_incomplete", "pending_if_incomplete")
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
        payment_behavior=fields.one_of("payment_behavior", *behaviors) or "allow_incomplete",
        prorates=fields.one_of("proration_behavior", *_PRORATIONS) != "none",
        missing_payment_method=ending.one_of("missing_payment_method", "cancel", "create_invoice", "pause")
        or "create_invoice",
        description=fields.string("description"),
        metadata=merge_metadata({}, fields),
    )


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


def retrieve_subscription(world: World, call: Call) -> Object:
    """One subscription."""
    return world.find("subscription", call.id)


def list_subscriptions(world: World, call: Call) -> Object:
    """Subscriptions, by `customer`, `price`, `status` and `test_clock`; canceled ones only when asked for."""
    fields = call.fields
    status, price = fields.string("status"), fields.string("price")
    found = only(world.tables["subscription"].values(), fields, "customer", "collection_method", "test_clock")
    chosen = [
        one
        for one in found
        if _has_status(one, status)
        and (not price or any(item["price"]["id"] == price for item in one["items"]["data"]))
    ]
    return page(chosen, fields, call.url)


def _has_status(subscription: Object, wanted: str | None) -> bool:
    match wanted:
        case None:
            return subscription["status"] != "canceled"
        case "all":
            return True
        case "ended":
            return subscription["status"] in standing.ENDED
        case _:
            return bool(subscription["status"] == wanted)


def update_subscription(world: World, call: Call) -> Object:
    """Change what was sent: items, trial, end, collection, payment method, metadata."""
    subscription, fields = world.find("subscription", call.id), call.fields
    if subscription["status"] in standing.ENDED:
        raise StripeError(404, f"No such subscription: '{call.id}'", code="resource_missing", param="id")
    behavior = fields.one_of("proration_behavior", *_PRORATIONS) or "create_prorations"
    check_items(world, subscription, fields.rows("items"))
    before = _change_plain_fields(world, subscription, fields)
    old_interval = interval_of(subscription["items"]["data"][0]["price"])
    if fields.has("items"):
        before["items"] = {"data": [dict(item) for item in subscription["items"]["data"]]}
        change_items(world, subscription, fields, prorates=behavior != "none")
    new_interval = interval_of(subscription["items"]["data"][0]["price"])
    ends_trial = fields.string("trial_end") == "now" and subscription["status"] == "trialing"
    is_restarted = new_interval != old_interval or fields.string("billing_cycle_anchor") == "now"
    if ends_trial:
        subscription["trial_end"] = world.now(subscription["customer"])
    if ends_trial or (is_restarted and subscription["status"] != "trialing"):
        changing.restart_period(world, subscription)
    elif behavior == "always_invoice":
        changing.bill_pending(world, subscription)
    entitlements.take_features(world, subscription)
    world.emit("customer.subscription.updated", subscription, before)
    entitlements.refresh(world, subscription["customer"])
    return subscription


def check_items(world: World, subscription: Object, rows: list[Fields]) -> None:
    """Refuse rows that cannot be, before anything is changed: unknown items and prices, and mixed intervals."""
    prices = {item["id"]: item["price"] for item in subscription["items"]["data"]}
    for index, row in enumerate(rows):
        identity = row.string("id")
        if identity is not None and identity not in prices:
            raise invalid(row.name_of("id"), f"No such subscription item: '{identity}'", "resource_missing")
        if row.has("price") or (identity is None and not row.has("price_data")):
            prices[identity or f"new {index}"] = item_wish(world, row).price
        if row.flag("deleted"):
            prices.pop(identity or "", None)
    if len({interval_of(price) for price in prices.values()}) > 1:
        raise invalid("items", MIXED_INTERVALS)


def change_items(world: World, subscription: Object, fields: Fields, *, prorates: bool) -> None:
    """Change, add and remove items as the rows of `items` say."""
    for row in fields.rows("items"):
        identity = row.string("id")
        if identity is None:
            changing.add(world, subscription, item_wish(world, row), prorates=prorates)
            continue
        item = next(one for one in subscription["items"]["data"] if one["id"] == identity)
        if row.flag("deleted"):
            changing.remove(world, subscription, item, prorates=prorates)
        else:
            change_item(world, subscription, item, row, prorates=prorates)


def change_item(world: World, subscription: Object, item: Object, row: Fields, *, prorates: bool) -> None:
    """Change one item's price, quantity and metadata."""
    item["metadata"] = merge_metadata(item["metadata"], row)
    if row.has("price") or row.has("price_data"):
        wish = item_wish(world, row)
    elif row.has("quantity"):
        wish = ItemWish(price=item["price"], quantity=row.whole("quantity"))
    else:
        return
    changing.change_item(world, subscription, item, wish, prorates=prorates)


def _change_plain_fields(world: World, subscription: Object, fields: Fields) -> Object:
    customer = subscription["customer"]
    values: Object = {"metadata": merge_metadata(subscription["metadata"], fields)}
    if (at_end := fields.flag("cancel_at_period_end")) is not None:
        values |= _cancellation(world, subscription, at_end=at_end)
    if fields.has("cancel_at"):
        values["cancel_at"] = fields.moment("cancel_at")
        if values["cancel_at"]:
            world.plan(customer, values["cancel_at"], "subscription.cancel", subscription["id"])
    if fields.has("default_payment_method"):
        method = fields.string("default_payment_method")
        values["default_payment_method"] = method and payments.attach(world, customer, method)["id"]
    if fields.has("description"):
        values["description"] = fields.string("description")
    if fields.has("pause_collection"):
        values["pause_collection"] = _pause_of(world, subscription, fields.inner("pause_collection"))
    before = changed(subscription, values)
    return before | _change_trial(world, subscription, fields)


def _cancellation(world: World, subscription: Object, *, at_end: bool) -> Object:
    if not at_end:
        details = {"comment": None, "feedback": None, "reason": None}
        return {"cancel_at_period_end": False, "cancel_at": None, "canceled_at": None, "cancellation_details": details}
    details = subscription["cancellation_details"] | {"reason": "cancellation_requested"}
    return {
        "cancel_at_period_end": True,
        "cancel_at": subscription["_period_end"],
        "cancellation_details": details,
        "canceled_at": world.now(subscription["customer"]),
    }


def _pause_of(world: World, subscription: Object, fields: Fields) -> Object | None:
    if not fields.values:
        return None
    fields.must("behavior")
    behavior = fields.one_of("behavior", "keep_as_draft", "mark_uncollectible", "void")
    resumes_at = fields.moment("resumes_at")
    if resumes_at:
        world.plan(subscription["customer"], resumes_at, "subscription.resume_collection", subscription["id"])
    return {"behavior": behavior, "resumes_at": resumes_at}


def _change_trial(world: World, subscription: Object, fields: Fields) -> Object:
    end = fields.moment("trial_end") if fields.string("trial_end") != "now" else None
    if end is None:
        return {}
    now = world.now(subscription["customer"])
    if end <= now:
        raise invalid("trial_end", "The trial end must be in the future.")
    before = changed(subscription, {"trial_end": end, "status": "trialing", "billing_cycle_anchor": end})
    subscription["trial_start"] = subscription["trial_start"] or now
    subscribing.set_period(subscription, subscribing.Span(now, end))
    subscribing.plan_trial_notice(world, subscription)
    subscribing.plan_period_end(world, subscription)
    return before


def cancel_subscription(world: World, call: Call) -> Object:
    """Cancel now. `invoice_now` bills what the meters counted; without it, that usage is never billed."""
    subscription, fields = world.find("subscription", call.id), call.fields
    if subscription["status"] in standing.ENDED:
        raise StripeError(404, f"No such subscription: '{call.id}'", code="resource_missing", param="id")
    details = fields.inner("cancellation_details")
    subscription["cancellation_details"] |= {name: details.string(name) for name in ("comment", "feedback")}
    if fields.flag("prorate"):
        for item in subscription["items"]["data"]:
            changing.credit_rest(world, subscription, item)
    if fields.flag("invoice_now"):
        cancel_with_usage(world, subscription)
    else:
        standing.end(world, subscription, reason="cancellation_requested")
    return subscription


def resume_subscription(world: World, call: Call) -> Object:
    """Resume a paused subscription with a new period from now."""
    subscription = world.find("subscription", call.id)
    if subscription["status"] != "paused":
        raise invalid("id", "Only paused subscriptions can be resumed.")
    changing.restart_period(world, subscription)
    world.emit("customer.subscription.resumed", subscription, {"status": "paused"})
    world.emit("customer.subscription.updated", subscription, {"status": "paused"})
    entitlements.refresh(world, subscription["customer"])
    return subscription


ROUTES = [
    post("/v1/subscriptions", create_subscription),
    get("/v1/subscriptions", list_subscriptions),
    get("/v1/subscriptions/{id}", retrieve_subscription),
    post("/v1/subscriptions/{id}", update_subscription),
    delete("/v1/subscriptions/{id}", cancel_subscription),
    post("/v1/subscriptions/{id}/resume", resume_subscription),
]
