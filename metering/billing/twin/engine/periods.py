"""Billing periods by the calendar: months are counted from the anchor, and end at the month's last day if shorter."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime
from typing import NamedTuple

_SECONDS = {"day": 86_400, "week": 604_800}
_MONTHS = {"month": 1, "year": 12}


class Interval(NamedTuple):
    """How often a price recurs: `month`, 1."""

    unit: str
    length: int

    def after(self, anchor: int, number: int = 1) -> int:
        """The end of the *number*th period from *anchor*: counted from the anchor, so that 31 January is kept."""
        if self.unit in _SECONDS:
            return anchor + _SECONDS[self.unit] * self.length * number
        return _add_months(anchor, _MONTHS[self.unit] * self.length * number)

    def around(self, anchor: int, at: int) -> tuple[int, int]:
        """The period of this interval, counted from *anchor*, that holds *at*."""
        span = self.after(anchor) - anchor
        number = (at - anchor) // span
        while self.after(anchor, number) > at:
            number -= 1
        while self.after(anchor, number + 1) <= at:
            number += 1
        return self.after(anchor, number), self.after(anchor, number + 1)

    @property
    def seconds_about(self) -> int:
        """For comparing lengths only: a month counts 31 days."""
        if self.unit in _SECONDS:
            return _SECONDS[self.unit] * self.length
        return 31 * _SECONDS["day"] * _MONTHS[self.unit] * self.length


def _add_months(anchor: int, months: int) -> int:
    moment = datetime.fromtimestamp(anchor, UTC)
    year, month = divmod(moment.year * 12 + moment.month - 1 + months, 12)
    day = min(moment.day, calendar.monthrange(year, month + 1)[1])
    return int(moment.replace(year=year, month=month + 1, day=day).timestamp())
