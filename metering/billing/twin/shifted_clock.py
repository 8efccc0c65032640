"""A clock that is another one plus what it was moved by."""

from __future__ import annotations

from datetime import datetime, timedelta

from core.clock import Clock


class ShiftedClock:
    """Follows *clock*; can be moved forward, also when *clock* is the machine's own."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._shift = timedelta()

    def now(self) -> datetime:
        """Return the aware UTC time."""
        return self._clock.now() + self._shift

    def monotonic_seconds(self) -> float:
        """Return seconds on a clock that never goes back."""
        return self._clock.monotonic_seconds() + self._shift.total_seconds()

    def advance(self, step: timedelta) -> None:
        """Move forward by *step*."""
        self._shift += step
