"""When a delivery that failed is tried again: the schedule of Standard Webhooks, with jitter, and `Retry-After`."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

# Standard Webhooks 1.0, "Retry schedule": after the 1st attempt, the 2nd, and so on; 75 hours in all.
PAUSES_SECONDS: Final = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
ATTEMPTS_MAX: Final = len(PAUSES_SECONDS) + 1
RETRY_AFTER_SECONDS_MAX: Final = 86_400.0
# What failed together is not to come back together.
_JITTER: Final = 0.2


def pause_after(attempts: int, *, retry_after_seconds: float | None = None) -> float | None:
    """Return how many seconds to wait after so many *attempts* of a schedule; None: that was the last.

    What the receiver asked for (*retry_after_seconds*) can make it longer, never shorter.
    """
    if attempts >= ATTEMPTS_MAX:
        return None
    pause = PAUSES_SECONDS[attempts - 1] * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - it is no secret
    return max(pause, retry_after_seconds or 0.0)


def retry_after_seconds(value: bytes | None, now: datetime) -> float | None:
    """Return what a `Retry-After` header asks for, a day at most. None for what is not understood, or past.

    RFC 9110, 10.2.3: seconds, or a date.
    """
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        # A number of a thousand digits is as long as a day, and no reason to convert it.
        seconds = float(text[:9])
    else:
        try:
            moment = parsedate_to_datetime(text)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=UTC)
            seconds = (moment - now).total_seconds()
        except (ValueError, OverflowError):
            return None
    return min(seconds, RETRY_AFTER_SECONDS_MAX) if seconds > 0 else None
