"""`expand`: ids that are answered as the objects that they name."""

from __future__ import annotations

from typing import Any, cast

from metering.billing.twin.errors import Object
from metering.billing.twin.shapes import rendered
from metering.billing.twin.world import World

_KINDS = {
    "customer": "customer",
    "default_payment_method": "payment_method",
    "invoice": "invoice",
    "latest_invoice": "invoice",
    "payment_intent": "payment_intent",
    "payment_method": "payment_method",
    "product": "product",
    "setup_intent": "setup_intent",
    "subscription": "subscription",
}


def expand(world: World, answer: Object, paths: list[str]) -> None:
    """Replace ids along *paths* (`latest_invoice`, `data.customer`). What the twin cannot expand stays as it is."""
    for path in paths:
        _expand_along(world, answer, path.split("."))


def _expand_along(world: World, branch: Any, parts: list[str]) -> None:
    if isinstance(branch, list):
        for one in cast("list[Any]", branch):
            _expand_along(world, one, parts)
        return
    if not parts or not isinstance(branch, dict):
        return
    held, name = cast("Object", branch), parts[0]
    if name == "line_items" and held.get("object") == "checkout.session":
        held[name] = _line_items(world, held)
    value = held.get(name)
    if isinstance(value, str) and name in _KINDS and value in world.tables[_KINDS[name]]:
        held[name] = rendered(world.tables[_KINDS[name]][value], older=world.options.older_shapes)
    _expand_along(world, held.get(name), parts[1:])


def _line_items(world: World, session: Object) -> Object:
    items = rendered(world.tables["checkout.session"][session["id"]]["_items"])
    url = f"/v1/checkout/sessions/{session['id']}/line_items"
    return {"object": "list", "data": items, "has_more": False, "url": url}
