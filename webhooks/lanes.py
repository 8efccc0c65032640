"""One endpoint within a worker: what it is due next, how much may be under way, how it is doing."""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import datetime
from typing import Final

from webhooks.attempts import Outcome
from webhooks.health import WELL, Health, after_failure
from webhooks.outcomes import Due
from webhooks.targets import Target

IN_FLIGHT_MAX: Final = 8
# An endpoint that nothing is known of begins small: one that never answers holds little until that is noticed.
_IN_FLIGHT_AT_FIRST: Final = 2
BUFFERED_MAX: Final = 4 * IN_FLIGHT_MAX
_BUFFERED_LOW: Final = BUFFERED_MAX // 2


class Lane:
    """The deliveries of one endpoint. Not more than `window` are under way; who is resting gets none."""

    def __init__(self, target: Target, health: Health) -> None:
        self.target = target
        self.health = health
        self.buffer: deque[Due] = deque()
        self.busy: set[str] = set()
        """Deliveries that are buffered, under way, or not yet written down: not to be fetched again."""
        self.in_flight = 0
        self.is_exhausted = False
        """Whether nothing more was due when it was last asked for."""
        self.is_leaving = False
        """Whether it is to be another worker's once nothing is under way."""
        self.is_being_released = False
        """Whether PostgreSQL is being told that it is nobody's."""
        self.judged_at = 0.0
        """When a verdict was last looked at, so that those which cannot be carried out take turns."""
        self.is_outdated = False
        """Whether its endpoint was changed, and is to be loaded before anything more is sent."""
        self.is_left = False
        """Whether it is no longer this worker's."""
        self.said_percent = health.warned_percent
        """How far its failing was that its organization was last told of."""
        self.idle_since: float | None = None
        self.last_success_at: datetime | None = None
        self.last_problem: str | None = None
        self.is_unsaved = False
        """Whether how it is doing is not yet where another worker would find it."""
        self.timer: asyncio.TimerHandle | None = None
        """Set while the next one waits for its turn by `requests_per_second`."""
        self._window = _IN_FLIGHT_AT_FIRST
        self._next_at = 0.0

    @property
    def window(self) -> int:
        """How many may be under way."""
        return 1 if self.health.is_probing else self._window

    @property
    def room(self) -> int:
        """How many more may be fetched."""
        return BUFFERED_MAX - len(self.buffer) if not self.health.is_probing else max(1 - len(self.busy), 0)

    @property
    def is_hungry(self) -> bool:
        """Whether it is worth fetching more."""
        is_low = len(self.buffer) < _BUFFERED_LOW and self.room > 0
        return is_low and not self.is_exhausted and self.may_begin

    @property
    def may_begin(self) -> bool:
        """Whether this worker may send to it, whatever its health."""
        return not (self.is_outdated or self.is_leaving or self.is_being_released or self.is_left)

    @property
    def is_to_be_judged(self) -> bool:
        """Whether its organization is to be warned, or the endpoint to be disabled."""
        return self.health.disabled_for is not None or self.health.warned_percent > self.said_percent

    def is_resting(self, now: datetime) -> bool:
        """Tell whether nothing is to be sent at present."""
        if self.health.disabled_for is not None:
            return True
        return self.health.resting_until is not None and self.health.resting_until > now

    def rest_seconds(self, now: datetime) -> float | None:
        """Return how much longer it rests."""
        until = self.health.resting_until
        return (until - now).total_seconds() if until is not None and until > now else None

    def seconds_until_next(self, monotonic: float) -> float:
        """Return how long the next one must wait, so that there are not more a second than its owner wants."""
        return max(self._next_at - monotonic, 0.0)

    def begin(self, monotonic: float) -> Due:
        """Return the next delivery: it is under way from now on."""
        self.in_flight += 1
        self.idle_since = None
        if self.target.requests_per_second is not None:
            self._next_at = max(self._next_at, monotonic) + 1 / self.target.requests_per_second
        return self.buffer.popleft()

    def finish(self, outcome: Outcome, now: datetime, target: Target | None = None) -> None:
        """Take note of what comes of an attempt. That of *target*, if it is not what is sent to now, is no news."""
        if outcome.is_ours or not self.is_current(target):
            return
        self.is_unsaved = True
        if outcome.problem is None:
            self._window = min(self._window + 1, IN_FLIGHT_MAX)
            self.last_success_at = now
            if self.health.disabled_for is None:
                # What was under way when it asked for less, or when its rest began, ends no rest.
                self.health = Health(resting_until=self.health.resting_until) if self.is_resting(now) else WELL
            return
        self._window = max(self._window // 2, 1)
        self.last_problem = outcome.problem
        if self.is_resting(now) and outcome.status != 410:
            return  # it was under way when the rest began: that is no news
        self.health = after_failure(self.health, outcome.status, outcome.retry_after_seconds, now)

    def is_current(self, target: Target | None) -> bool:
        """Tell whether *target* is still what is sent to: not enabled anew, or at another address."""
        return target is None or target.enabled_at == self.target.enabled_at

    def become(self, target: Target, health: Health) -> None:
        """Send as *target* says from now on. *health* is of an endpoint that was enabled anew; else this lane knows."""
        if not self.is_current(target):
            self.health, self.said_percent = health, health.warned_percent
        self.target = target
        self.is_outdated = self.is_exhausted = False

    def come_back(self, target: Target, health: Health) -> None:
        """Be this worker's again, with what is still under way from before."""
        self.target, self.health, self.said_percent = target, health, health.warned_percent
        self.is_left = self.is_leaving = self.is_being_released = False
        self.is_outdated = self.is_exhausted = self.is_unsaved = False
        self.idle_since = self.timer = None

    def forget_buffer(self) -> None:
        """Let go of what is not under way; it stays due."""
        self.busy.difference_update(due.delivery_id for due in self.buffer)
        self.buffer.clear()
