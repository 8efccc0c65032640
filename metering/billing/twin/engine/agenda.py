"""What falls due when: per timeline, since each test clock has a time of its own."""

from __future__ import annotations

import heapq
from collections import defaultdict
from typing import NamedTuple

# The timeline of whoever has no test clock.
WALL = ""


class Due(NamedTuple):
    """An act on an object at a time; *order* keeps acts of one second in the order in which they were planned."""

    at: int
    order: int
    act: str
    identity: str


class Agenda:
    """Planned acts. An act finds out itself whether it still applies: plans are never taken back."""

    def __init__(self) -> None:
        self._plans: dict[str, list[Due]] = defaultdict(list)
        self._order = 0

    def plan(self, timeline: str, at: int, act: str, identity: str) -> None:
        """Have *act* done to *identity* once *timeline* reaches *at* (Unix seconds)."""
        self._order += 1
        heapq.heappush(self._plans[timeline], Due(at, self._order, act, identity))

    def take_due(self, timeline: str, until: int) -> Due | None:
        """Take the next act that is due by *until*."""
        plans = self._plans.get(timeline)
        if not plans or plans[0].at > until:
            return None
        return heapq.heappop(plans)
