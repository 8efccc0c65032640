from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from metering.billing.windows import HOUR, DueUsage, Hour, Period, due_windows, hour_of, minute_of

TEN = datetime(2027, 1, 15, 10, tzinfo=UTC)
MONTH = timedelta(days=31)
FAR = datetime(9999, 1, 1, tzinfo=UTC)


def _hour(total: int, starts_at: datetime = TEN, **minutes: int) -> Hour:
    return Hour(
        starts_at=starts_at,
        total=total,
        minutes={starts_at + timedelta(minutes=int(name[1:])): amount for name, amount in minutes.items()},
    )


def _period(starts_at: datetime, ends_at: datetime | None = None, **more: bool) -> Period:
    return Period(starts_at=starts_at, ends_at=ends_at or starts_at + MONTH, **more)


def _due(
    hours: list[Hour], periods: list[Period], now: datetime, planned: dict[datetime, int] | None = None
) -> list[DueUsage]:
    return due_windows(hours, planned or {}, periods, now, is_flush=False)[0]


class TestAWindow:
    def test_is_due_a_little_after_its_hour(self) -> None:
        periods = [_period(TEN - HOUR)]
        assert _due([_hour(5)], periods, TEN + HOUR + timedelta(seconds=89)) == []
        (due,) = _due([_hour(5)], periods, TEN + HOUR + timedelta(seconds=90))
        assert (due.window_starts_at, due.amount, due.event_at, due.is_carried) == (TEN, 5, TEN, False)

    def test_is_due_at_once_for_an_invoice(self) -> None:
        (due,), _ = due_windows([_hour(5)], {}, [_period(TEN - HOUR)], TEN + timedelta(minutes=1), is_flush=True)
        assert due.amount == 5

    def test_that_grew_or_shrank_is_due_by_the_difference(self) -> None:
        periods, now = [_period(TEN - HOUR)], TEN + 3 * HOUR
        assert [due.amount for due in _due([_hour(7)], periods, now, {TEN: 5})] == [2]
        assert [due.amount for due in _due([_hour(4)], periods, now, {TEN: 5})] == [-1]
        assert _due([_hour(5)], periods, now, {TEN: 5}) == []

    def test_outside_every_period_is_nobodys(self) -> None:
        assert _due([_hour(5)], [_period(TEN + HOUR)], TEN + 9 * HOUR) == []


class TestAnHourInWhichAPeriodBegins:
    periods = (_period(TEN + timedelta(minutes=20, seconds=13)),)

    def test_is_cut_at_the_minute(self) -> None:
        hour = _hour(100, m5=30, m19=10, m20=40, m59=20)
        before, after = _due([hour], list(self.periods), TEN + 3 * HOUR)
        assert (before.amount, before.event_at) == (40, None)
        # Stripe counts from the second on in which the period begins.
        assert (after.amount, after.event_at) == (60, TEN + timedelta(minutes=20, seconds=13))

    def test_counts_for_both_periods_where_one_ends_in_it(self) -> None:
        ended = _period(TEN - MONTH, TEN + timedelta(minutes=20, seconds=13))
        before, after = _due([_hour(100, m5=40, m30=60)], [ended, *self.periods], TEN + 3 * HOUR)
        assert (before.amount, before.event_at) == (40, TEN)
        assert (after.amount, after.event_at) == (60, TEN + timedelta(minutes=20, seconds=13))

    def test_keeps_its_cut_when_the_minutes_are_forgotten(self) -> None:
        planned = {TEN: 40, TEN + timedelta(minutes=20): 60}
        (late,) = _due([_hour(103)], list(self.periods), TEN + 300 * HOUR, planned)
        assert (late.window_starts_at, late.amount) == (TEN + timedelta(minutes=20), 3)


class TestUsageThatComesLate:
    now = TEN + 40 * 24 * HOUR

    def test_is_told_as_of_now_when_its_invoice_is_final(self) -> None:
        closed, present = _period(TEN - HOUR, TEN + MONTH, is_closed=True), _period(TEN + MONTH)
        (due,) = _due([_hour(5)], [closed, present], self.now)
        assert (due.event_at, due.is_carried, due.window_starts_at) == (hour_of(self.now), True, TEN)

    def test_is_told_as_of_now_when_stripe_takes_it_no_more(self) -> None:
        (due,) = _due([_hour(5)], [_period(TEN - HOUR, TEN + MONTH), _period(TEN + MONTH)], self.now)
        assert (due.event_at, due.is_carried) == (hour_of(self.now), True)

    def test_is_nobodys_to_collect_after_the_last_invoice(self) -> None:
        due, uncollected = due_windows(
            [_hour(5)], {}, [_period(TEN - HOUR, TEN + MONTH, is_closed=True)], self.now, is_flush=False
        )
        assert (due, [one.amount for one in uncollected]) == ([], [5])


class TestWhatFollowsTheLastPeriodThatIsKnown:
    """A subscription has renewed at Stripe, and we have not heard of it yet."""

    ends_at = TEN + timedelta(minutes=20, seconds=13)
    last = _period(TEN - MONTH, ends_at)
    unknown = _period(ends_at, FAR, is_pending=True)
    credit = _period(TEN - MONTH, FAR, is_prepaid=True)
    hour = _hour(100, m5=40, m30=60)

    def test_waits(self) -> None:
        (due,) = _due([self.hour], [self.last, self.unknown], TEN + 9 * HOUR)
        assert (due.window_starts_at, due.amount) == (TEN, 40)

    def test_takes_no_credit_meanwhile(self) -> None:
        (due,) = _due([self.hour], [self.last, self.unknown, self.credit], TEN + 9 * HOUR)
        assert (due.amount, due.is_prepaid) == (40, False)

    def test_is_billed_once_the_next_one_is_known(self) -> None:
        following = _period(self.ends_at)
        (due,) = _due([self.hour], [self.last, following], TEN + 9 * HOUR, {TEN: 40})
        assert (due.amount, due.event_at) == (60, self.ends_at)

    def test_is_not_written_off_where_nothing_is_known(self) -> None:
        assert [due.amount for due in _due([self.hour], [self.last], TEN + 9 * HOUR)] == [40]

    def test_keeps_late_usage_from_being_given_up(self) -> None:
        closed = _period(TEN - MONTH, self.ends_at, is_closed=True)
        found = due_windows([self.hour], {}, [closed, self.unknown, self.credit], TEN + 9 * HOUR, is_flush=False)
        assert [(one.amount, one.is_later) for one in found[1]] == [(40, True)]
        assert found[0] == []


class TestPrepaid:
    def test_usage_is_a_subscriptions_first(self) -> None:
        forever = _period(TEN - MONTH, FAR, is_prepaid=True)
        own = _period(TEN - HOUR)
        assert [due.is_prepaid for due in _due([_hour(5)], [forever, own], TEN + 3 * HOUR)] == [False]
        assert [due.is_prepaid for due in _due([_hour(5)], [forever], TEN + 3 * HOUR)] == [True]


@given(
    calls=st.lists(st.tuples(st.integers(0, 6 * 60 - 1), st.integers(-50, 1_000)), max_size=30),
    bounds=st.lists(st.integers(1, 6 * 3600 - 1), min_size=1, max_size=4, unique=True),
    split=st.integers(0, 30),
)
def test_every_call_in_a_period_is_due_once_however_late_it_comes(
    calls: list[tuple[int, int]], bounds: list[int], split: int
) -> None:
    """Guarantee: what is planned in two rounds is, window by window, what the ledger has in billed time."""
    starts = sorted(TEN + timedelta(seconds=second) for second in bounds)
    periods = [_period(start, end) for start, end in zip(starts, [*starts[1:], TEN + MONTH], strict=True)]
    now, planned = TEN + 8 * HOUR, {}
    for known in (calls[:split], calls):
        for due in _due(_hours(known), periods, now, planned):
            planned[due.window_starts_at] = planned.get(due.window_starts_at, 0) + due.amount
    billed_from = minute_of(starts[0])
    expected = sum(amount for minute, amount in calls if TEN + timedelta(minutes=minute) >= billed_from)
    told = sum(amount for starts_at, amount in planned.items() if starts_at >= billed_from)
    assert told == expected


def _hours(calls: list[tuple[int, int]]) -> list[Hour]:
    minutes: dict[datetime, int] = {}
    for minute, amount in calls:
        at = TEN + timedelta(minutes=minute)
        minutes[at] = minutes.get(at, 0) + amount
    hours = {hour_of(at) for at in minutes}
    return [
        Hour(
            starts_at=hour,
            total=sum(amount for at, amount in minutes.items() if hour_of(at) == hour),
            minutes={at: amount for at, amount in minutes.items() if hour_of(at) == hour},
        )
        for hour in hours
    ]
