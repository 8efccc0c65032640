"""`[plans]` and `[billing]` of aap.toml: what they say, and every problem in them."""

from __future__ import annotations

import tomllib

import pytest

from core.configuration import ConfigurationInvalid
from gateway.cli.prices import EACH_OPTIONS, TOKEN_OPTIONS
from keys.plans import PLAN_LIMIT_MAX, PlanLimits
from metering.billing.plan_terms import PRICE_FIELDS
from metering.billing.plans import EXAMPLE, Plan, Plans, build_plans
from metering.rating import PriceTerms, Rates, Step
from metering.usage import UNIT_NAMES


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
            bills_usage=True,
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
            name="p", title="p", price_cents_per_month=0, trial_days=0, bills_usage=False, limits=PlanLimits()
        )
        assert plans.billing.grace_days == 7

    def test_unit_prices_are_terms_of_the_same_dimensions_as_the_command_lines(self) -> None:
        """Guarantee: whatever `aap prices set` can price, a plan can, and nothing else."""
        assert set(PRICE_FIELDS.values()) == {*TOKEN_OPTIONS.values(), *EACH_OPTIONS.values()} == set(UNIT_NAMES)
        found = read(
            '[plans.p.prices."gpt-4o"]\ninput_usd_per_million = "2.50"\noutput_usd_per_million = 10\n'
            'cached_input_usd_per_million = 0\naudio_second_usd = "0.0001"\nimage_usd = "0.04"'
        ).by_name["p"]
        rates = Rates(
            input_tokens=2_500_000_000,
            cached_input_tokens=0,
            output_tokens=10**10,
            audio_seconds=10**11,
            images=4 * 10**13,
        )
        assert found.prices == {"gpt-4o": PriceTerms(tiers={"default": (Step(rates=rates),)})}

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
            "[plans.p]\nprices = 3",
            "[plans.p.prices]\nm = 3",
            "[plans.p.prices.m]",
            "[plans.p.prices.m]\ninput_usd_per_million = -1",
            "[plans.p.prices.m]\ninput_usd_per_million = 2.5",
            '[plans.p.prices.m]\ninput_usd_per_million = "0.0000000001"',
            "[plans.p.prices.m]\ninput_usd_per_milion = 1",
            "[plans.p.prices.m]\naudio_second_usd = true",
            "[billing]\ndefault_plan = 3",
            "[billing]\ngrace_days = 91",
            f"[plans.p.limits]\nagents = {PLAN_LIMIT_MAX + 1}",
        ],
    )
    def test_one_problem_is_one_line(self, text: str) -> None:
        assert len(problems_in(text)) == 1
