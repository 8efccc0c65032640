"""What came of attempts, from when they have ended until it is written.

PostgreSQL down, or a delivery held by somebody: it waits here, and the writing is tried again; that of others goes on.
What is not written when the process is killed is sent again by who comes after: so much and no more (`is_full`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from core.writer import GroupCommit
from webhooks.lanes import Lane
from webhooks.outcomes import Recorded

UNWRITTEN_MAX: Final = 4_000
_PAUSE_SECONDS: Final = 0.005
_ROWS_MAX: Final = 500
_HELD_SECONDS: Final = 0.25

Ended = tuple[Lane, Recorded]


class Recording:
    """Writes attempts, many at once."""

    def __init__(self, write: Callable[[list[Ended]], Awaitable[list[Ended]]]) -> None:
        """*write* returns those that it could not write, because somebody holds their deliveries."""
        self._write = write
        self._ended: GroupCommit[Ended] = GroupCommit(
            "webhooks.attempts", self._write_most, pause_seconds=_PAUSE_SECONDS, rows_max=_ROWS_MAX
        )
        self._held: list[Ended] = []
        self._is_closing = False

    def __len__(self) -> int:
        """How many attempts are not written yet."""
        return len(self._ended) + len(self._held)

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be sent before some of it is written."""
        return len(self) >= UNWRITTEN_MAX

    def start(self) -> None:
        """Start writing."""
        self._ended.start()

    def add(self, lane: Lane, recorded: Recorded) -> None:
        """Write an attempt with the next ones."""
        self._ended.add((lane, recorded))

    async def close(self, timeout_seconds: float) -> int:
        """Write what is left, for as long as *timeout_seconds*; return how much could not be written."""
        self._is_closing = True
        self._try_held()
        return await self._ended.close(timeout_seconds)

    async def _write_most(self, ended: list[Ended]) -> None:
        held = await self._write(ended)
        while held and self._is_closing:
            await asyncio.sleep(_HELD_SECONDS)
            held = await self._write(held)
        if held:
            self._held += held
            asyncio.get_running_loop().call_later(_HELD_SECONDS, self._try_held)

    def _try_held(self) -> None:
        held, self._held = self._held, []
        for one in held:
            self._ended.add(one)
