"""Billing credits: grants that pay metered lines, once their invoice is final."""

from __future__ import annotations

from metering.billing.twin.errors import Object
from metering.billing.twin.world import World

_NEVER = 2**62


def usable(world: World, customer: str, currency: str) -> list[Object]:
    """The grants that can pay now, in Stripe's order: priority, then expiry, then age."""
    now = world.now(customer)
    found = [grant for grant in world.tables["billing.credit_grant"].values() if _is_usable(grant, customer, now)]
    fitting = [grant for grant in found if grant["amount"]["monetary"]["currency"] == currency]
    return sorted(fitting, key=lambda one: (one["priority"], one["expires_at"] or _NEVER, one["created"]))


def _is_usable(grant: Object, customer: str, now: int) -> bool:
    is_begun = (grant["effective_at"] or grant["created"]) <= now
    is_over = grant["voided_at"] is not None or (grant["expires_at"] or _NEVER) <= now
    return grant["customer"] == customer and is_begun and not is_over


def left(grant: Object) -> int:
    """Cents of *grant* that were not used."""
    return int(grant["amount"]["monetary"]["value"]) - grant["_used"]


def apply(world: World, invoice: Object) -> int:
    """Pay the metered lines of *invoice* with the customer's grants. Returns the cents that they paid."""
    paid = 0
    for grant in usable(world, invoice["customer"], invoice["currency"]):
        for line in invoice["lines"]["data"]:
            paid += _pay_line(world, grant, line)
    return paid


def _pay_line(world: World, grant: Object, line: Object) -> int:
    credited = sum(one["amount"] for one in line["pretax_credit_amounts"])
    amount = min(left(grant), line["amount"] - credited)
    if amount <= 0 or not _covers(grant, line):
        return 0
    grant["_used"] += amount
    line["pretax_credit_amounts"].append(
        {
            "amount": amount,
            "credit_balance_transaction": world.make_id("cbtxn"),
            "discount": None,
            "type": "credit_balance_transaction",
            "_grant": grant["id"],
        }
    )
    return amount


def _covers(grant: Object, line: Object) -> bool:
    usage = line.get("_usage")
    if usage is None:
        return False
    prices = grant["applicability_config"]["scope"].get("prices")
    return not prices or usage["price"]["id"] in {price["id"] for price in prices}


def give_back(world: World, invoice: Object) -> None:
    """A voided invoice returns what grants paid of it."""
    for line in invoice["lines"]["data"]:
        for one in line["pretax_credit_amounts"]:
            world.tables["billing.credit_grant"][one["_grant"]]["_used"] -= one["amount"]
