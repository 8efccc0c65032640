"""Time as a parameter, so that tests own it."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """What the time is, for people (`now`) and for measuring (`monotonic_seconds`)."""

    def now(self) -> datetime:
        """Return the aware UTC time."""
        ...

    def monotonic_seconds(self) -> float:
        """Return seconds on a clock that never goes back."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        """Return the aware UTC time."""
        return datetime.now(UTC)

    def monotonic_seconds(self) -> float:
        """Return seconds on a clock that never goes back."""
        return time.monotonic()


class ManualClock:
    """A clock that moves when told to: for tests, and for asking what would happen later."""

    def __init__(self, start: datetime) -> None:
        self._now = start
        self._monotonic_seconds = 0.0

    def now(self) -> datetime:
        """Return the time it was set to."""
        return self._now

    def monotonic_seconds(self) -> float:
        """Return the seconds that it was moved by."""
        return self._monotonic_seconds

    def advance(self, step: timedelta) -> None:
        """Move both clocks forward by *step*."""
        self._now += step
        self._monotonic_seconds += step.total_seconds()
