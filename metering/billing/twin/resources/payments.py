"""Payment methods and payment intents."""

from __future__ import annotations

from metering.billing.twin.engine import payments
from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.fields import merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.routing import Call, get, post
from metering.billing.twin.world import World


def create_intent(world: World, call: Call) -> Object:
    """Create a payment intent, and charge it if it is confirmed. Errors: 402 if the card declines."""
    fields = call.fields
    amount = fields.must_whole("amount")
    if amount < 1:
        raise invalid("amount", "This value must be greater than or equal to 1.", "parameter_invalid_integer")
    customer = fields.string("customer")
    if customer is not None:
        world.refer("customer", customer, "customer")
    card = _card(world, customer, fields.string("payment_method"))
    intent = payments.charge(
        world,
        customer or "",
        amount,
        None,
        currency=fields.must("currency").lower(),
        description=fields.string("description"),
        metadata=merge_metadata({}, fields),
        receipt_email=fields.string("receipt_email"),
        setup_future_usage=fields.one_of("setup_future_usage", "on_session", "off_session"),
    )
    if fields.flag("confirm"):
        return _confirm(world, intent, card)
    if card is not None:
        intent |= {"payment_method": card["id"], "status": "requires_confirmation"}
    return intent


def _card(world: World, customer: str | None, method: str | None) -> Object | None:
    if method is None:
        return None
    held = world.tables["payment_method"].get(method)
    if held is not None and customer is not None and held["customer"] not in {None, customer}:
        message = f"The provided PaymentMethod {method} does not belong to the Customer you supplied."
        raise invalid("payment_method", message)
    return held or payments.attach(world, customer or "", method)


def _confirm(world: World, intent: Object, card: Object | None) -> Object:
    if card is None:
        raise invalid("payment_method", "You cannot confirm this PaymentIntent because it's missing a payment method.")
    payments.confirm(world, intent, card)
    if intent["status"] != "succeeded":
        raise payments.declined(intent)
    return intent


def confirm_intent(world: World, call: Call) -> Object:
    """Charge an intent. Errors: 402 if the card declines."""
    intent = world.find("payment_intent", call.id)
    if intent["status"] in {"succeeded", "canceled"}:
        message = f"You cannot confirm this PaymentIntent because it has a status of {intent['status']}."
        raise invalid("id", message, "payment_intent_unexpected_state")
    method = call.fields.string("payment_method") or intent["payment_method"]
    return _confirm(world, intent, _card(world, intent["customer"], method))


def cancel_intent(world: World, call: Call) -> Object:
    """Cancel an intent that was not paid."""
    intent = world.find("payment_intent", call.id)
    if intent["status"] in {"succeeded", "canceled"}:
        message = f"You cannot cancel this PaymentIntent because it has a status of {intent['status']}."
        raise invalid("id", message, "payment_intent_unexpected_state")
    intent |= {"status": "canceled", "canceled_at": world.now(intent["customer"])}
    world.emit("payment_intent.canceled", intent)
    return intent


def retrieve_intent(world: World, call: Call) -> Object:
    """One intent."""
    return world.find("payment_intent", call.id)


def list_intents(world: World, call: Call) -> Object:
    """Intents, by `customer` and `created`."""
    return page(only(world.tables["payment_intent"].values(), call.fields, "customer"), call.fields, call.url)


def retrieve_setup_intent(world: World, call: Call) -> Object:
    """One setup intent, as checkout's `setup` mode makes them."""
    return world.find("setup_intent", call.id)


def retrieve_method(world: World, call: Call) -> Object:
    """One payment method."""
    return world.find("payment_method", call.id)


def list_methods(world: World, call: Call) -> Object:
    """Payment methods, by `customer` and `type`."""
    found = only(world.tables["payment_method"].values(), call.fields, "customer", "type")
    return page(found, call.fields, call.url)


def list_methods_of_customer(world: World, call: Call) -> Object:
    """The payment methods of one customer."""
    customer = world.find("customer", call.names["id"])["id"]
    found = only(world.tables["payment_method"].values(), call.fields, "type")
    return page([one for one in found if one["customer"] == customer], call.fields, call.url)


def attach_method(world: World, call: Call) -> Object:
    """Give a customer the payment method. Errors: 402 for the token that declines when attached."""
    customer = world.refer("customer", call.fields.must("customer"), "customer")
    return payments.attach(world, customer["id"], call.id)


def detach_method(world: World, call: Call) -> Object:
    """Take a payment method from its customer."""
    method = world.find("payment_method", call.id)
    customer = world.tables["customer"].get(method["customer"] or "")
    if customer is not None and customer["invoice_settings"]["default_payment_method"] == method["id"]:
        customer["invoice_settings"]["default_payment_method"] = None
    method["customer"] = None
    world.emit("payment_method.detached", method)
    return method


ROUTES = [
    post("/v1/payment_intents", create_intent),
    get("/v1/payment_intents", list_intents),
    get("/v1/payment_intents/{id}", retrieve_intent),
    post("/v1/payment_intents/{id}/confirm", confirm_intent),
    post("/v1/payment_intents/{id}/cancel", cancel_intent),
    get("/v1/setup_intents/{id}", retrieve_setup_intent),
    get("/v1/payment_methods", list_methods),
    get("/v1/payment_methods/{id}", retrieve_method),
    post("/v1/payment_methods/{id}/attach", attach_method),
    post("/v1/payment_methods/{id}/detach", detach_method),
    get("/v1/customers/{id}/payment_methods", list_methods_of_customer),
]
