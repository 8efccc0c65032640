"""Cards and charges: what a payment method does is decided by the token that it was made from."""

from __future__ import annotations

from typing import Any

from metering.billing.twin.errors import Executed, Object, invalid, not_found, part
from metering.billing.twin.shapes import blank, rendered
from metering.billing.twin.world import World

# Stripe's test tokens → (last four digits, whether a charge succeeds).
TOKENS = {
    "pm_card_visa": ("4242", True),
    "pm_card_mastercard": ("4444", True),
    "pm_card_amex": ("8431", True),
    "pm_card_chargeCustomerFail": ("0341", False),
}


def attach(world: World, customer: str, identity: str, param: str = "payment_method") -> Object:
    """Give *customer* the payment method, or a new one made of a test token. Errors: 402 for the declined token."""
    if identity == "pm_card_visa_chargeDeclined":
        raise declined(param="")
    if identity in TOKENS:
        return _made_of_token(world, customer, identity)
    held = world.tables["payment_method"].get(identity)
    if held is None:
        raise not_found("payment_method", identity, param)
    if held["customer"] not in {None, customer}:
        raise invalid(param, "The payment method you provided is attached to another customer.")
    if held["customer"] is None:
        held["customer"] = customer
        world.emit("payment_method.attached", held)
    return held


def _made_of_token(world: World, customer: str, token: str) -> Object:
    last4, succeeds = TOKENS[token]
    brand = "mastercard" if "mastercard" in token else "amex" if "amex" in token else "visa"
    checks: Object = {"address_line1_check": None, "address_postal_code_check": None, "cvc_check": "pass"}
    card: Object = {
        "brand": brand,
        "checks": checks,
        "country": "US",
        "display_brand": brand,
        "exp_month": 12,
        "exp_year": 2040,
        "fingerprint": f"twin{last4}",
        "funding": "credit",
        "generated_from": None,
        "last4": last4,
        "networks": {"available": [brand], "preferred": None},
        "wallet": None,
        "regulated_status": None,
        "three_d_secure_usage": {"supported": True},
    }
    made = blank("payment_method", id=world.make_id("pm"), card=card, created=world.now(customer), customer=customer)
    made["_succeeds"] = succeeds
    world.add(made)
    world.emit("payment_method.attached", made)
    return made


def card_of(world: World, customer: str, chosen: str | None = None) -> Object | None:
    """The payment method that a charge to *customer* uses: the *chosen* one, or the customer's default."""
    held = world.tables["customer"][customer]
    identity = chosen or part(held, "invoice_settings").get("default_payment_method")
    return world.tables["payment_method"].get(identity or "")


def charge(world: World, customer: str, amount: int, card: Object | None, **values: Any) -> Object:
    """Try to take *amount* cents from *card*: the payment intent says how it went."""
    intent = blank(
        "payment_intent",
        id=world.make_id("pi"),
        amount=amount,
        created=world.now(customer),
        currency="usd",
        customer=customer or None,
        status="requires_payment_method",
    )
    intent |= values
    intent["client_secret"] = f"{intent['id']}_secret_twin"
    world.add(intent)
    world.emit("payment_intent.created", intent)
    confirm(world, intent, card)
    return intent


def confirm(world: World, intent: Object, card: Object | None) -> None:
    """Charge *card* for *intent*; a card that declines leaves the intent waiting for another one."""
    if card is None:
        return
    intent["payment_method"] = card["id"]
    if card["_succeeds"]:
        intent["status"] = "succeeded"
        intent["amount_received"] = intent["amount"]
        intent["latest_charge"] = world.make_id("ch")
        intent["last_payment_error"] = None
        world.emit("payment_intent.succeeded", intent)
        return
    intent["status"] = "requires_payment_method"
    intent["payment_method"] = None
    intent["last_payment_error"] = {
        "type": "card_error",
        "code": "card_declined",
        "decline_code": "generic_decline",
        "message": "Your card was declined.",
        "payment_method": rendered(card),
    }
    world.emit("payment_intent.payment_failed", intent)


def declined(intent: Object | None = None, param: str = "") -> Executed:
    """The answer when a card declines."""
    error = Executed(402, "Your card was declined.", code="card_declined", param=param or None, kind="card_error")
    error.more["decline_code"] = "generic_decline"
    if intent is not None:
        error.more["payment_intent"] = rendered(intent)
    return error


def require_card(card: Object | None) -> Object:
    """Refuse to charge a customer who has no payment method."""
    if card is None:
        raise invalid(
            "customer",
            "This customer has no attached payment source or default payment method. Please consider adding one.",
            "resource_missing",
        )
    return card
