"""Recurring revenue as arithmetic: whatever the changes and the order they were booked in."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.billing.mrr import (
    Change,
    Movements,
    Revenue,
    RevenueUnbalanced,
    had_revenue,
    lost_since,
    movements_between,
    newly_paying,
    require_balance,
    revenue_of,
    total_cents,
)

START = datetime(2027, 1, 1, tzinfo=UTC)
DAYS = 6
# Few organizations, subscriptions, amounts and times: so that they meet.
HISTORIES = st.lists(
    st.builds(
        lambda org, sub, minute, cents, status: (f"org_{org}", f"sub_{org}_{sub}", minute, cents, status),
        st.integers(0, 2),
        st.integers(0, 1),
        st.integers(0, DAYS * 4 - 1).map(lambda quarter: quarter * 360),
        st.sampled_from([0, 0, 100, 250, 9_900]),
        st.sampled_from(["active", "trialing", "canceled"]),
    ),
    max_size=25,
).map(
    # The order of the list is the order of booking, and so of the ids.
    lambda events: [
        Change(org, sub, START + timedelta(minutes=minute), f"sch_{number:04d}", "pro", status, cents)
        for number, (org, sub, minute, cents, status) in enumerate(events)
    ]
)


def revenue_before(changes: list[Change], moment: datetime) -> dict[str, Revenue]:
    """As the database finds it: of each subscription the last change before *moment*."""
    last: dict[str, Change] = {}
    for change in sorted(changes, key=lambda one: (one.occurred_at, one.id)):
        if change.occurred_at < moment:
            last[change.subscription_id] = change
    return revenue_of(last.values())


def days_of(changes: list[Change]) -> list[tuple[dict[str, Revenue], dict[str, Revenue], Movements, datetime]]:
    found = []
    for number in range(DAYS):
        begin = START + timedelta(days=number)
        before, after = revenue_before(changes, begin), revenue_before(changes, begin + timedelta(days=1))
        returning = {
            key
            for key in newly_paying(before, after)
            if had_revenue(one for one in changes if one.organization_id == key and one.occurred_at < begin)
        }
        found.append((before, after, movements_between(before, after, returning), begin))
    return found


class TestInvariant:
    @given(changes=HISTORIES)
    def test_each_day_follows_from_the_one_before(self, changes: list[Change]) -> None:
        """Guarantee: MRR(t) = MRR(t-1) + new + reactivation + expansion - contraction - churn."""
        mrr = 0
        for before, after, moved, _ in days_of(changes):
            assert total_cents(before) == mrr
            gained = moved.new_cents + moved.reactivation_cents + moved.expansion_cents
            mrr += gained - moved.contraction_cents - moved.churn_cents
            assert total_cents(after) == mrr
            assert min(getattr(moved, name) for name in Movements.__struct_fields__) >= 0

    @given(changes=HISTORIES)
    def test_who_pays_follows_too_and_everybody_is_new_once(self, changes: list[Change]) -> None:
        """Guarantee: paying(t) = paying(t-1) + new + reactivated - churned, and nobody is new twice."""
        paying = new = 0
        for _, after, moved, _ in days_of(changes):
            paying += moved.new_organizations + moved.reactivated_organizations - moved.churned_organizations
            new += moved.new_organizations
            assert sum(one.mrr_cents > 0 for one in after.values()) == paying
        ever = {key for _, after, _, _ in days_of(changes) for key, one in after.items() if one.mrr_cents}
        assert new == len(ever)

    @given(changes=HISTORIES, shuffled=st.randoms(use_true_random=False))
    def test_the_order_of_reading_does_not_matter(self, changes: list[Change], shuffled) -> None:
        mixed = list(changes)
        shuffled.shuffle(mixed)
        assert days_of(mixed) == days_of(changes)

    @given(changes=HISTORIES)
    def test_what_is_lost_in_a_time_is_no_more_than_there_was(self, changes: list[Change]) -> None:
        first, last = (
            revenue_before(changes, START + timedelta(days=2)),
            revenue_before(changes, START + timedelta(days=9)),
        )
        organizations, cents = lost_since(first, last)
        assert 0 <= organizations <= sum(one.mrr_cents > 0 for one in first.values())
        assert max(0, total_cents(first) - total_cents(last)) <= cents <= total_cents(first)

    def test_what_does_not_add_up_is_refused(self) -> None:
        require_balance(100, 130, Movements(new_cents=50, churn_cents=20))
        with pytest.raises(RevenueUnbalanced):
            require_balance(100, 131, Movements(new_cents=50, churn_cents=20))


class TestMovements:
    """An organization's subscriptions, by day: what each change is called."""

    def kinds(self, *changes: tuple[float, str, int]) -> list[dict[str, int]]:
        rows = [
            Change("org_1", sub, START + timedelta(days=day), f"sch_{number}", "pro", "active", cents)
            for number, (day, sub, cents) in enumerate(changes)
        ]
        return [
            {name: value for name in Movements.__struct_fields__ if (value := getattr(moved, name))}
            for _, _, moved, _ in days_of(rows)
        ]

    def test_a_life(self) -> None:
        found = self.kinds((0, "a", 100), (1, "a", 300), (2, "a", 200), (3, "a", 0), (4, "a", 50))
        assert found[:5] == [
            {"new_cents": 100, "new_organizations": 1},
            {"expansion_cents": 200, "expanded_organizations": 1},
            {"contraction_cents": 100, "contracted_organizations": 1},
            {"churn_cents": 200, "churned_organizations": 1},
            {"reactivation_cents": 50, "reactivated_organizations": 1},
        ]

    def test_another_subscription_is_expansion(self) -> None:
        assert self.kinds((0, "a", 100), (1, "b", 30))[1] == {"expansion_cents": 30, "expanded_organizations": 1}

    def test_one_that_takes_the_place_of_another_is_nothing(self) -> None:
        assert self.kinds((0, "a", 100), (1.2, "a", 0), (1.4, "b", 100))[1] == {}

    def test_what_cancels_out_within_a_day_is_nothing(self) -> None:
        """And whoever paid for some hours only is new when they pay at a day's end."""
        found = self.kinds((0.1, "a", 100), (0.9, "a", 0), (2, "a", 100))
        assert found[:3] == [{}, {}, {"new_cents": 100, "new_organizations": 1}]

    def test_the_first_instant_of_a_day_is_that_days(self) -> None:
        assert [bool(one) for one in self.kinds((1, "a", 100))] == [False, True, False, False, False, False]

    def test_of_two_changes_at_once_the_later_booked_holds(self) -> None:
        assert self.kinds((0, "a", 100), (0, "a", 70))[0]["new_cents"] == 70


def test_the_plan_is_that_of_the_largest_subscription() -> None:
    make: Callable[[str, str, int], Change] = lambda sub, plan, cents: Change(  # noqa: E731
        "org_1", sub, START, sub, plan, "trialing" if not cents else "active", cents
    )
    found = revenue_of([make("a", "free", 0), make("b", "pro", 100), make("c", "basic", 20)])
    assert found == {"org_1": Revenue(120, "pro", is_trialing=True)}
    assert date(2027, 1, 1) == START.date()
