"""How an endpoint is doing, and what follows from it: rests, warnings, its end. Rules alone: no clock, no store.

After five failures in a row the circuit is open: nothing is sent for a while that doubles each time, then one delivery
tries. Who answers 429, 502 or 504 is left alone for a moment at once. Who has taken nothing for five days is disabled,
with warnings before; who answers 410 is gone. One success makes everything good again.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

FAILURES_BEFORE_REST: Final = 5
_REST_MIN: Final = timedelta(seconds=30)
_REST_MAX: Final = timedelta(minutes=15)
# Svix waits as long after a 429 that does not say how long.
_THROTTLED_REST: Final = {429: timedelta(seconds=60), 502: timedelta(seconds=5), 504: timedelta(seconds=5)}
DISABLED_AFTER: Final = timedelta(days=5)
WARNINGS_PERCENT: Final = (50, 70, 90)

Reason = Literal["gone", "failing"]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an endpoint. None of *failing_since*: its last attempt succeeded."""

    failing_since: datetime | None = None
    consecutive_failures: int = 0
    warned_percent: int = 0
    resting_until: datetime | None = None
    disabled_for: Reason | None = None

    @property
    def is_probing(self) -> bool:
        """Whether one delivery at a time finds out if it is well again."""
        return self.consecutive_failures >= FAILURES_BEFORE_REST


WELL: Final = Health()


def after_failure(health: Health, status: int | None, retry_after_seconds: float | None, now: datetime) -> Health:
    """Return what *health* is after an attempt that failed with *status* (None: there was no answer)."""
    since = health.failing_since or now
    failures = health.consecutive_failures + 1
    is_over = now - since >= DISABLED_AFTER
    return Health(
        failing_since=since,
        consecutive_failures=failures,
        warned_percent=max([health.warned_percent, *(one for one in WARNINGS_PERCENT if _is_past(since, one, now))]),
        resting_until=_rest(failures, status, retry_after_seconds, now),
        disabled_for="gone" if status == 410 else "failing" if is_over else None,
    )


def _is_past(since: datetime, percent: int, now: datetime) -> bool:
    return (now - since) * 100 >= DISABLED_AFTER * percent


def _rest(failures: int, status: int | None, retry_after_seconds: float | None, now: datetime) -> datetime | None:
    rests: list[timedelta] = []
    if failures >= FAILURES_BEFORE_REST:
        rests.append(min(_REST_MIN * 2 ** min(failures - FAILURES_BEFORE_REST, 16), _REST_MAX))
    if status in {429, 502, 503, 504} and retry_after_seconds is not None:
        rests.append(timedelta(seconds=retry_after_seconds))
    elif status in _THROTTLED_REST:
        rests.append(_THROTTLED_REST[status])
    return now + max(rests) if rests else None
