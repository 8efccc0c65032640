"""Billing credits: grants, and what is left of them."""

from __future__ import annotations

from metering.billing.twin.engine import grants
from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.fields import merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.routing import Call, get, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

_KIND = "billing.credit_grant"


def create_grant(world: World, call: Call) -> Object:
    """Grant a customer credit for metered prices."""
    fields = call.fields
    customer = world.refer("customer", fields.must("customer"), "customer")
    monetary = fields.inner("amount").inner("monetary")
    now = world.now(customer["id"])
    made = blank(
        _KIND,
        id=world.make_id("credgr"),
        amount={
            "type": "monetary",
            "monetary": {"currency": monetary.must("currency"), "value": monetary.must_whole("value")},
        },
        applicability_config={"scope": _scope(world, call)},
        category=fields.one_of("category", "paid", "promotional") or "paid",
        created=now,
        customer=customer["id"],
        effective_at=fields.moment("effective_at") or now,
        expires_at=fields.moment("expires_at"),
        metadata=merge_metadata({}, fields),
        name=fields.string("name"),
        test_clock=customer["test_clock"],
        updated=now,
    )
    if (priority := fields.whole("priority")) is not None:
        made["priority"] = priority
    made["_used"] = 0
    world.add(made)
    world.emit("billing.credit_grant.created", made)
    return made


def _scope(world: World, call: Call) -> Object:
    scope = call.fields.inner("applicability_config").inner("scope")
    prices = [row.must("id") for row in scope.rows("prices")]
    if prices:
        return {"prices": [{"object": "price", "id": world.refer("price", one, "prices")["id"]} for one in prices]}
    scope.must("price_type")
    return {"price_type": scope.one_of("price_type", "metered")}


def update_grant(world: World, call: Call) -> Object:
    """Change the expiry and the metadata."""
    grant, fields = world.find(_KIND, call.id), call.fields
    if fields.has("expires_at"):
        grant["expires_at"] = fields.moment("expires_at")
    grant["metadata"] = merge_metadata(grant["metadata"], fields)
    return _changed(world, grant)


def retrieve_grant(world: World, call: Call) -> Object:
    """One grant."""
    return world.find(_KIND, call.id)


def list_grants(world: World, call: Call) -> Object:
    """Grants, by `customer`."""
    return page(only(world.tables[_KIND].values(), call.fields, "customer"), call.fields, call.url)


def void_grant(world: World, call: Call) -> Object:
    """Make a grant void. Errors: 400 if any of it was used."""
    grant = world.find(_KIND, call.id)
    if grant["_used"]:
        raise invalid("id", "You cannot void a credit grant that has been used.")
    grant["voided_at"] = world.now(grant["customer"])
    return _changed(world, grant)


def expire_grant(world: World, call: Call) -> Object:
    """End a grant now."""
    grant = world.find(_KIND, call.id)
    grant["expires_at"] = world.now(grant["customer"])
    return _changed(world, grant)


def _changed(world: World, grant: Object) -> Object:
    grant["updated"] = world.now(grant["customer"])
    world.emit("billing.credit_grant.updated", grant)
    return grant


def retrieve_balance(world: World, call: Call) -> Object:
    """What is left of the customer's grants: in one currency, or all of them."""
    customer = world.refer("customer", call.fields.must("customer"), "customer")["id"]
    chosen = call.fields.inner("filter").string("credit_grant")
    currencies = {
        grant["amount"]["monetary"]["currency"]
        for grant in world.tables[_KIND].values()
        if grant["customer"] == customer
    }
    balances: list[Object] = []
    for currency in sorted(currencies):
        usable = grants.usable(world, customer, currency)
        value = sum(grants.left(grant) for grant in usable if chosen in {None, grant["id"]})
        amount = {"type": "monetary", "monetary": {"currency": currency, "value": value}}
        balances.append({"available_balance": amount, "ledger_balance": amount})
    return blank("billing.credit_balance_summary", balances=balances, customer=customer)


ROUTES = [
    post("/v1/billing/credit_grants", create_grant),
    get("/v1/billing/credit_grants", list_grants),
    get("/v1/billing/credit_grants/{id}", retrieve_grant),
    post("/v1/billing/credit_grants/{id}", update_grant),
    post("/v1/billing/credit_grants/{id}/void", void_grant),
    post("/v1/billing/credit_grants/{id}/expire", expire_grant),
    get("/v1/billing/credit_balance_summary", retrieve_balance),
]
