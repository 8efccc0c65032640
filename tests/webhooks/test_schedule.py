"""When a delivery that failed is tried again."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhooks.attempts import Outcome
from webhooks.outcomes import Due, Recorded, conclude
from webhooks.schedule import (
    ATTEMPTS_MAX,
    PAUSES_SECONDS,
    RETRY_AFTER_SECONDS_MAX,
    pause_after,
    retry_after_seconds,
)

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
_HOUR = 3_600


def test_the_schedule_is_that_of_standard_webhooks() -> None:
    minutes, hours = [5 * 60, 30 * 60], [one * _HOUR for one in (2, 5, 10, 14, 20, 24)]
    assert list(PAUSES_SECONDS) == [5, *minutes, *hours]
    assert ATTEMPTS_MAX == 10
    assert 75 <= sum(PAUSES_SECONDS) / _HOUR < 76


@pytest.mark.parametrize("attempts", range(1, ATTEMPTS_MAX))
def test_each_pause_is_within_a_fifth_of_its_step_and_not_always_the_same(attempts: int) -> None:
    pause = PAUSES_SECONDS[attempts - 1]
    found = [pause_after(attempts) for _ in range(500)]
    assert all(one is not None and 0.8 * pause <= one <= 1.2 * pause for one in found)
    spread = max(one or 0 for one in found) - min(one or 0 for one in found)
    # Of 500 in an interval, that its outer quarters are all empty happens once in 10^60.
    assert spread > 0.2 * pause


@pytest.mark.parametrize("attempts", [ATTEMPTS_MAX, ATTEMPTS_MAX + 1, 1_000])
def test_after_the_last_attempt_there_is_none(attempts: int) -> None:
    assert pause_after(attempts) is None
    assert pause_after(attempts, retry_after_seconds=60) is None


def test_what_the_receiver_asks_for_makes_it_longer() -> None:
    assert pause_after(1, retry_after_seconds=1_000) == 1_000


@given(st.integers(1, ATTEMPTS_MAX - 1), st.floats(0, RETRY_AFTER_SECONDS_MAX))
def test_and_never_shorter(attempts: int, asked: float) -> None:
    pause = pause_after(attempts, retry_after_seconds=asked)
    assert pause is not None
    assert max(asked, 0.8 * PAUSES_SECONDS[attempts - 1]) <= pause <= max(asked, 1.2 * PAUSES_SECONDS[attempts - 1])


class TestRetryAfter:
    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            (b"1", 1),
            (b"120", 120),
            (b"  120 ", 120),
            (b"0120", 120),
            (b"86400", 86_400),
            (b"86401", RETRY_AFTER_SECONDS_MAX),
            (b"999999999999999999999999", RETRY_AFTER_SECONDS_MAX),
            (b"9" * 4_000, RETRY_AFTER_SECONDS_MAX),
        ],
    )
    def test_seconds(self, value: bytes, seconds: float) -> None:
        assert retry_after_seconds(value, NOW) == seconds

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            (b"Thu, 01 Jan 2026 12:01:30 GMT", 90),
            (b"Thu, 01 Jan 2026 12:01:30 -0000", 90),
            (b"Thu, 01 Jan 2026 13:01:30 +0100", 90),
            (b"Thursday, 01-Jan-26 12:01:30 GMT", 90),
            (b"Fri, 31 Dec 9999 23:59:59 GMT", RETRY_AFTER_SECONDS_MAX),
        ],
    )
    def test_a_date(self, value: bytes, seconds: float) -> None:
        assert retry_after_seconds(value, NOW) == seconds

    @pytest.mark.parametrize(
        "value",
        [
            None,
            b"",
            b" ",
            b"0",
            b"-5",
            b"1.5",
            b"1e3",
            b"soon",
            b"\xff\xfe",
            "²".encode("latin-1"),
            "٣".encode(),
            b"Thu, 01 Jan 2026 12:00:00 GMT",
            b"Thu, 01 Jan 2026 11:59:59 GMT",
            b"Thu, 01 Jan 1970 00:00:00 GMT",
            b"Thu, 99 Jan 2026 12:00:00 GMT",
        ],
    )
    def test_what_is_past_or_not_understood_asks_for_nothing(self, value: bytes | None) -> None:
        assert retry_after_seconds(value, NOW) is None

    @given(st.datetimes(datetime(1_000, 1, 1), datetime(9_000, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
    def test_any_date_is_within_a_day_or_nothing(self, moment: datetime) -> None:
        found = retry_after_seconds(format_datetime(moment, usegmt=True).encode(), NOW)
        whole = (moment.replace(microsecond=0) - NOW).total_seconds()
        assert found == (min(whole, RETRY_AFTER_SECONDS_MAX) if whole > 0 else None)


def concluded(step: int, problem: str | None, status: int | None = 500, wait: float | None = None) -> Recorded:
    due = Due("dlv_1", "org_1", "whe_1", "evt_1", "ping", step, NOW, "{}", NOW)
    return conclude(due, Outcome(status, problem, 1, None, wait, NOW))


class TestConclusions:
    def test_taken(self) -> None:
        done = concluded(0, None, 204)
        assert (done.state, done.step, done.pause_seconds) == ("succeeded", 1, 0.0)

    def test_another_time(self) -> None:
        again = concluded(0, "answered 500")
        assert (again.state, again.step) == ("pending", 1)
        assert 4 <= again.pause_seconds <= 6
        assert concluded(0, "answered 503", 503, 500.0).pause_seconds == 500

    def test_given_up_after_the_tenth(self) -> None:
        assert (concluded(8, "answered 500").state, concluded(9, "answered 500").state) == ("pending", "failed")

    def test_given_up_at_once_where_the_endpoint_is_gone(self) -> None:
        assert concluded(0, "answered 410", 410).state == "failed"
