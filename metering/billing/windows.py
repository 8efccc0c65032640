"""Which usage is to be reported, and to which time. No store and no clock: facts go in, and what to tell comes out.

A window is an hour, cut at the minute where a billing period begins or ends in it. What is counted of a window is what
the ledger has of it less what was planned before, so that usage that is settled late, and corrections, are reported as
the difference that they make. Usage outside every billed period is nobody's to pay, and is written off once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

HOUR: Final = timedelta(hours=1)
SETTLING: Final = timedelta(seconds=90)
"""How long after its end a window is left alone, for calls that end late and for group commits."""
PAST_MAX: Final = timedelta(days=34)
"""Stripe takes usage of the last 35 days; a day is left for trying again."""


class Period(msgspec.Struct, frozen=True, kw_only=True):
    """A time in which usage is billed; *is_closed* when what is told of it no longer counts. No end: prepaid."""

    starts_at: datetime
    ends_at: datetime
    is_closed: bool = False
    is_prepaid: bool = False


class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger has of an hour, whole and by minute. Minutes are kept for some days only."""

    starts_at: datetime
    total: int
    minutes: Mapping[datetime, int] = {}


class Due(msgspec.Struct, frozen=True, kw_only=True):
    """Usage of a window that is not planned yet. No *event_at*: nobody is to be told."""

    window_starts_at: datetime
    amount: int
    event_at: datetime | None
    is_carried: bool = False
    is_prepaid: bool = False


class Uncollected(msgspec.Struct, frozen=True, kw_only=True):
    """Usage of a billed window that no period takes any more."""

    window_starts_at: datetime
    amount: int


def hour_of(moment: datetime) -> datetime:
    """Return when the hour around *moment* began."""
    return moment.replace(minute=0, second=0, microsecond=0)


def minute_of(moment: datetime) -> datetime:
    """Return when the minute around *moment* began."""
    return moment.replace(second=0, microsecond=0)


def due_windows(
    hours: Iterable[Hour],
    planned: Mapping[datetime, int],
    periods: Sequence[Period],
    now: datetime,
    *,
    is_flush: bool,
) -> tuple[list[Due], list[Uncollected]]:
    """Return what is to be reported now, oldest first, and what cannot be any more.

    *planned* is what was planned of each window. With *is_flush* windows that are not over count too.
    """
    due: list[Due] = []
    uncollected: list[Uncollected] = []
    for hour in sorted(hours, key=lambda hour: hour.starts_at):
        for starts_at, ends_at, amount in _windows(hour, planned, periods):
            owed = amount - planned.get(starts_at, 0)
            if not owed:
                continue
            period = _period_at(starts_at, periods)
            if period is None:
                # Only a part of an hour is written off: the whole of one outside of all periods has no window.
                if starts_at in planned or ends_at - starts_at < HOUR:
                    due.append(Due(window_starts_at=starts_at, amount=owed, event_at=None))
            elif is_flush or now >= ends_at + SETTLING:
                told_at, is_carried = _told_at(starts_at, period, periods, now)
                if told_at is None:
                    uncollected.append(Uncollected(window_starts_at=starts_at, amount=owed))
                else:
                    due.append(
                        Due(
                            window_starts_at=starts_at,
                            amount=owed,
                            event_at=told_at,
                            is_carried=is_carried,
                            is_prepaid=period.is_prepaid,
                        )
                    )
    return due, uncollected


def _windows(
    hour: Hour, planned: Mapping[datetime, int], periods: Sequence[Period]
) -> list[tuple[datetime, datetime, int]]:
    """Return the windows of an hour and what the ledger has of each."""
    ends_at = hour.starts_at + HOUR
    bounds = {minute_of(bound) for period in periods for bound in (period.starts_at, period.ends_at)}
    cuts = sorted({hour.starts_at, *(bound for bound in bounds if hour.starts_at < bound < ends_at)})
    ends = [*cuts[1:], ends_at]
    if len(cuts) == 1:
        return [(hour.starts_at, ends_at, hour.total)]
    if hour.minutes:
        amounts = [
            sum(amount for minute, amount in hour.minutes.items() if start <= minute < end)
            for start, end in zip(cuts, ends, strict=True)
        ]
    else:
        # The minutes are forgotten: what has come since belongs to the last window.
        amounts = [planned.get(start, 0) for start in cuts]
    amounts[-1] += hour.total - sum(amounts)
    return list(zip(cuts, ends, amounts, strict=True))


def _period_at(moment: datetime, periods: Sequence[Period]) -> Period | None:
    """Return the period that a window belongs to; a subscription's before a prepaid one."""
    found = [p for p in periods if minute_of(p.starts_at) <= moment < minute_of(p.ends_at)]
    return min(found, key=lambda period: period.is_prepaid, default=None)


def _told_at(
    window_starts_at: datetime, period: Period, periods: Sequence[Period], now: datetime
) -> tuple[datetime | None, bool]:
    """Return the time that Stripe is told, and whether that is a later period's. None: there is no period for it."""
    if period.is_prepaid:
        return window_starts_at, False
    if not period.is_closed and now - window_starts_at < PAST_MAX:
        # A window is cut at the minute, a period begins at the second.
        return max(window_starts_at, period.starts_at), False
    present = [p for p in periods if not p.is_closed and not p.is_prepaid and hour_of(now) < p.ends_at]
    if not present:
        return None, True
    return max(hour_of(now), max(present, key=lambda p: p.starts_at).starts_at), True


def until_next_hour(now: datetime) -> datetime:
    """Return when the present hour's usage can be reported."""
    return hour_of(now.astimezone(UTC)) + HOUR + SETTLING
