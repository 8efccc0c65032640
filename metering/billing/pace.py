"""How fast Stripe is asked."""

from __future__ import annotations

import asyncio

from core.clock import Clock


class Pace:
    """Lets calls pass at a rate: those who come too early wait for their turn, in order."""

    def __init__(self, clock: Clock, per_second: float) -> None:
        self._clock = clock
        self._gap_seconds = 1 / per_second
        self._next_seconds = 0.0

    async def turn(self) -> None:
        """Return when it is the caller's turn."""
        now = self._clock.monotonic_seconds()
        self._next_seconds = max(now, self._next_seconds) + self._gap_seconds
        wait_seconds = self._next_seconds - self._gap_seconds - now
        if wait_seconds > 0:
            await asyncio.sleep(wait_seconds)
