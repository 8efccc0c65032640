"""`[plans]` and `[billing]` of aap.toml: what they say, and every problem in them."""

from __future__ import annotations

import tomllib

import pytest

from core.configuration import ConfigurationInvalid
from keys.plans import PLAN_LIMIT_MAX, PlanLimits
from metering.billing.plans import EXAMPLE, Plan, Plans, build_plans


def read(text: str) -> Plans:
    return build_plans(tomllib.loads(text))


def problems_in(text: str) -> list[str]:
    with pytest.raises(ConfigurationInvalid) as caught:
        read(text)
    return caught.value.problems


class TestUnderstood:
    def test_without_tables_there_is_no_plan_and_no_default(self) -> None:
        plans = build_plans({})
        assert (plans, plans.default, list(plans)) == (Plans(), None, [])
        assert plans.limits_of("pro") is None

    def test_the_example_has_three_plans(self) -> None:
        plans = read(EXAMPLE)
        assert list(plans.by_name) == ["free", "pro", "enterprise"]
        assert plans.default is plans.by_name["free"]
        assert plans.limits_of("free") == PlanLimits(
            chat_requests_per_month=1_000, workflow_executions_per_month=100, storage_gigabytes=1
        )
        assert plans.find("pro") == Plan(
            name="pro",
            title="Pro",
            price_cents_per_month=9_900,
            trial_days=0,
            limits=PlanLimits(
                chat_requests_per_month=100_000, workflow_executions_per_month=10_000, storage_gigabytes=100
            ),
        )
        assert plans.limits_of("enterprise") == PlanLimits()

    @pytest.mark.parametrize(
        ("price", "cents"), [("0", 0), ("99", 9_900), ('"99"', 9_900), ('"9.5"', 950), ('"0.05"', 5)]
    )
    def test_prices_are_whole_cents(self, price: str, cents: int) -> None:
        found = read(f"[plans.p]\nprice_usd_per_month = {price}").find("p")
        assert found is not None
        assert found.price_cents_per_month == cents

    def test_what_is_left_out_has_a_default(self) -> None:
        plans = read("[plans.p]")
        assert plans.by_name["p"] == Plan(
            name="p", title="p", price_cents_per_month=0, trial_days=0, limits=PlanLimits()
        )
        assert plans.billing.grace_days == 7

    def test_a_limit_of_nothing_at_all_is_one(self) -> None:
        assert read("[plans.p.limits]\nagents = 0").limits_of("p") == PlanLimits(agents=0)


class TestProblems:
    def test_all_are_told_at_once_with_the_nearest_name(self) -> None:
        text = """
        [billing]
        default_plan = "fre"
        grace_day = 3
        [plans.free]
        titles = "Free"
        price_usd_per_month = 9.5
        trial_days = -1
        [plans.free.limits]
        chat_requests_per_mont = 1
        tokens_per_month = "many"
        agents = true
        [plans.none]
        price_usd_per_month = "9.999"
        """
        told = problems_in(text)
        for expected in (
            "billing.default_plan: fre: unknown, did you mean free?",
            "billing.grace_day: unknown, did you mean grace_days?",
            "plans.free.titles: unknown, did you mean title?",
            "plans.free.price_usd_per_month: expected US dollars",
            "plans.free.trial_days: expected a whole number from 0",
            "plans.free.limits.chat_requests_per_mont: unknown, did you mean chat_requests_per_month?",
            "plans.free.limits.tokens_per_month: expected a whole number",
            "plans.free.limits.agents: expected a whole number",
            "plans.none: a plan's name is",
            "plans.none.price_usd_per_month: expected US dollars",
        ):
            assert any(line.startswith(expected) for line in told), expected
        assert len(told) == 10

    @pytest.mark.parametrize(
        "text",
        [
            "plans = 3",
            "billing = 3",
            "plans.p = 3",
            "[plans.P]",
            '[plans.p]\ntitle = " "',
            "[plans.p]\nlimits = 3",
            "[plans.p]\nprice_usd_per_month = true",
            "[plans.p]\nprice_usd_per_month = -1",
            '[plans.p]\nprice_usd_per_month = "1e3"',
            '[plans.p]\nprice_usd_per_month = "1000000"',
            "[billing]\ndefault_plan = 3",
            "[billing]\ngrace_days = 91",
            f"[plans.p.limits]\nagents = {PLAN_LIMIT_MAX + 1}",
        ],
    )
    def test_one_problem_is_one_line(self, text: str) -> None:
        assert len(problems_in(text)) == 1
