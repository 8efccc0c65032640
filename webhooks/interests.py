"""Whether an endpoint is to be sent an event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from webhooks.events import EndpointDisabled, EndpointFailing, wants
from webhooks.filters import matches

_ABOUT_ONE: Final = frozenset({EndpointFailing.type, EndpointDisabled.type})
"""Types that tell of an endpoint: the others of the organization hear of it, and not itself."""


class Interest(NamedTuple):
    """What an endpoint wants."""

    endpoint_id: str
    event_types: Sequence[str]
    filter: str | None


def is_wanted(interest: Interest, event_type: str, data: str) -> bool:
    """Tell whether an event goes to an endpoint. *data* is JSON, and decoded only where it matters."""
    if not wants(interest.event_types, event_type):
        return False
    if interest.filter is None and event_type not in _ABOUT_ONE:
        return True
    decoded = msgspec.json.decode(data)
    if event_type in _ABOUT_ONE and decoded.get("endpoint_id") == interest.endpoint_id:
        return False
    return matches(interest.filter, decoded)
