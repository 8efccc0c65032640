"""How an endpoint is doing: rules alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from webhooks.attempts import Outcome
from webhooks.health import DISABLED_AFTER, FAILURES_BEFORE_REST, WELL, Health, after_failure
from webhooks.lanes import IN_FLIGHT_MAX, Lane
from webhooks.outcomes import Due
from webhooks.targets import Target

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def failed(times: int, status: int | None = 500, health: Health = WELL, now: datetime = NOW) -> Health:
    """What *health* is after so many failures at one moment."""
    for _ in range(times):
        health = after_failure(health, status, None, now)
    return health


def rest_seconds(health: Health, now: datetime = NOW) -> float | None:
    return None if health.resting_until is None else (health.resting_until - now).total_seconds()


def failing_for(age: timedelta, **more: object) -> Health:
    return msgspec.structs.replace(WELL, failing_since=NOW - age, consecutive_failures=1, **more)


class TestRests:
    @pytest.mark.parametrize("status", [None, 301, 400, 404, 500, 503])
    def test_four_failures_are_no_reason_to_rest(self, status: int | None) -> None:
        health = failed(4, status)
        assert (health.resting_until, health.is_probing, health.consecutive_failures) == (None, False, 4)

    def test_from_the_fifth_on_rests_double_up_to_a_quarter_of_an_hour(self) -> None:
        rests = [rest_seconds(failed(times)) for times in range(5, 13)]
        assert rests == [30, 60, 120, 240, 480, 900, 900, 900]
        assert failed(FAILURES_BEFORE_REST).is_probing

    def test_after_thousands_of_failures_a_rest_is_as_long(self) -> None:
        assert rest_seconds(failed(5_000)) == 900

    @pytest.mark.parametrize(("status", "seconds"), [(429, 60), (502, 5), (504, 5)])
    def test_who_is_overloaded_is_left_alone_at_once(self, status: int, seconds: int) -> None:
        assert rest_seconds(failed(1, status)) == seconds

    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    def test_for_as_long_as_it_asks(self, status: int) -> None:
        assert rest_seconds(after_failure(WELL, status, 3_600, NOW)) == 3_600

    @pytest.mark.parametrize("status", [None, 301, 400, 500])
    def test_what_others_ask_is_not_asked_of_the_endpoint(self, status: int | None) -> None:
        """It makes that delivery late (`schedule.pause_after`), and no other."""
        assert after_failure(WELL, status, 3_600, NOW).resting_until is None

    def test_the_longest_of_several_reasons_counts(self) -> None:
        assert rest_seconds(failed(1, 429, failed(7))) == 240
        assert rest_seconds(failed(1, 429, failed(4))) == 60
        assert rest_seconds(after_failure(failed(7), 503, 100, NOW)) == 240
        assert rest_seconds(after_failure(failed(7), 503, 1_000, NOW)) == 1_000

    @given(st.lists(st.sampled_from([None, 404, 429, 500, 502, 503, 504]), min_size=1, max_size=40))
    def test_nobody_rests_for_more_than_a_quarter_of_an_hour_unasked(self, statuses: list[int | None]) -> None:
        health = WELL
        for status in statuses:
            health = after_failure(health, status, None, NOW)
        assert (rest_seconds(health) or 0) <= 900
        assert (health.consecutive_failures, health.failing_since) == (len(statuses), NOW)


class TestWarnings:
    @pytest.mark.parametrize(("days", "percent"), [(2.5, 50), (3.5, 70), (4.5, 90)])
    def test_one_at_each_threshold_and_not_a_second_before(self, days: float, percent: int) -> None:
        age = timedelta(days=days)
        earlier = {50: 0, 70: 50, 90: 70}[percent]
        assert failed(1, health=failing_for(age - SECOND)).warned_percent == earlier
        health = failed(1, health=failing_for(age))
        assert (health.warned_percent, health.disabled_for) == (percent, None)

    def test_what_was_said_stays_said(self) -> None:
        assert failed(1, health=failing_for(timedelta(days=1), warned_percent=70)).warned_percent == 70

    def test_failing_is_counted_from_the_first_failure(self) -> None:
        first = failed(1)
        later = failed(1, health=first, now=NOW + timedelta(days=3))
        assert (first.failing_since, later.failing_since, later.warned_percent) == (NOW, NOW, 50)


class TestTheEnd:
    def test_five_days_of_failures(self) -> None:
        assert timedelta(days=5) == DISABLED_AFTER
        assert failed(1, health=failing_for(DISABLED_AFTER - SECOND)).disabled_for is None
        assert failed(1, health=failing_for(DISABLED_AFTER)).disabled_for == "failing"

    def test_gone_is_gone_at_once(self) -> None:
        assert failed(1, 410).disabled_for == "gone"
        assert failed(1, 410, failing_for(DISABLED_AFTER)).disabled_for == "gone"

    @pytest.mark.parametrize("status", [None, 301, 401, 404, 429, 500, 503])
    def test_nothing_else_ends_an_endpoint_at_once(self, status: int | None) -> None:
        assert failed(100, status).disabled_for is None


TARGET = Target("whe_1", "org_1", "https://a.example/", (), (), None, NOW, NOW)


def lane_with(health: Health, under_way: int = 1) -> Lane:
    lane = Lane(TARGET, health)
    for number in range(under_way):
        lane.buffer.append(Due(f"dlv_{number}", "org_1", "whe_1", f"evt_{number}", "ping", 0, NOW, "{}", NOW))
        lane.begin(0.0)
    return lane


def outcome(status: int | None, problem: str | None, retry_after_seconds: float | None = None) -> Outcome:
    return Outcome(status, problem, 1, None, retry_after_seconds, NOW)


OK = outcome(200, None)
BROKEN = outcome(500, "answered 500")


class TestALane:
    def test_one_success_makes_everything_good_again(self) -> None:
        lane = lane_with(failed(9, health=failing_for(timedelta(days=4))))
        assert (lane.health.warned_percent, lane.window) == (70, 1)
        lane.finish(OK, NOW + timedelta(hours=1))
        assert lane.health == WELL
        assert lane.last_success_at == NOW + timedelta(hours=1)
        assert lane.is_unsaved

    def test_a_failure_is_noted_with_its_problem(self) -> None:
        lane = lane_with(WELL)
        lane.finish(BROKEN, NOW)
        assert (lane.health.failing_since, lane.health.consecutive_failures) == (NOW, 1)
        assert (lane.last_problem, lane.last_success_at, lane.is_unsaved) == ("answered 500", None, True)

    def test_what_was_under_way_when_a_rest_began_is_no_news(self) -> None:
        lane = lane_with(failed(4), under_way=3)
        lane.finish(BROKEN, NOW)
        lane.finish(BROKEN, NOW)
        lane.finish(outcome(429, "answered 429", 600), NOW)
        assert (lane.health.consecutive_failures, rest_seconds(lane.health)) == (5, 30)

    def test_but_that_it_is_gone_is(self) -> None:
        lane = lane_with(failed(5))
        lane.finish(outcome(410, "answered 410"), NOW)
        assert lane.health.disabled_for == "gone"
        assert lane.is_resting(NOW + timedelta(days=100))

    def test_a_success_that_was_under_way_ends_no_rest(self) -> None:
        lane = lane_with(failed(5))
        assert lane.is_resting(NOW)
        lane.finish(OK, NOW)
        assert lane.is_resting(NOW)
        assert (lane.health.failing_since, lane.health.consecutive_failures) == (None, 0)

    def test_a_success_that_was_under_way_brings_back_nobody_who_is_gone(self) -> None:
        lane = lane_with(WELL)
        lane.finish(Outcome(410, "answered 410", 1, None, None, NOW), NOW)
        lane.finish(OK, NOW)
        assert lane.health.disabled_for == "gone"

    def test_a_fault_of_ours_says_nothing(self) -> None:
        lane = lane_with(WELL)
        for _ in range(9):
            lane.finish(Outcome(None, "an error of ours", 1, None, None, NOW, is_ours=True), NOW)
        assert lane.health == WELL

    def test_a_rest_ends_by_itself_and_one_delivery_tries(self) -> None:
        lane = lane_with(failed(5), under_way=0)
        assert lane.is_resting(NOW + timedelta(seconds=29))
        assert not lane.is_resting(NOW + timedelta(seconds=30))
        assert (lane.window, lane.room) == (1, 1)

    def test_what_may_be_under_way_grows_with_each_success_and_halves_with_each_failure(self) -> None:
        lane = lane_with(WELL, under_way=14)
        windows = [lane.window]
        for came in [OK] * 8 + [BROKEN, BROKEN, OK]:
            lane.finish(came, NOW)
            windows.append(lane.window)
        assert windows == [2, 3, 4, 5, 6, 7, IN_FLIGHT_MAX, IN_FLIGHT_MAX, IN_FLIGHT_MAX, 4, 2, 3]
