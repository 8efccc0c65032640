"""Invoices: reading them, and moving them along by hand."""

from __future__ import annotations

from metering.billing.twin.engine import invoicing, payments
from metering.billing.twin.engine.cycle import upcoming
from metering.billing.twin.engine.payments import attach
from metering.billing.twin.errors import Executed, Object, invalid, part
from metering.billing.twin.fields import merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.resources.wishes import check_items, tried
from metering.billing.twin.routing import Call, delete, get, post
from metering.billing.twin.world import World


def retrieve_invoice(world: World, call: Call) -> Object:
    """One invoice; a draft is counted anew."""
    return _fresh(world, world.find("invoice", call.id))


def _fresh(world: World, invoice: Object) -> Object:
    if invoice["status"] == "draft":
        invoicing.add_up(world, invoice)
    return invoice


def list_invoices(world: World, call: Call) -> Object:
    """Invoices, by `customer`, `subscription`, `status`, `collection_method` and `created`."""
    fields = call.fields
    found = only(world.tables["invoice"].values(), fields, "customer", "status", "collection_method")
    wanted = fields.string("subscription")
    chosen = [one for one in found if wanted is None or _subscription_id(one) == wanted]
    return page([_fresh(world, one) for one in chosen], fields, call.url)


def _subscription_id(invoice: Object) -> str | None:
    return part(invoice, "parent", "subscription_details").get("subscription")


def list_lines(world: World, call: Call) -> Object:
    """The lines of an invoice, in their order."""
    invoice = _fresh(world, world.find("invoice", call.id))
    return page(invoice["lines"]["data"], call.fields, call.url, newest_first=False)


def create_preview(world: World, call: Call) -> Object:
    """The invoice that the subscription's next period will bring; changed items are tried on a copy."""
    fields = call.fields
    identity = fields.string("subscription")
    if identity is None:
        raise invalid("subscription", "This twin previews invoices of existing subscriptions only.")
    subscription = world.refer("subscription", identity, "subscription")
    rows = fields.inner("subscription_details").rows("items")
    check_items(world, subscription, rows)
    return upcoming(world, tried(world, subscription, rows))


def update_invoice(world: World, call: Call) -> Object:
    """Change a draft's metadata, description, `auto_advance` and `automatically_finalizes_at`."""
    invoice, fields = world.find("invoice", call.id), call.fields
    invoice["metadata"] = merge_metadata(invoice["metadata"], fields)
    if fields.has("description"):
        invoice["description"] = fields.string("description")
    if (advances := fields.flag("auto_advance")) is not None:
        invoice["auto_advance"] = advances
        if advances and invoice["status"] == "draft":
            world.plan(invoice["customer"], world.now(invoice["customer"]) + 3_600, "invoice.finalize", invoice["id"])
    world.emit("invoice.updated", invoice)
    return invoice


def finalize_invoice(world: World, call: Call) -> Object:
    """Close a draft now, without waiting for late usage."""
    invoice = world.find("invoice", call.id)
    invoicing.finalise(world, invoice)
    if invoice["amount_due"] == 0:
        invoicing.mark_paid(world, invoice)
    elif call.fields.flag("auto_advance") and invoice["collection_method"] == "charge_automatically":
        invoicing.collect(world, invoice)
    return invoice


def pay_invoice(world: World, call: Call) -> Object:
    """Pay an open invoice, or a draft after closing it. Errors: 402 if the card declines."""
    invoice, fields = world.find("invoice", call.id), call.fields
    if invoice["status"] == "draft":
        invoicing.finalise(world, invoice)
    if invoice["status"] == "paid":
        raise Executed(400, "Invoice is already paid", code="invoice_already_paid")
    if invoice["status"] not in {"open", "uncollectible"}:
        raise Executed(400, "This invoice can no longer be paid.", code="invoice_not_editable")
    if fields.flag("paid_out_of_band"):
        invoicing.mark_paid(world, invoice)
        return invoice
    if (method := fields.string("payment_method")) is not None:
        invoice["_pays_with"] = attach(world, invoice["customer"], method)["id"]
    payments.require_card(payments.card_of(world, invoice["customer"], invoice["_pays_with"]))
    if not invoicing.collect(world, invoice):
        raise payments.declined(world.tables["payment_intent"].get(invoice["_payment_intent"]))
    return invoice


def void_invoice(world: World, call: Call) -> Object:
    """Make an open invoice void."""
    invoice = world.find("invoice", call.id)
    invoicing.void(world, invoice)
    return invoice


def write_off_invoice(world: World, call: Call) -> Object:
    """Mark an open invoice as uncollectible."""
    invoice = world.find("invoice", call.id)
    invoicing.mark_uncollectible(world, invoice)
    return invoice


def delete_invoice(world: World, call: Call) -> Object:
    """Delete a draft. Errors: 400 for an invoice of a subscription, as at Stripe."""
    invoice = world.find("invoice", call.id)
    raise invalid("id", f"You can only delete draft one-off invoices; {invoice['id']} is a subscription's.")


ROUTES = [
    get("/v1/invoices", list_invoices),
    post("/v1/invoices/create_preview", create_preview),
    get("/v1/invoices/{id}", retrieve_invoice),
    post("/v1/invoices/{id}", update_invoice),
    delete("/v1/invoices/{id}", delete_invoice),
    get("/v1/invoices/{id}/lines", list_lines),
    post("/v1/invoices/{id}/finalize", finalize_invoice),
    post("/v1/invoices/{id}/pay", pay_invoice),
    post("/v1/invoices/{id}/void", void_invoice),
    post("/v1/invoices/{id}/mark_uncollectible", write_off_invoice),
]
