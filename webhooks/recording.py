"""What came of attempts, from when they have ended until it is written.

PostgreSQL down, or a delivery held by somebody: it waits here, and the writing is tried again; that of others goes on.
What is not written when the process is killed is sent again by who comes after: so much and no more (`has_room`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from core.writer import GroupCommit
from webhooks.lanes import Lane
from webhooks.outcomes import Recorded

UNWRITTEN_MAX: Final = 4_000
ORGANIZATION_UNWRITTEN_MAX: Final = 512
"""Who has its own deliveries held stops nobody else."""
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
        self._by_organization: Counter[str] = Counter()
        self._some_written = asyncio.Event()

    def __len__(self) -> int:
        """How many attempts are not written yet."""
        return len(self._ended) + len(self._held)

    def has_room(self, organization_id: str) -> bool:
        """Tell whether more of an organization's may be sent before some of what was sent is written."""
        return len(self._ended) < UNWRITTEN_MAX and self._by_organization[organization_id] < ORGANIZATION_UNWRITTEN_MAX

    def start(self) -> None:
        """Start writing."""
        self._ended.start()

    def add(self, lane: Lane, recorded: Recorded) -> None:
        """Write an attempt with the next ones."""
        self._by_organization[recorded.due.organization_id] += 1
        self._ended.add((lane, recorded))

    async def close(self, timeout_seconds: float) -> int:
        """Write what is left, for as long as *timeout_seconds*; return how much could not be written."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while len(self):
                    self._some_written.clear()
                    await self._some_written.wait()
        return await self._ended.close(0.0) + len(self._held)

    async def _write_most(self, ended: list[Ended]) -> None:
        held = await self._write(ended)
        self._by_organization -= Counter(recorded.due.organization_id for _, recorded in ended)
        if held:
            self._by_organization += Counter(recorded.due.organization_id for _, recorded in held)
            self._held += held
            asyncio.get_running_loop().call_later(_HELD_SECONDS, self._try_held)
        self._some_written.set()

    def _try_held(self) -> None:
        held, self._held = self._held, []
        for one in held:
            self._ended.add(one)
