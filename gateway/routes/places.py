"""Places for requests that read a lot: so many at once of one organization, and so many of the process.

Whoever finds none waits, briefly and in order. A place that comes free goes to the organization that has the fewest, so
that what others have sent before, however much, holds up nobody for longer than one of their requests takes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator
from typing import NamedTuple

import msgspec

from core.errors import AppError, RateLimited, Unavailable
from core.ids import OrganizationId


class ShareTaken(RateLimited):
    """The organization's own requests have every place that one organization may have."""

    code = "rate_limit_exceeded"

    def __init__(self, of_one: int, retry_after_seconds: float) -> None:
        super().__init__(
            f"Your organization reads too much at once: {of_one} of these requests are answered at a time. "
            "Please try again.",
            retry_after_seconds=retry_after_seconds,
        )


class PlacesTaken(Unavailable):
    """Other organizations' requests have the process's places."""

    code = "overloaded"

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__("Too much is being read just now. Please try again.", retry_after_seconds=retry_after_seconds)


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """How many places there are, for one organization and in all; how many requests may wait for one, and how long."""

    of_one: int
    in_all: int
    queued_of_one: int = 16
    """A page that shows every kind of usage asks eleven times at once."""
    queued_in_all: int = 256
    wait_seconds_max: float = 2.0
    retry_after_seconds: float = 1.0


class _Turn(NamedTuple):
    organization_id: OrganizationId
    coming: asyncio.Future[None]


class Places:
    """The places of one process for one kind of request. They are in memory: no store can take them away."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._running: Counter[OrganizationId] = Counter()
        self._waiting: list[_Turn] = []

    @contextlib.asynccontextmanager
    async def taken(self, organization_id: OrganizationId) -> AsyncGenerator[None]:
        """Take a place for as long as the context lasts, however it ends.

        Errors, when none comes free in time or too many wait already: ShareTaken where the organization has all that
        one may have, else PlacesTaken.
        """
        await self._enter(organization_id)
        try:
            yield
        finally:
            self._leave(organization_id)

    async def _enter(self, organization_id: OrganizationId) -> None:
        # Nobody is overtaken: whoever waits has no room, or would have been let in by who left.
        if self._has_room(organization_id):
            self._running[organization_id] += 1
            return
        if self._is_queue_full(organization_id):
            raise self._refusal(organization_id)
        turn = _Turn(organization_id, asyncio.get_running_loop().create_future())
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._bounds.wait_seconds_max):
                await turn.coming
        except TimeoutError:
            self._give_up(turn)
            raise self._refusal(organization_id) from None
        except asyncio.CancelledError:
            self._give_up(turn)
            raise

    def _leave(self, organization_id: OrganizationId) -> None:
        self._running[organization_id] -= 1
        if not self._running[organization_id]:
            del self._running[organization_id]
        while (turn := self._next()) is not None:
            self._waiting.remove(turn)
            self._running[turn.organization_id] += 1
            turn.coming.set_result(None)

    def _next(self) -> _Turn | None:
        """Return who is to have a free place: of the organizations with the fewest, the request that waits longest."""
        can_enter = [turn for turn in self._waiting if not turn.coming.done() and self._has_room(turn.organization_id)]
        return min(can_enter, key=lambda turn: self._running[turn.organization_id], default=None)

    def _has_room(self, organization_id: OrganizationId) -> bool:
        return self._running[organization_id] < self._bounds.of_one and self._running.total() < self._bounds.in_all

    def _is_queue_full(self, organization_id: OrganizationId) -> bool:
        own = sum(turn.organization_id == organization_id for turn in self._waiting)
        return own >= self._bounds.queued_of_one or len(self._waiting) >= self._bounds.queued_in_all

    def _refusal(self, organization_id: OrganizationId) -> AppError:
        bounds = self._bounds
        if self._running[organization_id] >= bounds.of_one:
            return ShareTaken(bounds.of_one, bounds.retry_after_seconds)
        return PlacesTaken(bounds.retry_after_seconds)

    def _give_up(self, turn: _Turn) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif not turn.coming.cancelled():
            # The place came in the same moment: pass it on.
            self._leave(turn.organization_id)
