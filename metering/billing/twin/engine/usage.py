"""Meter events as they were taken in, and the sums that summaries and invoices see of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import msgspec

_WINDOW_SECONDS = {"hour": 3_600, "day": 86_400}


class Usage(msgspec.Struct, kw_only=True):
    """One accepted meter event. Times are Unix seconds; *received_order* breaks ties within a second."""

    identifier: str
    event_name: str
    customer: str
    timestamp: int
    value: int
    received_at: int
    received_order: int = 0
    is_cancelled: bool = False


class MeterRule(msgspec.Struct, frozen=True, kw_only=True):
    """How a meter turns events into a number."""

    event_name: str
    formula: str
    # hour | day: only what was received last counts in each.
    event_time_window: str | None = None


class UsageBook:
    """All meter events by (event name, customer)."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, str], list[Usage]] = defaultdict(list)
        self._by_identifier: dict[str, Usage] = {}
        self._count = 0
        self._settled_order = 0

    def take(self, usage: Usage) -> None:
        """Keep *usage*."""
        self._count += 1
        usage.received_order = self._count
        self._events[usage.event_name, usage.customer].append(usage)
        self._by_identifier[usage.identifier] = usage

    def find(self, identifier: str) -> Usage | None:
        """The newest event of that identifier."""
        return self._by_identifier.get(identifier)

    def timestamps(self, event_name: str, customer: str) -> list[int]:
        """When the customer's events of that name happened, cancelled ones included."""
        return [usage.timestamp for usage in self._events.get((event_name, customer), ())]

    def settle(self) -> None:
        """Count from now on whatever was received until now, whatever the lag."""
        self._settled_order = self._count

    def total(self, rule: MeterRule, customer: str, start: int, end: int, *, visible_at: int | None = None) -> int:
        """The meter's number over [start, end): of what was received by *visible_at*, or of everything for None."""
        chosen = list(self._visible(rule, customer, range(start, end), visible_at))
        if rule.event_time_window:
            chosen = _last_received(chosen, _WINDOW_SECONDS[rule.event_time_window])
        match rule.formula:
            case "count":
                return len(chosen)
            case "last":
                return max(chosen, key=lambda usage: (usage.timestamp, usage.received_order)).value if chosen else 0
            case _:
                return sum(usage.value for usage in chosen)

    def _visible(self, rule: MeterRule, customer: str, span: range, visible_at: int | None) -> Iterator[Usage]:
        for usage in self._events.get((rule.event_name, customer), ()):
            is_known = visible_at is None or usage.received_at <= visible_at
            if usage.timestamp in span and not usage.is_cancelled and (is_known or self._is_settled(usage)):
                yield usage

    def _is_settled(self, usage: Usage) -> bool:
        return usage.received_order <= self._settled_order


def _last_received(chosen: list[Usage], window_seconds: int) -> list[Usage]:
    newest: dict[int, Usage] = {}
    for usage in chosen:
        newest[usage.timestamp // window_seconds] = usage
    return list(newest.values())
