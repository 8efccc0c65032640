"""Whether an endpoint is to be sent an event."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

import msgspec

from webhooks.events import EndpointDisabled, EndpointFailing, wants
from webhooks.filters import Filter

_ABOUT_ONE: Final = frozenset({EndpointFailing.type, EndpointDisabled.type})
"""Types that tell of an endpoint: the others of the organization hear of it, and not itself."""
_BREATH_SECONDS: Final = 0.005


class Interest(NamedTuple):
    """What an endpoint wants."""

    endpoint_id: str
    event_types: Sequence[str]
    filter: Filter | None

    @classmethod
    def of(cls, endpoint: Any) -> Interest:
        """Return what *endpoint* wants, given its `id`, `event_types` and `filter`."""
        return cls(endpoint.id, endpoint.event_types, Filter(endpoint.filter) if endpoint.filter else None)


class Candidate:
    """An event that endpoints are asked about. Its data, JSON, is decoded once, and only if somebody filters."""

    def __init__(self, event_type: str, data: str) -> None:
        self.type = event_type
        self._data = data

    @cached_property
    def data(self) -> Any:
        """The data as filters see it."""
        return msgspec.json.decode(self._data)


def is_wanted(interest: Interest, event: Candidate) -> bool:
    """Tell whether an event goes to an endpoint."""
    if not wants(interest.event_types, event.type):
        return False
    if event.type in _ABOUT_ONE and event.data.get("endpoint_id") == interest.endpoint_id:
        return False
    return interest.filter is None or interest.filter.matches(event.data)


class Breather:
    """Lets the event loop do other things whenever customers' filters have had it for a while."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()

    async def breathe(self) -> None:
        """Return at once, or when everybody else had a turn."""
        if self._loop.time() - self._since > _BREATH_SECONDS:
            await asyncio.sleep(0)
            self._since = self._loop.time()
