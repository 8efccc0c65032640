"""Which parameters Stripe knows on each route: others are refused, as Stripe does, instead of being ignored.

`parameters.json` holds the names of the stripe package's parameter types; a test compares the two.
"""

from __future__ import annotations

from importlib.resources import files

import msgspec

from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.routing import Route

_KNOWN: dict[str, list[str]] = msgspec.json.decode(
    files("metering.billing.twin").joinpath("parameters.json").read_bytes()
)


def refuse_unknown(route: Route, params: Object) -> None:
    """Errors: 400 parameter_unknown for a name that Stripe does not know here; names inside others are not checked."""
    known = _KNOWN.get(f"{route.method} {route.path}")
    if known is None:
        return
    for name in params:
        if name not in known:
            raise invalid(name, f"Received unknown parameter: {name}", "parameter_unknown")
