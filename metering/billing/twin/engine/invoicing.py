"""An invoice's life: draft (late usage still counts), final, paid, retried, given up."""

from __future__ import annotations

from typing import Any

from metering.billing.twin.engine import grants, payments, standing
from metering.billing.twin.engine.lines import Span, line_of_pending, recount
from metering.billing.twin.errors import Executed, Object
from metering.billing.twin.options import DAY_SECONDS
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World


def draft(world: World, subscription: Object, reason: str, lines: list[Object], span: Span) -> Object:
    """Open a draft for *lines* and whatever is pending for the subscription. It is not planned to be finalised yet."""
    pending = pending_of(world, subscription)
    lines = lines + [line_of_pending(world, item) for item in pending]
    invoice = compose(world, subscription, reason, lines, span)
    world.add(invoice)
    for item in pending:
        item["invoice"] = invoice["id"]
    for line in invoice["lines"]["data"]:
        line["invoice"] = invoice["id"]
    subscription["latest_invoice"] = invoice["id"]
    world.emit("invoice.created", invoice)
    return invoice


def compose(world: World, subscription: Object, reason: str, lines: list[Object], span: Span) -> Object:
    """An invoice that is kept nowhere: for drafts and previews."""
    customer = world.tables["customer"][subscription["customer"]]
    identity = world.make_id("in")
    details = {"metadata": dict(subscription["metadata"]), "subscription": subscription["id"]}
    invoice = blank(
        "invoice",
        id=identity,
        account_country="US",
        billing_reason=reason,
        collection_method=subscription["collection_method"],
        created=world.now(customer["id"]),
        currency=subscription["currency"],
        customer=customer["id"],
        customer_email=customer["email"],
        customer_name=customer["name"],
        lines={"object": "list", "data": lines, "has_more": False, "url": f"/v1/invoices/{identity}/lines"},
        parent={"quote_details": None, "subscription_details": details, "type": "subscription_details"},
        period_start=span.start,
        period_end=span.end,
        status="draft",
        test_clock=customer["test_clock"],
    )
    invoice["_pays_with"] = subscription["default_payment_method"]
    invoice["_retries"] = 0
    add_up(world, invoice)
    return invoice


def pending_of(world: World, subscription: Object) -> list[Object]:
    """The invoice items that wait for the subscription's next invoice."""
    return [
        item
        for item in world.tables["invoiceitem"].values()
        if item["invoice"] is None and item["_subscription"] == subscription["id"]
    ]


def add_up(world: World, invoice: Object) -> None:
    """Count the metered lines of a draft anew, and sum up."""
    for line in invoice["lines"]["data"]:
        recount(world, line)
    subtotal = sum(line["amount"] for line in invoice["lines"]["data"])
    invoice["subtotal"] = invoice["subtotal_excluding_tax"] = subtotal
    invoice["total"] = invoice["total_excluding_tax"] = subtotal
    balance = world.tables["customer"][invoice["customer"]]["balance"]
    invoice["starting_balance"] = balance
    invoice["amount_due"] = invoice["amount_remaining"] = max(0, subtotal + min(balance, 0))


def plan_finalisation(world: World, invoice: Object) -> None:
    """Let the draft wait for late usage: the account's grace."""
    at = invoice["created"] + world.options.draft_grace_seconds
    invoice["automatically_finalizes_at"] = at
    world.plan(invoice["customer"], at, "invoice.finalize", invoice["id"])


def finalise(world: World, invoice: Object) -> None:
    """Close the draft: count usage for the last time, apply credits and balance, number it."""
    if invoice["status"] != "draft":
        raise Executed(400, "This invoice is already finalized.", code="invoice_not_editable")
    add_up(world, invoice)
    _apply_credits_and_balance(world, invoice)
    customer = world.tables["customer"][invoice["customer"]]
    now = world.now(customer["id"])
    invoice["number"] = f"{customer['invoice_prefix']}-{customer['next_invoice_sequence']:04}"
    customer["next_invoice_sequence"] += 1
    invoice["status"] = "open"
    invoice["status_transitions"]["finalized_at"] = invoice["effective_at"] = now
    invoice["automatically_finalizes_at"] = None
    invoice["hosted_invoice_url"] = f"{world.base_url}/invoice/{invoice['id']}"
    invoice["invoice_pdf"] = f"{world.base_url}/invoice/{invoice['id']}"
    for line in invoice["lines"]["data"]:
        line["_usage_final"] = line.pop("_usage", None)
    world.emit("invoice.finalized", invoice)


def _apply_credits_and_balance(world: World, invoice: Object) -> None:
    credited = grants.apply(world, invoice)
    if credited:
        invoice["total_pretax_credit_amounts"] = [
            one for line in invoice["lines"]["data"] for one in line["pretax_credit_amounts"]
        ]
    total = invoice["subtotal"] - credited
    customer = world.tables["customer"][invoice["customer"]]
    balance = customer["balance"]
    # A negative balance is money that we owe the customer: it pays what is due, and a negative total adds to it.
    due = max(0, total + min(balance, 0))
    customer["balance"] = invoice["ending_balance"] = min(balance, 0) + total - due + max(balance, 0)
    invoice["total"] = invoice["total_excluding_tax"] = total
    invoice["amount_due"] = invoice["amount_remaining"] = due


def collect(world: World, invoice: Object) -> bool:
    """Charge an open invoice. Returns whether it is paid; if not, the next attempt is planned, or it is given up."""
    if invoice["amount_due"] == 0:
        mark_paid(world, invoice)
        return True
    card = payments.card_of(world, invoice["customer"], invoice["_pays_with"])
    intent = _charge(world, invoice, card)
    invoice["attempt_count"] += 1
    invoice["attempted"] = True
    if intent["status"] == "succeeded":
        mark_paid(world, invoice)
        return True
    _failed(world, invoice)
    return False


def _charge(world: World, invoice: Object, card: Object | None) -> Object:
    values: dict[str, Any] = {"currency": invoice["currency"], "description": f"Invoice {invoice['number']}"}
    intent = payments.charge(world, invoice["customer"], invoice["amount_due"], card, **values)
    invoice["_payment_intent"] = intent["id"]
    return intent


def mark_paid(world: World, invoice: Object) -> None:
    """Close an open invoice as paid."""
    invoice["status"] = "paid"
    invoice["attempted"] = True
    invoice["amount_paid"], invoice["amount_remaining"] = invoice["amount_due"], 0
    invoice["next_payment_attempt"] = None
    invoice["status_transitions"]["paid_at"] = world.now(invoice["customer"])
    world.emit("invoice.paid", invoice)
    world.emit("invoice.payment_succeeded", invoice)
    standing.was_paid(world, invoice)


def _failed(world: World, invoice: Object) -> None:
    subscription = standing.subscription_of(world, invoice)
    # An invoice of a subscription that never began is not retried: the customer has 23 hours to pay it.
    never_began = subscription is not None and subscription["status"] == "incomplete"
    delays = world.options.payment_retry_days
    attempt: int = invoice["_retries"]
    is_last = never_began or attempt >= len(delays)
    invoice["next_payment_attempt"] = None
    if not is_last:
        at = world.now(invoice["customer"]) + delays[attempt] * DAY_SECONDS
        invoice["next_payment_attempt"] = at
        world.plan(invoice["customer"], at, "invoice.retry", invoice["id"])
        invoice["_retries"] = attempt + 1
    world.emit("invoice.payment_failed", invoice)
    standing.payment_failed(world, invoice)
    if is_last and not never_began:
        standing.payment_given_up(world, invoice)


def void(world: World, invoice: Object) -> None:
    """Make an open invoice void."""
    if invoice["status"] not in {"open", "uncollectible"}:
        raise Executed(400, "Only open invoices can be voided.", code="invoice_not_editable")
    grants.give_back(world, invoice)
    _close(world, invoice, "void", "voided_at", "invoice.voided")


def mark_uncollectible(world: World, invoice: Object) -> None:
    """Write an open invoice off."""
    _close(world, invoice, "uncollectible", "marked_uncollectible_at", "invoice.marked_uncollectible")


def _close(world: World, invoice: Object, status: str, moment: str, event: str) -> None:
    invoice["status"] = status
    invoice["next_payment_attempt"] = None
    invoice["status_transitions"][moment] = world.now(invoice["customer"])
    world.emit(event, invoice)
