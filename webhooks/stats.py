"""Numbers of one worker: what came of attempts, how long they took, and how long deliveries waited for the first."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Final

from webhooks.attempts import Outcome

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
WAITED_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 600.0)


class Distribution:
    """Counts per bucket of *bounds* (the last is everything above), and the sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class DeliveryStats:
    """What a worker has done since it started, and what is due."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()
        """Attempts by result: succeeded, rejected (an answer that is none of 2xx), unreachable (no answer), postponed
        (for a reason of our own)."""
        self.durations = Distribution(SECONDS)
        self.waits = Distribution(WAITED_SECONDS)
        """From an event, or from when its owner asked for it again, to the beginning of the first attempt."""
        self.due = 0
        """Deliveries whose time has come, of all workers; counted up to a bound."""
        self.oldest_due_since: float | None = None
        """Since when the oldest of them is due, on the clock that only goes forward; None: nothing is due."""
        self.endpoints = 0
        self.in_flight = 0

    def oldest_due_seconds(self, monotonic: float) -> float:
        """Return for how long the oldest delivery has been due: longer and longer while nobody can look."""
        return 0.0 if self.oldest_due_since is None else max(monotonic - self.oldest_due_since, 0.0)

    def waited(self, seconds: float) -> None:
        """Count a first attempt that begins."""
        self.waits.observe(max(seconds, 0.0))

    def attempted(self, outcome: Outcome) -> None:
        """Count an attempt that has ended."""
        if outcome.is_ours:
            self.results["postponed"] += 1
            return
        self.durations.observe(outcome.duration_ms / 1000)
        failure = "unreachable" if outcome.status is None else "rejected"
        self.results["succeeded" if outcome.problem is None else failure] += 1
