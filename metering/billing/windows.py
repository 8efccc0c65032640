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
    is_included: bool = False
    """A subscription's whose price includes usage: it is told nobody, and takes no credit."""
    is_trial: bool = False
    """Usage is counted, and costs nothing: it takes no credit, and nothing is put off into it."""
    is_pending: bool = False
    """What follows a subscription's last period that we know of: whose usage in it is, is not known yet."""


class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger has of an hour, whole and by minute. Minutes are kept for some days only."""

    starts_at: datetime
    total: int
    minutes: Mapping[datetime, int] = {}


class DueUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Usage of a window that is not planned yet. No *event_at*: nobody is to be told."""

    window_starts_at: datetime
    amount: int
    event_at: datetime | None
    is_carried: bool = False
    is_prepaid: bool = False
    is_free: bool = False


class Uncollected(msgspec.Struct, frozen=True, kw_only=True):
    """Usage of a billed window that no period takes any more.

    *may_be_drawn*: the organization had bought prepaid credit by then. *is_later*: a period may come that takes it.
    """

    window_starts_at: datetime
    amount: int
    may_be_drawn: bool = False
    is_later: bool = False


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
) -> tuple[list[DueUsage], list[Uncollected]]:
    """Return what is to be reported now, oldest first, and what cannot be any more.

    *planned* is what was planned of each window. With *is_flush* windows that are not over count too.
    """
    due: list[DueUsage] = []
    uncollected: list[Uncollected] = []
    for hour in sorted(hours, key=lambda hour: hour.starts_at):
        for starts_at, ends_at, amount in _windows(hour, planned, periods):
            owed = amount - planned.get(starts_at, 0)
            period = _period_at(starts_at, periods)
            if not owed or (period is not None and period.is_pending):
                continue
            if period is None or period.is_included:
                is_part = ends_at - starts_at < HOUR and _is_decided(starts_at, period, periods)
                if starts_at in planned or is_part:
                    due.append(DueUsage(window_starts_at=starts_at, amount=owed, event_at=None))
            elif is_flush or now >= ends_at + SETTLING:
                found = _billed(starts_at, owed, period, periods, now)
                if isinstance(found, DueUsage):
                    due.append(found)
                else:
                    uncollected.append(found)
    return due, uncollected


def _billed(
    starts_at: datetime, owed: int, period: Period, periods: Sequence[Period], now: datetime
) -> DueUsage | Uncollected:
    """Return what becomes of a window's usage in a period that is billed or drawn."""
    event_time = _event_time(starts_at, period, periods, now)
    if period.is_trial and event_time.is_carried:
        # What a trial gave stays given, however late it is known.
        return DueUsage(window_starts_at=starts_at, amount=owed, event_at=None)
    if event_time.at is None:
        may_be_drawn = any(p.is_prepaid and minute_of(p.starts_at) <= starts_at for p in periods)
        return Uncollected(
            window_starts_at=starts_at, amount=owed, may_be_drawn=may_be_drawn, is_later=event_time.is_later
        )
    return DueUsage(
        window_starts_at=starts_at,
        amount=owed,
        event_at=event_time.at,
        is_carried=event_time.is_carried,
        is_prepaid=period.is_prepaid,
        is_free=period.is_trial,
    )


def _is_decided(starts_at: datetime, period: Period | None, periods: Sequence[Period]) -> bool:
    """Tell whether a part of an hour is nobody's to pay for good; whole hours outside of all periods have no window.

    What is behind the last period may be in one that we do not know of.
    """
    return period is not None or any(later.starts_at > starts_at for later in periods)


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
    if sum(hour.minutes.values()) == hour.total:
        amounts = [
            sum(amount for minute, amount in hour.minutes.items() if start <= minute < end)
            for start, end in zip(cuts, ends, strict=True)
        ]
    else:
        # Minutes are forgotten, all or some: what has come since belongs to the last window.
        amounts = [planned.get(start, 0) for start in cuts]
    amounts[-1] += hour.total - sum(amounts)
    return list(zip(cuts, ends, amounts, strict=True))


def _period_at(moment: datetime, periods: Sequence[Period]) -> Period | None:
    """Return the period that a window belongs to: one that is paid for before one that is not, credit last."""
    found = [p for p in periods if minute_of(p.starts_at) <= moment < minute_of(p.ends_at)]
    return min(found, key=lambda p: (p.is_prepaid, p.is_included, p.is_pending, p.is_trial, p.is_closed), default=None)


class _EventTime(msgspec.Struct, frozen=True):
    """The time that Stripe is told. None: there is none, or (*is_later*) not yet."""

    at: datetime | None
    is_carried: bool = False
    is_later: bool = False


def _event_time(window_starts_at: datetime, period: Period, periods: Sequence[Period], now: datetime) -> _EventTime:
    if period.is_prepaid:
        return _EventTime(window_starts_at)
    if not period.is_closed and now - window_starts_at < PAST_MAX:
        # A window is cut at the minute, a period begins at the second.
        return _EventTime(max(window_starts_at, period.starts_at))
    invoiced = [p for p in periods if not (p.is_closed or p.is_prepaid or p.is_included)]
    present = [p for p in invoiced if hour_of(now) < p.ends_at and (p.starts_at <= now or not p.is_pending)]
    paying = [p for p in present if not (p.is_trial or p.is_pending)]
    if not paying:
        # After a trial, and after what we know of, there may be one that is paid for.
        return _EventTime(None, is_carried=True, is_later=bool(present))
    return _EventTime(max(hour_of(now), max(paying, key=lambda p: p.starts_at).starts_at), is_carried=True)


def until_next_hour(now: datetime) -> datetime:
    """Return when the present hour's usage can be reported."""
    return hour_of(now.astimezone(UTC)) + HOUR + SETTLING
