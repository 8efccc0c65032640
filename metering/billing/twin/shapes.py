"""Objects as Stripe shapes them: every field of Stripe's own example is there, null unless the twin knows a value.

`examples.json` is a part of Stripe's OpenAPI fixtures (MIT, see examples.LICENSE); only its field names are used, so
that no value of an example ever looks like an answer.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, cast

import msgspec

from metering.billing.twin.errors import Object, part

# Of the vendored file; a test compares.
EXAMPLES_SHA256 = "2fe05f707b94a4cbf06888ba9f566dffbd56703fe088644f71107d0e4e0c0e4b"
EXAMPLES: dict[str, Object] = msgspec.json.decode(files("metering.billing.twin").joinpath("examples.json").read_bytes())
_NO_ADDRESS: Object = dict.fromkeys(("city", "country", "line1", "line2", "postal_code", "state"))
_NO_TAX: Object = {"enabled": False, "liability": None, "disabled_reason": None}
# Maps whose keys the caller chose: nothing in them is the twin's.
_CALLERS_OWN = {"metadata", "payload"}
# What is never null at Stripe, at its resting value.
_RESTING: dict[str, Object] = {
    "product": {"active": True, "images": [], "marketing_features": [], "metadata": {}, "type": "service"},
    "price": {"active": True, "billing_scheme": "per_unit", "metadata": {}, "tax_behavior": "unspecified"},
    "plan": {"active": True, "billing_scheme": "per_unit", "metadata": {}},
    "customer": {
        "balance": 0,
        "delinquent": False,
        "metadata": {},
        "next_invoice_sequence": 1,
        "preferred_locales": [],
        "tax_exempt": "none",
    },
    "subscription": {
        "automatic_tax": _NO_TAX,
        "billing_schedules": [],
        "cancel_at_period_end": False,
        "default_tax_rates": [],
        "cancellation_details": {"comment": None, "feedback": None, "reason": None},
        "discounts": [],
        "invoice_settings": {"account_tax_ids": None, "issuer": {"type": "self"}},
        "metadata": {},
        "payment_settings": {
            "payment_method_options": None,
            "payment_method_types": None,
            "save_default_payment_method": "off",
        },
        "trial_settings": {"end_behavior": {"missing_payment_method": "create_invoice"}},
    },
    "subscription_item": {"discounts": [], "metadata": {}, "tax_rates": []},
    "invoice": {
        **dict.fromkeys(
            (
                *("amount_due", "amount_overpaid", "amount_paid", "amount_remaining", "amount_shipping"),
                *("post_payment_credit_notes_amount", "pre_payment_credit_notes_amount", "starting_balance"),
                *("subtotal", "subtotal_excluding_tax", "total", "total_excluding_tax", "attempt_count"),
            ),
            0,
        ),
        "attempted": False,
        "auto_advance": True,
        "automatic_tax": {**_NO_TAX, "status": None, "provider": None},
        "customer_tax_exempt": "none",
        "customer_tax_ids": [],
        "default_tax_rates": [],
        "discounts": [],
        "issuer": {"type": "self"},
        "metadata": {},
        "total_discount_amounts": [],
        "total_pretax_credit_amounts": [],
        "payment_settings": {"default_mandate": None, "payment_method_options": None, "payment_method_types": None},
        "status_transitions": dict.fromkeys(("finalized_at", "marked_uncollectible_at", "paid_at", "voided_at")),
        "total_taxes": [],
    },
    "line_item": {
        "discount_amounts": [],
        "discountable": True,
        "discounts": [],
        "metadata": {},
        "pretax_credit_amounts": [],
        "taxes": [],
    },
    "invoiceitem": {"discountable": True, "discounts": [], "metadata": {}, "tax_rates": []},
    "item": {"amount_discount": 0, "amount_tax": 0, "metadata": {}},
    "checkout.session": {
        "automatic_tax": {**_NO_TAX, "status": None, "provider": None},
        "custom_fields": [],
        "shipping_options": [],
        "custom_text": dict.fromkeys(("after_submit", "shipping_address", "submit", "terms_of_service_acceptance")),
        "metadata": {},
        "payment_method_options": {},
        "payment_method_types": ["card"],
        "payment_status": "unpaid",
        "phone_number_collection": {"enabled": False},
        "status": "open",
        "ui_mode": "hosted_page",
        "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
    },
    "billing_portal.configuration": {
        "active": True,
        "is_default": False,
        "login_page": {"enabled": False, "url": None},
        "metadata": {},
        "business_profile": dict.fromkeys(("headline", "privacy_policy_url", "terms_of_service_url")),
    },
    "billing.credit_grant": {"metadata": {}, "priority": 50},
    "entitlements.feature": {"active": True, "metadata": {}},
    "webhook_endpoint": {"metadata": {}, "status": "enabled"},
    "event": {"pending_webhooks": 0},
    "test_helpers.test_clock": {"status": "ready", "status_details": {}},
    "payment_intent": {
        "amount_capturable": 0,
        "amount_details": {"tip": {}},
        "amount_received": 0,
        "capture_method": "automatic",
        "confirmation_method": "automatic",
        "metadata": {},
        "payment_method_options": {},
        "payment_record": None,
        "payment_method_types": ["card"],
    },
    "payment_method": {
        "allow_redisplay": "unspecified",
        "billing_details": {"address": _NO_ADDRESS, "email": None, "name": None, "phone": None, "tax_id": None},
        "metadata": {},
        "type": "card",
    },
    "setup_intent": {
        "metadata": {},
        "payment_method_options": {},
        "payment_method_types": ["card"],
        "usage": "off_session",
    },
}


def blank(kind: str, **values: Any) -> Object:
    """An object of *kind* with all of Stripe's fields: *values*, the resting values, and null for the rest."""
    example = EXAMPLES[kind]
    made: Object = {name: None for name in example if name != "livemode"}
    made |= cast("Object", _copied(_RESTING.get(kind, {})))
    if "livemode" in example:
        made["livemode"] = False
    return made | {"object": kind} | values


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in cast("Object", tree).items()}
    if isinstance(tree, list):
        return [_copied(value) for value in cast("list[Any]", tree)]
    return tree


def rendered(tree: Any, *, older: bool = False) -> Any:
    """A copy of *tree* as it leaves the twin: what begins with an underscore is the twin's own and stays."""
    if isinstance(tree, dict):
        made = {
            key: _copied(value) if key in _CALLERS_OWN else rendered(value, older=older)
            for key, value in cast("Object", tree).items()
            if not key.startswith("_")
        }
        return _in_older_shape(made, cast("Object", tree)) if older else made
    if isinstance(tree, list):
        return [rendered(value, older=older) for value in cast("list[Any]", tree)]
    return tree


def _in_older_shape(made: Object, tree: Object) -> Object:
    match made.get("object"):
        case "subscription":
            items: list[Object] = made["items"]["data"]
            first = items[0] if items else {}
            made["current_period_start"] = first.get("_period_start")
            made["current_period_end"] = first.get("_period_end")
            made["items"]["data"] = [
                {key: value for key, value in item.items() if not key.startswith("_")} for item in items
            ]
        case "subscription_item":
            made["_period_start"] = made.pop("current_period_start", None)
            made["_period_end"] = made.pop("current_period_end", None)
        case "invoice":
            details = part(made.pop("parent", None), "subscription_details")
            made["subscription"] = details.get("subscription")
            made["subscription_details"] = {"metadata": details.get("metadata")}
        case "line_item":
            _line_in_older_shape(made, tree)
        case _:
            pass
    return made


def _line_in_older_shape(line: Object, tree: Object) -> None:
    del line["pricing"]
    parent = part(line.pop("parent"))
    details = part(parent, "subscription_item_details") or part(parent, "invoice_item_details")
    line["price"] = rendered(tree["_price"])
    line["type"] = "subscription" if parent.get("type") == "subscription_item_details" else "invoiceitem"
    line["subscription_item"] = details.get("subscription_item")
    line["proration"] = bool(details.get("proration"))
