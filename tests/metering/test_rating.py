"""What units cost: exact to the nano-USD, the same whenever it is asked, and never more than was reserved."""

from __future__ import annotations

from fractions import Fraction

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering import price_list
from metering.rating import (
    Ask,
    PriceTerms,
    Rates,
    Step,
    effective_rates,
    fitting,
    known_tier,
    rate,
    rate_of,
    worst_case,
)
from metering.usage import NO_UNITS, UNIT_NAMES, Units

TIERS = ("default", "priority", "flex", "batch")


def terms(*steps: Step, **tiers: tuple[Step, ...]) -> PriceTerms:
    return PriceTerms(tiers={"default": steps, **tiers})


def step(above: int = 0, **rates: int) -> Step:
    return Step(above_input_tokens=above, rates=Rates(**rates))


# gpt-4o: 2.50, 1.25 and 10 USD per million.
GPT_4O = terms(
    step(input_tokens=2_500_000_000, cached_input_tokens=1_250_000_000, output_tokens=10_000_000_000),
    priority=(step(input_tokens=4_250_000_000, cached_input_tokens=2_125_000_000, output_tokens=17_000_000_000),),
)
STEPPED = terms(
    step(input_tokens=3_000_000, cached_input_tokens=300_000, output_tokens=15_000_000),
    step(above=200, input_tokens=6_000_000, output_tokens=22_000_000),
    step(above=500, cached_input_tokens=900_000),
)


class TestRate:
    def test_it_multiplies_sums_and_rounds_up_once(self) -> None:
        assert (
            rate(Units(input_tokens=1_000, cached_input_tokens=400, output_tokens=50), GPT_4O, "default") == 3_500_000
        )
        thirds = terms(step(input_tokens=333_333, cached_input_tokens=333_333, output_tokens=333_334))
        assert rate(Units(input_tokens=1, cached_input_tokens=1, output_tokens=1), thirds, None) == 1
        assert rate(Units(input_tokens=1), terms(step(input_tokens=1)), None) == 1
        assert rate(Units(input_tokens=1_000_001), terms(step(input_tokens=1)), None) == 2

    @pytest.mark.parametrize(
        ("tier", "cost"),
        [("priority", 4_250_000), ("fast", 4_250_000)]
        + [(tier, 2_500_000) for tier in ("default", "flex", "scale", "auto", "standard", "", "no such", None)],
    )
    def test_an_unknown_tier_costs_what_the_default_does(self, tier: str | None, cost: int) -> None:
        assert rate(Units(input_tokens=1_000), GPT_4O, tier) == cost

    def test_the_whole_prompt_chooses_the_step_and_the_bound_itself_is_below(self) -> None:
        assert rate(Units(input_tokens=200), STEPPED, None) == 200 * 3
        assert rate(Units(input_tokens=201), STEPPED, None) == 201 * 6
        # 100 cached tokens make the prompt long, and the rate for them still is that of the step below.
        assert rate(Units(input_tokens=101, cached_input_tokens=100), STEPPED, None) == 101 * 6 + 30
        assert rate(Units(input_tokens=1, cached_input_tokens=500, output_tokens=1), STEPPED, None) == 6 + 450 + 22

    @pytest.mark.parametrize(
        ("unit", "prices", "used"),
        [
            ("cached_input_tokens", {"input_tokens": 7}, 7),
            ("cached_input_tokens", {"input_tokens": 7, "cached_input_tokens": 0}, 0),
            ("cache_write_tokens", {"input_tokens": 7}, 7),
            ("cache_write_1h_tokens", {"input_tokens": 7, "cache_write_tokens": 8}, 8),
            ("cache_write_1h_tokens", {"input_tokens": 7}, 7),
            ("input_audio_tokens", {"input_tokens": 7}, 7),
            ("input_image_tokens", {"input_tokens": 7}, 7),
            ("reasoning_tokens", {"output_tokens": 9}, 9),
            ("output_audio_tokens", {"output_tokens": 9}, 9),
            ("output_image_tokens", {"output_tokens": 9}, 9),
            ("output_tokens", {"input_tokens": 7, "reasoning_tokens": 3}, None),
            ("input_tokens", {"output_tokens": 9, "cached_input_tokens": 3}, None),
            ("images", {"input_tokens": 7, "output_tokens": 9}, None),
            ("audio_seconds", {"input_tokens": 7, "output_tokens": 9}, None),
        ],
    )
    def test_what_has_no_rate_costs_what_a_coarser_unit_does_or_is_unpriced(
        self, unit: str, prices: dict[str, int], used: int | None
    ) -> None:
        scaled = {name: price * 1_000_000 for name, price in prices.items()}
        assert rate(Units(**{unit: 1}), terms(step(**scaled)), None) == used

    def test_nothing_costs_nothing_even_without_a_price(self) -> None:
        assert rate(NO_UNITS, terms(step()), "priority") == 0
        assert rate(NO_UNITS, None, "priority") == 0
        assert rate(Units(input_tokens=1), None, "priority") is None

    def test_differences_are_not_rated(self) -> None:
        """Guarantee: a correction that crosses a step cannot be priced by the step of its difference."""
        with pytest.raises(ValueError, match="input_tokens is -1"):
            rate(Units(input_tokens=-1), GPT_4O, None)

    def test_a_price_of_an_image_and_of_a_second(self) -> None:
        # 0.04 USD a picture, 0.0001 USD a second.
        each = terms(step(images=40_000_000 * 1_000_000, audio_seconds=100_000 * 1_000_000))
        assert rate(Units(images=3, audio_seconds=7), each, None) == 120_700_000


class TestTerms:
    def test_every_dimension_has_a_rate_of_its_name(self) -> None:
        assert Rates.__struct_fields__ == UNIT_NAMES

    @pytest.mark.parametrize(
        "tiers",
        [
            {},
            {"priority": (step(),)},
            {"default": ()},
            {"default": (step(above=1),)},
            {"default": (step(), step(above=5), step(above=5))},
            {"default": (step(), step(above=9), step(above=5))},
            {"default": (step(),), "flex": ()},
            {"default": (step(input_tokens=-1),)},
        ],
    )
    def test_terms_that_leave_a_call_without_a_step_are_refused(self, tiers: dict[str, tuple[Step, ...]]) -> None:
        with pytest.raises(ValueError, match=r"price|tier"):
            PriceTerms(tiers=tiers)

    def test_they_survive_json_and_say_only_what_is_set(self) -> None:
        encoded = msgspec.json.encode(STEPPED)
        assert msgspec.json.decode(encoded, type=PriceTerms) == STEPPED
        assert b"null" not in encoded
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(b'{"tiers": {"default": [{"rates": {"inptu_tokens": 1}}]}}', type=PriceTerms)
        with pytest.raises(msgspec.ValidationError, match="default"):
            msgspec.json.decode(b'{"tiers": {}}', type=PriceTerms)


numbers = st.integers(0, 200_000_000_000)
# What everything else falls back on.
COARSE = ("input_tokens", "output_tokens", "images", "audio_seconds")
some_rates = st.builds(Rates, **dict.fromkeys(UNIT_NAMES, st.none() | numbers))
coarse_rates = st.builds(Rates, **{name: numbers if name in COARSE else st.none() | numbers for name in UNIT_NAMES})


@st.composite
def some_steps(draw: st.DrawFn, base: st.SearchStrategy[Rates]) -> tuple[Step, ...]:
    bounds = sorted(draw(st.sets(st.integers(1, 3_000), max_size=3)))
    return Step(rates=draw(base)), *(Step(above_input_tokens=bound, rates=draw(some_rates)) for bound in bounds)


def prices(base: st.SearchStrategy[Rates]) -> st.SearchStrategy[PriceTerms]:
    tiers = st.dictionaries(st.sampled_from(TIERS[1:]), some_steps(base), max_size=3)
    return st.builds(lambda default, more: PriceTerms(tiers={"default": default, **more}), some_steps(base), tiers)


some_units = st.builds(Units, **dict.fromkeys(UNIT_NAMES, st.integers(0, 2_000)))
some_tier = st.none() | st.sampled_from([*TIERS, "fast", "auto", "no such"])


@given(units=some_units, terms=prices(some_rates) | prices(coarse_rates), tier=some_tier)
def test_rating_is_off_by_less_than_a_nano_usd_and_never_too_low(
    units: Units, terms: PriceTerms, tier: str | None
) -> None:
    """Guarantee: one rounding an entry, upwards, whatever the price is made of."""
    cost = rate(units, terms, tier)
    rates = effective_rates(terms, tier, units.all_input_tokens)
    exact = Fraction(0)
    for name in UNIT_NAMES:
        if count := getattr(units, name):
            price = rate_of(rates, name)
            if price is None:
                assert cost is None
                return
            exact += Fraction(count * price, 1_000_000)
    assert cost is not None
    assert 0 <= cost - exact < 1
    assert rate(units, terms, tier) == cost
    stored = msgspec.convert(msgspec.to_builtins(terms), PriceTerms)
    assert rate(units, stored, tier) == cost


@st.composite
def an_ask_and_usage_within_it(draw: st.DrawFn) -> tuple[Ask, Units, str | None]:
    """What a caller asks for, what the provider says that it used, and in which tier."""
    flags = draw(st.tuples(*[st.booleans()] * 4))
    ask = Ask(
        input_tokens_max=draw(st.integers(0, 4_000)),
        output_tokens_max=draw(st.integers(0, 4_000)),
        may_write_cache=flags[0],
        has_audio_input=flags[1],
        may_output_audio=flags[2],
        may_output_images=flags[3],
        service_tier=draw(some_tier),
    )
    inputs = ["input_tokens", "cached_input_tokens", "input_image_tokens"]
    inputs += ["cache_write_tokens", "cache_write_1h_tokens"] * ask.may_write_cache
    inputs += ["input_audio_tokens"] * ask.has_audio_input
    outputs = ["output_tokens", "reasoning_tokens"]
    outputs += ["output_audio_tokens"] * ask.may_output_audio + ["output_image_tokens"] * ask.may_output_images
    used = dict(draw(shares(inputs, ask.input_tokens_max))) | dict(draw(shares(outputs, ask.output_tokens_max)))
    answered = st.sampled_from(["default", "priority", "flex", "no such"])
    served = answered if ask.service_tier in {None, "auto"} else st.sampled_from([ask.service_tier, "default"])
    return ask, Units(**used), draw(served)


@st.composite
def shares(draw: st.DrawFn, names: list[str], most: int) -> list[tuple[str, int]]:
    """At most *most*, split over some of the names. Often all of it, and often in one."""
    left = draw(st.one_of(st.just(most), st.integers(0, most)))
    order = draw(st.permutations(names))
    split: list[tuple[str, int]] = []
    for name in order[:-1]:
        part = draw(st.one_of(st.just(left), st.just(0), st.integers(0, left)))
        split.append((name, part))
        left -= part
    return [*split, (order[-1], left)]


@settings(max_examples=400)
@given(terms=prices(some_rates) | prices(coarse_rates) | prices(coarse_rates), asked=an_ask_and_usage_within_it())
def test_no_usage_within_an_ask_costs_more_than_its_worst_case(
    terms: PriceTerms, asked: tuple[Ask, Units, str | None]
) -> None:
    """Guarantee: a budget that holds the worst case back is never overspent, and nothing unpriced is let through."""
    ask, units, served = asked
    worst = worst_case(terms, ask)
    if worst is not None:
        cost = rate(units, terms, served)
        assert cost is not None
        assert cost <= worst


class TestWorstCase:
    @pytest.mark.parametrize(
        ("ask", "amount"),
        [
            (Ask(input_tokens_max=1_000, output_tokens_max=100, service_tier="default"), 3_500_000),
            (Ask(input_tokens_max=1_000, output_tokens_max=100, service_tier="priority"), 5_950_000),
            (Ask(input_tokens_max=1_000, output_tokens_max=100, service_tier="fast"), 5_950_000),
            # Nobody said which tier: the provider may take the dearest.
            (Ask(input_tokens_max=1_000, output_tokens_max=100), 5_950_000),
            (Ask(input_tokens_max=1_000, output_tokens_max=100, service_tier="auto"), 5_950_000),
            (Ask(input_tokens_max=0, output_tokens_max=0), 0),
        ],
    )
    def test_by_tier(self, ask: Ask, amount: int | None) -> None:
        assert worst_case(GPT_4O, ask) == amount

    def test_batch_is_not_what_a_provider_chooses(self) -> None:
        dear = terms(step(input_tokens=1_000_000), batch=(step(input_tokens=9_000_000),))
        assert worst_case(dear, Ask(input_tokens_max=5, output_tokens_max=0)) == 5
        assert worst_case(dear, Ask(input_tokens_max=5, output_tokens_max=0, service_tier="batch")) == 45

    def test_a_lower_step_may_be_the_dearer_one(self) -> None:
        falling = terms(step(input_tokens=9_000_000), step(above=100, input_tokens=1_000_000))
        assert worst_case(falling, Ask(input_tokens_max=50, output_tokens_max=0)) == 450
        assert worst_case(falling, Ask(input_tokens_max=150, output_tokens_max=0)) == 900
        assert worst_case(falling, Ask(input_tokens_max=2_000, output_tokens_max=0)) == 2_000

    def test_a_flag_makes_its_units_count(self) -> None:
        rates = {"input_tokens": 1, "cache_write_tokens": 3, "input_audio_tokens": 5}
        rates |= {"output_tokens": 2, "output_audio_tokens": 7, "output_image_tokens": 11}
        price = terms(step(**{name: value * 1_000_000 for name, value in rates.items()}))
        plain = Ask(input_tokens_max=10, output_tokens_max=10)
        for flags, amount in (
            ({}, 10 + 20),
            ({"may_write_cache": True}, 30 + 20),
            ({"has_audio_input": True}, 50 + 20),
            ({"may_output_audio": True}, 10 + 70),
            ({"may_output_audio": True, "may_output_images": True}, 10 + 110),
        ):
            assert worst_case(price, msgspec.structs.replace(plain, **flags)) == amount

    @pytest.mark.parametrize("prompt", [1, 200, 201, 500, 501, 700])
    def test_it_is_reached(self, prompt: int) -> None:
        """Guarantee: no more is held back than some usage within the ask does cost, on either side of a bound."""
        ask = Ask(input_tokens_max=prompt, output_tokens_max=9, service_tier="default")
        assert worst_case(STEPPED, ask) == rate(Units(input_tokens=prompt, reasoning_tokens=9), STEPPED, "default")


def test_every_tier_that_a_list_can_price_is_rated_as_what_it_is() -> None:
    """Guarantee: a tier that is imported is never billed at the default one's price."""
    assert {known_tier(name) for name in price_list._TIERS.values()} == set(price_list._TIERS.values())
    assert [known_tier(name) for name in (None, "auto", "x\x00", "flex")] == ["default", "default", "default", "flex"]


class TestFitting:
    TOKENS, PIECES = Units(input_tokens=5), Units(images=2)
    BY_TOKENS, BY_PIECES = terms(step(input_tokens=10**6)), terms(step(images=10**6))
    FREE = terms(step(input_tokens=0, images=0))
    BY_PIECES_TOKENS_FREE = terms(step(input_tokens=0, images=10**6))

    @pytest.mark.parametrize(
        ("cost", "charge", "chosen"),
        [
            (BY_TOKENS, BY_TOKENS, TOKENS),
            (BY_PIECES, BY_PIECES, PIECES),
            (BY_PIECES_TOKENS_FREE, BY_PIECES_TOKENS_FREE, PIECES),
            # What the organization pays by goes before what the provider takes.
            (BY_TOKENS, BY_PIECES, PIECES),
            (BY_PIECES, BY_TOKENS, TOKENS),
            (None, BY_PIECES, PIECES),
            (BY_PIECES, BY_PIECES_TOKENS_FREE, PIECES),
            # What is free, and what nobody can say.
            (FREE, FREE, TOKENS),
            (BY_PIECES, FREE, PIECES),
            (BY_PIECES_TOKENS_FREE, FREE, PIECES),
            (None, None, TOKENS),
        ],
    )
    def test_what_is_paid_for_is_counted(
        self, cost: PriceTerms | None, charge: PriceTerms | None, chosen: Units
    ) -> None:
        assert fitting([self.TOKENS, self.PIECES], (cost, charge), None) == chosen
