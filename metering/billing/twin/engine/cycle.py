"""Time: what becomes due on a timeline is done in its order, at the second for which it was planned."""

from __future__ import annotations

from collections.abc import Callable

from metering.billing.twin.engine import entitlements, invoicing, standing
from metering.billing.twin.engine.lines import Span, interval_of
from metering.billing.twin.engine.payments import card_of
from metering.billing.twin.engine.subscribing import (
    ahead_and_behind,
    period_of,
    plan_period_end,
    set_due_date,
    set_period,
)
from metering.billing.twin.errors import Object
from metering.billing.twin.world import World


def run(world: World, timeline: str, until: int) -> None:
    """Do everything that is due on *timeline* by *until* (Unix seconds)."""
    try:
        while due := world.agenda.take_due(timeline, until):
            world.act_at(timeline, due.at)
            _ACTS[due.act](world, due.identity, due.at)
    finally:
        world.act_at(timeline, None)


def _period_end(world: World, identity: str, at: int) -> None:
    subscription = world.tables["subscription"][identity]
    if subscription["status"] in standing.ENDED | {"paused"} or subscription["_period_end"] != at:
        return
    if subscription["status"] == "incomplete":
        return
    if subscription["cancel_at_period_end"] or subscription["cancel_at"] == at:
        cancel_with_usage(world, subscription)
    elif subscription["status"] == "trialing" and not _may_leave_trial(world, subscription):
        return
    else:
        _begin_period(world, subscription, at)


def _may_leave_trial(world: World, subscription: Object) -> bool:
    """Without a payment method, the trial's settings may end or pause the subscription instead."""
    behaviour = subscription["trial_settings"]["end_behavior"]["missing_payment_method"]
    if behaviour == "create_invoice" or card_of(
        world, subscription["customer"], subscription["default_payment_method"]
    ):
        return True
    if behaviour == "cancel":
        standing.end(world, subscription, reason="payment_failed")
        return False
    subscription["status"] = "paused"
    world.emit("customer.subscription.paused", subscription, {"status": "trialing"})
    entitlements.refresh(world, subscription["customer"])
    return False


def _begin_period(world: World, subscription: Object, at: int) -> None:
    past = period_of(subscription)
    was_trial = subscription["status"] == "trialing"
    interval = interval_of(subscription["items"]["data"][0]["price"])
    ahead = Span(*interval.around(subscription["billing_cycle_anchor"], at))
    before: Object = {"items": {"data": [{"current_period_end": past.end, "current_period_start": past.start}]}}
    set_period(subscription, ahead)
    if was_trial:
        subscription["status"] = "active"
        before["status"] = "trialing"
    entitlements.take_features(world, subscription)
    # What was used in a trial is free.
    behind = Span(past.end, past.end) if was_trial else past
    lines = ahead_and_behind(world, subscription, ahead, behind)
    for item in subscription["items"]["data"]:
        item["_usage_from"] = min(item["_usage_from"], at)
    world.emit("customer.subscription.updated", subscription, before)
    invoice = invoicing.draft(world, subscription, "subscription_cycle", lines, past)
    if subscription["status"] == "unpaid":
        invoice["auto_advance"] = False
    else:
        invoicing.plan_finalisation(world, invoice)
    entitlements.refresh(world, subscription["customer"])
    plan_period_end(world, subscription)


def cancel_with_usage(world: World, subscription: Object) -> None:
    """End the subscription now, and bill what its meters counted since the period began."""
    now = world.now(subscription["customer"])
    behind = Span(subscription["_period_start"], now)
    was_trial = subscription["status"] == "trialing"
    lines = ahead_and_behind(world, subscription, None, None if was_trial else behind)
    if lines or invoicing.pending_of(world, subscription):
        reason = "subscription_cycle" if now == subscription["_period_end"] else "subscription_update"
        invoice = invoicing.draft(world, subscription, reason, lines, behind)
        invoicing.plan_finalisation(world, invoice)
    standing.end(world, subscription, reason="cancellation_requested")


def _cancel(world: World, identity: str, at: int) -> None:
    subscription = world.tables["subscription"][identity]
    if subscription["status"] not in standing.ENDED and subscription["cancel_at"] == at:
        cancel_with_usage(world, subscription)


def _expire(world: World, identity: str, _: int) -> None:
    subscription = world.tables["subscription"][identity]
    if subscription["status"] != "incomplete":
        return
    standing.set_status(world, subscription, "incomplete_expired")
    subscription["ended_at"] = world.now(subscription["customer"])
    invoice = world.tables["invoice"][subscription["latest_invoice"]]
    if invoice["status"] == "open":
        invoicing.void(world, invoice)


def _trial_will_end(world: World, identity: str, _: int) -> None:
    subscription = world.tables["subscription"][identity]
    if subscription["status"] == "trialing" and subscription.get("_told_of") != subscription["trial_end"]:
        subscription["_told_of"] = subscription["trial_end"]
        world.emit("customer.subscription.trial_will_end", subscription)


def _upcoming(world: World, identity: str, _: int) -> None:
    subscription = world.tables["subscription"][identity]
    if subscription["status"] in {"active", "trialing", "past_due"} and not subscription["cancel_at_period_end"]:
        world.emit("invoice.upcoming", upcoming(world, subscription))


def upcoming(world: World, subscription: Object) -> Object:
    """The invoice that the current period's end will bring, as things stand."""
    past = period_of(subscription)
    interval = interval_of(subscription["items"]["data"][0]["price"])
    ahead = Span(*interval.around(subscription["billing_cycle_anchor"], past.end))
    lines = ahead_and_behind(world, subscription, ahead, past)
    lines += [invoicing.line_of_pending(world, pending) for pending in invoicing.pending_of(world, subscription)]
    invoice = invoicing.compose(world, subscription, "upcoming", lines, past)
    invoice["id"] = f"upcoming_{invoice['id']}"
    invoice["next_payment_attempt"] = past.end + world.options.draft_grace_seconds
    return invoice


def _finalise(world: World, identity: str, _: int) -> None:
    invoice = world.tables["invoice"][identity]
    if invoice["status"] != "draft" or not invoice["auto_advance"]:
        return
    subscription = standing.subscription_of(world, invoice)
    pause = (subscription or {}).get("pause_collection")
    if pause and pause["behavior"] == "keep_as_draft":
        invoice["auto_advance"] = False
        return
    invoicing.finalise(world, invoice)
    if pause:
        close = invoicing.void if pause["behavior"] == "void" else invoicing.mark_uncollectible
        close(world, invoice)
    elif subscription and subscription["collection_method"] == "send_invoice" and invoice["amount_due"]:
        set_due_date(world, subscription, invoice)
    else:
        invoicing.collect(world, invoice)


def _retry(world: World, identity: str, at: int) -> None:
    invoice = world.tables["invoice"][identity]
    if invoice["status"] == "open" and invoice["next_payment_attempt"] == at:
        invoicing.collect(world, invoice)


def _resume_collection(world: World, identity: str, at: int) -> None:
    subscription = world.tables["subscription"][identity]
    pause = subscription["pause_collection"]
    if pause and pause["resumes_at"] == at:
        subscription["pause_collection"] = None
        world.emit("customer.subscription.updated", subscription, {"pause_collection": pause})


def _expire_checkout(world: World, identity: str, _: int) -> None:
    session = world.tables["checkout.session"][identity]
    if session["status"] == "open":
        session["status"], session["url"] = "expired", None
        world.emit("checkout.session.expired", session)


_ACTS: dict[str, Callable[[World, str, int], None]] = {
    "subscription.period_end": _period_end,
    "subscription.cancel": _cancel,
    "subscription.expire": _expire,
    "subscription.trial_will_end": _trial_will_end,
    "subscription.upcoming": _upcoming,
    "subscription.resume_collection": _resume_collection,
    "invoice.finalize": _finalise,
    "invoice.retry": _retry,
    "checkout.expire": _expire_checkout,
}
