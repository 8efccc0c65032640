"""Checkout sessions: a page of the twin takes the place of Stripe's."""

from __future__ import annotations

from metering.billing.twin.engine import payments, subscribing
from metering.billing.twin.engine.lines import is_metered
from metering.billing.twin.errors import Object, invalid, missing
from metering.billing.twin.fields import Fields, merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.options import DAY_SECONDS
from metering.billing.twin.resources.customers import new_customer
from metering.billing.twin.resources.products import price_of
from metering.billing.twin.resources.wishes import wish_of
from metering.billing.twin.routing import Call, get, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

_KIND = "checkout.session"
_MODES = ("payment", "setup", "subscription")


def create_session(world: World, call: Call) -> Object:
    """Create a session; its `url` is a page of this twin."""
    fields = call.fields
    fields.must("mode")
    mode = fields.one_of("mode", *_MODES) or ""
    customer = fields.string("customer")
    if customer is not None:
        world.refer("customer", customer, "customer")
    items = [_item(world, row, mode) for row in fields.rows("line_items")]
    if mode != "setup" and not items:
        raise missing("line_items")
    if mode == "subscription" and not any(item["price"]["recurring"] for item in items):
        message = "You must provide at least one recurring price in `subscription` mode when using prices."
        raise invalid("line_items", message)
    made = _made(world, fields, mode, items)
    if mode == "subscription":
        # What cannot be subscribed to is refused here, as at Stripe, not when the customer pays.
        rows = [Fields(_wish_row(item), f"line_items[{index}]") for index, item in enumerate(items)]
        wish_of(world, customer or "", fields.inner("subscription_data"), rows)
    world.add(made)
    world.agenda.plan(world.timeline_of(customer), made["expires_at"], "checkout.expire", made["id"])
    return made


def _item(world: World, row: Fields, mode: str) -> Object:
    described = row.inner("price_data")
    if described.values:
        price = world.add(price_of(world, described))
    else:
        price = world.refer("price", row.must("price"), row.name_of("price"))
    if mode == "payment" and price["recurring"] is not None:
        message = "You specified `payment` mode but passed a recurring price. Use `subscription` mode instead."
        raise invalid(row.name_of("price"), message)
    quantity = row.whole("quantity")
    if is_metered(price) and quantity is not None:
        raise invalid(row.name_of("quantity"), "Quantity should not be specified where usage_type is `metered`.")
    if not is_metered(price) and quantity is None:
        message = f"Quantity is required. Add `quantity` to `{row.name_of('quantity')}`"
        raise invalid(row.name_of("quantity"), message, "parameter_missing")
    amount = (price["unit_amount"] or 0) * (quantity or 0)
    return blank(
        "item",
        id=world.make_id("li"),
        amount_subtotal=amount,
        amount_total=amount,
        currency=price["currency"],
        description=world.tables["product"][price["product"]]["name"],
        price=price,
        quantity=quantity,
    )


def _made(world: World, fields: Fields, mode: str, items: list[Object]) -> Object:
    customer = fields.string("customer")
    now = world.now(customer)
    identity = world.make_id("cs_test")
    total = sum(item["amount_total"] for item in items)
    made = blank(
        _KIND,
        id=identity,
        amount_subtotal=None if mode == "setup" else total,
        amount_total=None if mode == "setup" else total,
        cancel_url=fields.string("cancel_url"),
        client_reference_id=fields.string("client_reference_id"),
        created=now,
        currency=items[0]["currency"] if items else None,
        customer=customer,
        customer_creation=fields.string("customer_creation"),
        customer_email=fields.string("customer_email"),
        expires_at=fields.moment("expires_at") or now + DAY_SECONDS,
        metadata=merge_metadata({}, fields),
        mode=mode,
        payment_method_collection=fields.string("payment_method_collection") or "always",
        success_url=fields.string("success_url"),
        url=f"{world.base_url}/pay/{identity}",
        allow_promotion_codes=fields.flag("allow_promotion_codes"),
    )
    made["_items"] = items
    made["_fields"] = fields
    return made


def retrieve_session(world: World, call: Call) -> Object:
    """One session."""
    return world.find(_KIND, call.id)


def list_sessions(world: World, call: Call) -> Object:
    """Sessions, by `customer`, `payment_intent`, `subscription` and `status`."""
    names = ("customer", "payment_intent", "subscription", "status")
    return page(only(world.tables[_KIND].values(), call.fields, *names), call.fields, call.url)


def list_items(world: World, call: Call) -> Object:
    """The lines of a session."""
    return page(world.find(_KIND, call.id)["_items"], call.fields, call.url, newest_first=False)


def expire_session(world: World, call: Call) -> Object:
    """Close an open session."""
    session = world.find(_KIND, call.id)
    if session["status"] != "open":
        raise invalid("session", 'Only Checkout Sessions with a status in ["open"] can be expired.')
    session["status"], session["url"] = "expired", None
    world.emit("checkout.session.expired", session)
    return session


def complete(world: World, session: Object, token: str = "pm_card_visa") -> bool:  # noqa: S107 - a test card's name
    """Do what the customer's click on "Pay" does. Returns whether the card paid; if not, the session stays open."""
    if session["status"] != "open":
        raise invalid("session", f"This session is {session['status']}.")
    is_new_customer = session["customer"] is None
    customer = _customer(world, session)
    method = payments.attach(world, customer["id"], token)
    if session["mode"] != "setup" and session["amount_total"] and not method["_succeeds"]:
        _decline(world, session, customer, method, is_new_customer=is_new_customer)
        return False
    session["customer"] = customer["id"]
    # The card is kept, and is nobody's default but a subscription's: Stripe's own page does not make it one.
    if is_new_customer:
        world.emit("customer.created", customer)
    _BY_MODE[session["mode"]](world, session, method)
    session["status"], session["url"] = "complete", None
    session["payment_status"] = "paid" if session["amount_total"] else "no_payment_required"
    session["customer_details"] = {
        "address": None,
        "email": customer["email"],
        "name": customer["name"],
        "phone": None,
        "tax_ids": [],
        "tax_exempt": "none",
        "business_name": None,
        "individual_name": None,
    }
    world.emit("checkout.session.completed", session)
    return True


def _customer(world: World, session: Object) -> Object:
    if session["customer"] is not None:
        return world.find("customer", session["customer"])
    made = new_customer(world)
    made["email"] = session["customer_email"] or "customer@example.com"
    return made


def _decline(world: World, session: Object, customer: Object, method: Object, *, is_new_customer: bool) -> None:
    payments.charge(world, customer["id"], session["amount_total"], method, currency=session["currency"])
    if is_new_customer:
        del world.tables["customer"][customer["id"]]


def _complete_subscription(world: World, session: Object, method: Object) -> None:
    asked: Fields = session["_fields"].inner("subscription_data")
    rows = [Fields(_wish_row(item)) for item in session["_items"]]
    values = asked.values | {"default_payment_method": method["id"]}
    subscription = subscribing.begin(world, wish_of(world, session["customer"], Fields(values), rows))
    session["subscription"] = subscription["id"]
    session["invoice"] = subscription["latest_invoice"]
    # In a trial, nothing is paid today.
    invoice = world.tables["invoice"][subscription["latest_invoice"]]
    session["amount_total"] = session["amount_subtotal"] = invoice["amount_due"]


def _wish_row(item: Object) -> Object:
    row: Object = {"price": item["price"]["id"]}
    return row if item["quantity"] is None else row | {"quantity": str(item["quantity"])}


def _complete_payment(world: World, session: Object, method: Object) -> None:
    asked: Fields = session["_fields"].inner("payment_intent_data")
    intent = payments.charge(
        world,
        session["customer"],
        session["amount_total"],
        method,
        currency=session["currency"],
        description=asked.string("description"),
        metadata=merge_metadata({}, asked),
        setup_future_usage=asked.string("setup_future_usage"),
    )
    session["payment_intent"] = intent["id"]


def _complete_setup(world: World, session: Object, method: Object) -> None:
    asked: Fields = session["_fields"].inner("setup_intent_data")
    intent = blank(
        "setup_intent",
        id=world.make_id("seti"),
        created=world.now(session["customer"]),
        customer=session["customer"],
        description=asked.string("description"),
        metadata=merge_metadata({}, asked),
        payment_method=method["id"],
        status="succeeded",
    )
    world.add(intent)
    world.emit("setup_intent.succeeded", intent)
    session["setup_intent"] = intent["id"]


_BY_MODE = {"subscription": _complete_subscription, "payment": _complete_payment, "setup": _complete_setup}

ROUTES = [
    post("/v1/checkout/sessions", create_session),
    get("/v1/checkout/sessions", list_sessions),
    get("/v1/checkout/sessions/{id}", retrieve_session),
    get("/v1/checkout/sessions/{id}/line_items", list_items),
    post("/v1/checkout/sessions/{id}/expire", expire_session),
]
