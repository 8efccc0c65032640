"""What was asked and answered, kept for tests and for whoever wonders what an application sent."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the API. *status* is 0 when no answer was given."""

    at: int
    request_id: str
    method: str
    path: str
    # The route's path, with names in braces; empty if there is none.
    route: str
    params: dict[str, Any]
    idempotency_key: str | None
    status: int
    answer: Any
    is_replayed: bool = False
    fault: str | None = None


class Journal:
    """The newest entries, oldest first."""

    def __init__(self, entries_max: int) -> None:
        self.entries: deque[Entry] = deque(maxlen=entries_max)

    def write(self, entry: Entry) -> None:
        """Keep *entry*."""
        self.entries.append(entry)

    def of(self, method: str, route: str) -> list[Entry]:
        """The entries of one route, such as `POST /v1/billing/meter_events`."""
        return [entry for entry in self.entries if entry.method == method and entry.route == route]
