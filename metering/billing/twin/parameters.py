"""Which parameters Stripe knows on each route: others are refused, as Stripe does, instead of being ignored.

`parameters.json` holds the names of the stripe package's parameter types; a test compares the two.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, cast

import msgspec

from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.routing import Route

# Stripe knows them and they change amounts: ignoring them would make wrong invoices.
_CHANGE_AMOUNTS = {
    *("add_invoice_items", "coupon", "custom_unit_amount", "default_tax_rates", "discounts", "invoice_items"),
    *("promotion_code", "tax_rates", "tiers", "transform_quantity"),
}
# A name without names inside is true: it takes any value.
KNOWN: dict[str, Object] = msgspec.json.decode(files("metering.billing.twin").joinpath("parameters.json").read_bytes())


def refuse_unknown(route: Route, params: Object) -> None:
    """Errors: 400 parameter_unknown for a name that Stripe does not know on this route, at any depth.

    Names that Stripe knows, the twin does not, and invoices depend on, are refused too.
    """
    known = KNOWN.get(f"{route.method} {route.path}")
    if known is not None:
        _refuse_within(params, known, "")


def _refuse_within(value: Any, known: Any, path: str) -> None:
    if not isinstance(known, dict):
        return
    if isinstance(value, list):
        for index, one in enumerate(cast("list[Any]", value)):
            _refuse_within(one, known, f"{path}[{index}]")
    elif isinstance(value, dict):
        names = cast("Object", known)
        for name, inner in cast("Object", value).items():
            place = f"{path}[{name}]" if path else name
            if name not in names:
                raise invalid(place, f"Received unknown parameter: {place}", "parameter_unknown")
            if name in _CHANGE_AMOUNTS and inner:
                raise invalid(place, f"This twin does not know what `{place}` does to amounts.")
            _refuse_within(inner, names[name], place)
