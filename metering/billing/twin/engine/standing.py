"""A subscription's status, and what follows from it: events, and what the customer is entitled to."""

from __future__ import annotations

from metering.billing.twin.engine import entitlements
from metering.billing.twin.errors import Object, part
from metering.billing.twin.world import World

# No period follows on these.
ENDED = {"canceled", "incomplete_expired"}


def subscription_of(world: World, invoice: Object) -> Object | None:
    """The subscription that *invoice* bills."""
    details = part(invoice, "parent", "subscription_details")
    return world.tables["subscription"].get(details.get("subscription") or "")


def set_status(world: World, subscription: Object, status: str) -> None:
    """Move *subscription* to *status* and tell so, unless it is there already."""
    before = subscription["status"]
    if before == status:
        return
    subscription["status"] = status
    world.emit("customer.subscription.updated", subscription, {"status": before})
    entitlements.refresh(world, subscription["customer"])


def was_paid(world: World, invoice: Object) -> None:
    """A paid invoice makes its subscription good, unless an older one is still open."""
    subscription = subscription_of(world, invoice)
    if subscription is None or subscription["status"] not in {"incomplete", "past_due", "unpaid"}:
        return
    others = (
        other
        for other in world.tables["invoice"].values()
        if other["status"] == "open" and subscription_of(world, other) is subscription
    )
    if subscription["latest_invoice"] == invoice["id"] or not any(others):
        set_status(world, subscription, "active")


def payment_failed(world: World, invoice: Object) -> None:
    """A failed payment puts a running subscription in arrears; one that never began stays incomplete."""
    subscription = subscription_of(world, invoice)
    if subscription is not None and subscription["status"] in {"active", "trialing"}:
        set_status(world, subscription, "past_due")


def payment_given_up(world: World, invoice: Object) -> None:
    """After the last retry the account's setting decides what becomes of the subscription."""
    subscription = subscription_of(world, invoice)
    if subscription is None or subscription["status"] != "past_due":
        return
    wanted = world.options.after_last_retry
    if wanted == "canceled":
        end(world, subscription, reason="payment_failed")
    else:
        set_status(world, subscription, wanted)


def end(world: World, subscription: Object, *, reason: str) -> None:
    """Cancel *subscription* now, without an invoice."""
    now = world.now(subscription["customer"])
    subscription["status"] = "canceled"
    subscription["canceled_at"] = subscription["canceled_at"] or now
    subscription["ended_at"] = now
    subscription["cancellation_details"]["reason"] = reason
    world.emit("customer.subscription.deleted", subscription)
    entitlements.refresh(world, subscription["customer"])
