"""Usage as providers report it, in dimensions that do not overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.money import NANO_USD_PER_USD
from metering.normalise import (
    COUNT_MAX,
    AnthropicUsage,
    GeminiUsage,
    OpenAIUsage,
    Usage,
    is_credible,
    reported_cost,
    units_of,
)
from metering.usage import NO_UNITS, Units
from tests.contracts.recordings import load

SHAPES: dict[str, type[Usage]] = {"openai": OpenAIUsage, "anthropic": AnthropicUsage, "gemini": GeminiUsage}


class Case(NamedTuple):
    name: str
    shape: str
    raw: dict[str, Any]

    @property
    def usage(self) -> Usage:
        return msgspec.json.decode(msgspec.json.encode(self.raw["usage"]), type=SHAPES[self.shape])


def cases() -> list[Case]:
    files = sorted(Path(__file__).with_name("usage_fixtures").glob("*.json"))
    loaded = [msgspec.json.decode(file.read_bytes()) for file in files]
    return [Case(case["name"], one["shape"], case) for one in loaded for case in one["cases"]]


CASES = cases()


def total(units: Units) -> int:
    return units.all_input_tokens + units.all_output_tokens


class TestWhatProvidersReport:
    @pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
    def test_every_token_is_in_one_dimension(self, case: Case) -> None:
        units = units_of(case.usage)
        assert units == msgspec.convert(case.raw["units"], Units)
        assert total(units) == case.raw["total"]
        assert is_credible(case.usage)

    @pytest.mark.parametrize("case", [case for case in CASES if case.shape == "openai"], ids=lambda case: case.name)
    def test_what_the_provider_says_that_it_cost(self, case: Case) -> None:
        assert isinstance(case.usage, OpenAIUsage)
        assert reported_cost(case.usage) == case.raw.get("reported_nano_usd")

    def test_there_are_cases_of_every_shape(self) -> None:
        assert len(CASES) >= 25
        assert {case.shape for case in CASES} == SHAPES.keys()
        assert len({case.name for case in CASES}) == len(CASES)

    def test_recorded_answers_sum_to_their_totals(self) -> None:
        """Guarantee: what OpenAI answered when it was recorded is metered to the token."""

        class Answer(msgspec.Struct):
            usage: OpenAIUsage | None = None

        found = 0
        for recording in load():
            for line in [recording.response_body, *recording.response_body.split(b"\n")]:
                try:
                    usage = msgspec.json.decode(line.removeprefix(b"data: "), type=Answer).usage
                except msgspec.DecodeError:
                    continue
                if usage is not None and usage.total_tokens is not None:
                    assert total(units_of(usage)) == usage.total_tokens
                    found += 1
        assert found >= 8


count = st.none() | st.integers(-5, 500)
parts = ("cached_tokens", "audio_tokens", "image_tokens", "cache_write_tokens", "tool_use_tokens")
cached_kinds = st.none() | st.fixed_dictionaries({}, optional={"audio_tokens": count})
details = st.fixed_dictionaries({}, optional=dict.fromkeys(parts, count) | {"cached_tokens_details": cached_kinds})
made = st.fixed_dictionaries({}, optional=dict.fromkeys(("reasoning_tokens", "audio_tokens", "image_tokens"), count))
split = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"), count)
)
whole = st.integers(0, 400)


class TestNoMatterWhatTheyReport:
    @given(
        prompt=whole,
        completion=whole,
        excess=st.none() | st.integers(-50, 300),
        more=st.fixed_dictionaries(
            {},
            optional={
                "prompt_tokens_details": st.none() | details,
                "completion_tokens_details": st.none() | made,
                "prompt_cache_hit_tokens": count,
                "cache_read_input_tokens": count,
                "cache_creation_input_tokens": count,
                "cache_creation": st.none() | split,
                "cached_tokens": count,
            },
        ),
    )
    def test_openais_shape_sums_to_prompt_and_completion(
        self, prompt: int, completion: int, excess: int | None, more: dict[str, Any]
    ) -> None:
        """Guarantee: no token is counted twice or lost; what only the total has is output."""
        reported = {"prompt_tokens": prompt, "completion_tokens": completion, **more}
        if excess is not None:
            reported["total_tokens"] = prompt + completion + excess
        units = units_of(msgspec.convert(reported, OpenAIUsage))
        assert min(msgspec.structs.astuple(units)) >= 0
        if prompt or completion:
            assert units.all_input_tokens == prompt
            assert completion <= units.all_output_tokens <= completion + max(excess or 0, 0)
        else:
            assert total(units) <= max(excess or 0, 0)

    @given(
        reported=st.fixed_dictionaries(
            {},
            optional={
                "input_tokens": whole,
                "output_tokens": whole,
                "cache_creation_input_tokens": st.none() | whole,
                "cache_read_input_tokens": st.none() | whole,
                "cache_creation": st.none() | split,
            },
        )
    )
    def test_anthropics_shape_sums_to_all_of_its_fields(self, reported: dict[str, Any]) -> None:
        usage = msgspec.convert(reported, AnthropicUsage)
        units = units_of(usage)
        written = units.cache_write_tokens + units.cache_write_1h_tokens
        assert min(msgspec.structs.astuple(units)) >= 0
        assert units.input_tokens == (usage.input_tokens or 0)
        assert units.cached_input_tokens == (usage.cache_read_input_tokens or 0)
        assert units.all_output_tokens == (usage.output_tokens or 0)
        assert not usage.cache_creation_input_tokens or written == usage.cache_creation_input_tokens

    @given(
        prompt=whole,
        tools=whole,
        candidates=whole,
        thoughts=whole,
        parts=st.lists(
            st.tuples(st.sampled_from(["TEXT", "AUDIO", "IMAGE", "VIDEO"]), st.integers(-5, 300)), max_size=4
        ),
        cached=st.integers(-5, 500),
    )
    def test_geminis_shape_sums_to_its_total(
        self, prompt: int, tools: int, candidates: int, thoughts: int, parts: list[tuple[str, int]], cached: int
    ) -> None:
        modalities = [{"modality": kind, "tokenCount": count} for kind, count in parts]
        reported = {
            "promptTokenCount": prompt,
            "toolUsePromptTokenCount": tools,
            "candidatesTokenCount": candidates,
            "thoughtsTokenCount": thoughts,
            "totalTokenCount": prompt + tools + candidates + thoughts,
            "cachedContentTokenCount": cached,
            "promptTokensDetails": modalities,
            "candidatesTokensDetails": modalities,
        }
        units = units_of(msgspec.convert(reported, GeminiUsage))
        assert min(msgspec.structs.astuple(units)) >= 0
        assert total(units) == reported["totalTokenCount"]

    def test_nothing_reported_is_nothing_used(self) -> None:
        for kind in SHAPES.values():
            assert units_of(kind()) == NO_UNITS


class TestCredible:
    @pytest.mark.parametrize(
        "usage",
        [
            OpenAIUsage(prompt_tokens=COUNT_MAX + 1),
            OpenAIUsage(completion_tokens=-1),
            OpenAIUsage(input_tokens=10**30),
            OpenAIUsage(output_tokens=COUNT_MAX + 1),
            OpenAIUsage(prompt_tokens=1, completion_tokens=1, total_tokens=10**9),
            OpenAIUsage(seconds=1e300),
            OpenAIUsage(prompt_audio_seconds=-1.0),
            AnthropicUsage(input_tokens=1, cache_read_input_tokens=COUNT_MAX + 1),
            AnthropicUsage(iterations=(AnthropicUsage(input_tokens=-1),)),
            GeminiUsage(prompt_token_count=COUNT_MAX + 1),
            GeminiUsage(thoughts_token_count=-3),
            GeminiUsage(tool_use_prompt_token_count=10**12),
        ],
        ids=[
            "prompt too large",
            "completion below 0",
            "input far too large",
            "output too large",
            "total beyond its parts",
            "seconds without end",
            "audio below 0",
            "cached too large",
            "iteration below 0",
            "gemini prompt too large",
            "thoughts below 0",
            "tools far too large",
        ],
    )
    def test_what_no_model_can_have_used_is_not_believed(self, usage: Usage) -> None:
        assert not is_credible(usage)

    def test_the_bound_itself_is(self) -> None:
        assert is_credible(OpenAIUsage(prompt_tokens=COUNT_MAX, completion_tokens=0, total_tokens=COUNT_MAX))
        assert is_credible(OpenAIUsage())

    def test_counts_are_those_of_either_spelling(self) -> None:
        assert OpenAIUsage(prompt_tokens=1, completion_tokens=2).counts() == (1, 2)
        assert OpenAIUsage(input_tokens=3, output_tokens=4).counts() == (3, 4)
        assert OpenAIUsage().counts() == (0, 0)


class TestReportedCost:
    @pytest.mark.parametrize(
        ("json", "amount"),
        [
            ("0", 0),
            ("1", NANO_USD_PER_USD),
            # Neither of the two is a binary fraction.
            ("0.1", 100_000_000),
            ("2.9e-7", 290),
            ("0.0000000001", 1),
            ("0.123456789123", 123_456_790),
            ("1000000", 1_000_000 * NANO_USD_PER_USD),
            ("1000000.1", None),
            ("1e999999999", None),
            ("1e-999999999", 0),
            ("-0.01", None),
            ("null", None),
            ('"0.1"', None),
            ('{"total_cost": 0.1}', None),
        ],
    )
    def test_it_is_read_as_it_was_written(self, json: str, amount: int | None) -> None:
        """Guarantee: no binary fraction comes between, and no answer of a provider can stop or fill a gateway."""
        usage = msgspec.json.decode(f'{{"prompt_tokens": 1, "cost": {json}}}', type=OpenAIUsage)
        assert usage.prompt_tokens == 1
        assert reported_cost(usage) == amount

    @pytest.mark.parametrize(
        ("ticks", "amount"), [(0, 0), (1, 1), (10, 1), (37_756_000, 3_775_600), (-5, None), (10**30, None)]
    )
    def test_ticks_of_xai(self, ticks: int, amount: int | None) -> None:
        assert reported_cost(OpenAIUsage(cost_in_usd_ticks=ticks)) == amount
