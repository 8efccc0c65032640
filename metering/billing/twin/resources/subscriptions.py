"""Subscriptions: beginning, changing, ending, pausing."""

from __future__ import annotations

from metering.billing.twin.engine import changing, entitlements, payments, standing, subscribing
from metering.billing.twin.engine.cycle import cancel_with_usage
from metering.billing.twin.engine.lines import interval_of
from metering.billing.twin.engine.periods import Interval
from metering.billing.twin.engine.subscribing import ItemWish, changed
from metering.billing.twin.errors import Object, StripeError, invalid
from metering.billing.twin.fields import Fields, merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.resources.wishes import (
    PRORATIONS,
    behavior_of,
    check_items,
    item_wish,
    trial_end_of,
    tried,
    wish_of,
)
from metering.billing.twin.routing import Call, delete, get, post
from metering.billing.twin.world import World


def create_subscription(world: World, call: Call) -> Object:
    """Create a subscription and bill what is due at once."""
    customer = world.refer("customer", call.fields.must("customer"), "customer")
    return subscribing.begin(world, wish_of(world, customer["id"], call.fields, call.fields.rows("items")))


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
    behavior = fields.one_of("proration_behavior", *PRORATIONS) or "create_prorations"
    check_items(world, subscription, fields.rows("items"))
    if behavior_of(fields) == "error_if_incomplete":
        _refuse_what_cannot_be_paid(world, subscription, fields)
    _check_trial(world, subscription, fields)
    before = _change_plain_fields(world, subscription, fields)
    old_interval = _interval(subscription)
    if fields.has("items"):
        before["items"] = {"data": [dict(item) for item in subscription["items"]["data"]]}
        change_items(world, subscription, fields, prorates=behavior != "none")
    ends_trial = _ends_trial(subscription, fields)
    is_restarted = _interval(subscription) != old_interval or fields.string("billing_cycle_anchor") == "now"
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


def _interval(subscription: Object) -> Interval:
    return interval_of(subscription["items"]["data"][0]["price"])


def _ends_trial(subscription: Object, fields: Fields) -> bool:
    return fields.string("trial_end") == "now" and bool(subscription["status"] == "trialing")


def _refuse_what_cannot_be_paid(world: World, subscription: Object, fields: Fields) -> None:
    """Refuse a change that the card would not pay for, before it is made. Errors: 402; 400 without a card."""
    copied = tried(world, subscription, fields.rows("items"))
    is_trial = subscription["status"] == "trialing"
    restarts = _interval(copied) != _interval(subscription) or fields.string("billing_cycle_anchor") == "now"
    restarts = _ends_trial(subscription, fields) or (restarts and not is_trial)
    if not restarts and (is_trial or fields.string("proration_behavior") != "always_invoice"):
        return
    is_sent = subscription["collection_method"] == "send_invoice"
    if is_sent or changing.due_at_once(world, subscription, copied, restarts=restarts) <= 0:
        return
    chosen = fields.string("default_payment_method") or subscription["default_payment_method"]
    if not payments.require_card(payments.card_of(world, subscription["customer"], chosen))["_succeeds"]:
        raise payments.declined()


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


def _check_trial(world: World, subscription: Object, fields: Fields) -> None:
    end = trial_end_of(world, subscription["customer"], fields)
    if end is not None and end <= world.now(subscription["customer"]):
        raise invalid("trial_end", "The trial end must be in the future.")


def _change_trial(world: World, subscription: Object, fields: Fields) -> Object:
    end = trial_end_of(world, subscription["customer"], fields)
    if end is None:
        return {}
    now = world.now(subscription["customer"])
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
