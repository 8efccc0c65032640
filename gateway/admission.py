"""How many calls run at once in this process, and how many may wait. Beyond that: 503 before memory grows."""

from __future__ import annotations

import asyncio
from collections import deque

from core.settings import EdgeSettings
from gateway.errors import GatewayFull, GatewayStopping


class Admission:
    """A bounded number of running calls with a bounded queue, first come, first served."""

    def __init__(self, settings: EdgeSettings) -> None:
        self._running_max = settings.in_flight_max
        self._queued_max = settings.queued_max
        self._wait_seconds_max = settings.queue_seconds_max
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()
        self.running = 0
        self.refused = 0
        self.is_stopping = False

    @property
    def queued(self) -> int:
        """How many calls wait."""
        return len(self._waiting)

    def enter_nowait(self) -> bool:
        """Take a place if one is free. Errors: GatewayStopping."""
        if self.is_stopping:
            raise GatewayStopping
        if self.running >= self._running_max or self._waiting:
            return False
        self.running += 1
        return True

    async def enter(self) -> None:
        """Wait for a place. Errors: GatewayFull when too many wait or it takes too long; GatewayStopping."""
        if len(self._waiting) >= self._queued_max:
            self.refused += 1
            raise GatewayFull
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._wait_seconds_max):
                await turn
        except TimeoutError:
            self.refused += 1
            self._give_up(turn)
            raise GatewayFull from None
        except asyncio.CancelledError:
            self._give_up(turn)
            raise

    def leave(self) -> None:
        """Give a place back, to the one who waits longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
        if not self.running:
            self._idle.set()

    def stop(self) -> None:
        """Take no more calls; those that wait are turned away."""
        self.is_stopping = True
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(GatewayStopping())

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until nothing runs; tell whether that was so in time."""
        if self.running:
            self._idle.clear()
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._idle.wait()
            except TimeoutError:
                return False
        return True

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif turn.done() and not turn.cancelled() and turn.exception() is None:
            # The place came in the same moment: pass it on.
            self.leave()
