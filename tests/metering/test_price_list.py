"""litellm's price list, as a file of facts: what is taken of it, what is left out, and what is said of that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from metering.errors import PriceListUnreadable
from metering.price_list import PriceList, installed_price_list, read_price_list
from metering.rating import PriceTerms, Rates, Step
from tests.harness.gateway import ROOT


@pytest.fixture(scope="module")
def installed() -> PriceList:
    return read_price_list(installed_price_list())


def written(directory: Path, **entries: object) -> PriceList:
    path = directory / "list.json"
    path.write_bytes(msgspec.json.encode(entries))
    return read_price_list(path)


def only(directory: Path, **fields: object) -> PriceTerms:
    """The price that one chat entry gives."""
    listed = written(directory, m={"mode": "chat", **fields})
    assert listed.incomplete == {}
    return listed.prices["m"]


def step(above: int = 0, **usd_per_million: float) -> Step:
    """Rates from US dollars per million tokens."""
    rates = {name: round(usd * 1_000_000) * 1_000 for name, usd in usd_per_million.items()}
    return Step(above_input_tokens=above, rates=Rates(**rates))


class TestTheInstalledList:
    """The prices are those of litellm 1.106.2; when its lock moves, what moved is to be looked at."""

    def test_gpt_4o(self, installed: PriceList) -> None:
        assert installed.prices["gpt-4o"] == PriceTerms(
            tiers={
                "default": (step(input_tokens=2.5, cached_input_tokens=1.25, output_tokens=10),),
                "priority": (step(input_tokens=4.25, cached_input_tokens=2.125, output_tokens=17),),
                # What batches leave out costs what it costs elsewhere.
                "batch": (step(input_tokens=1.25, cached_input_tokens=1.25, output_tokens=5),),
            },
            input_tokens_max=128_000,
            output_tokens_max=16_384,
        )

    def test_a_claude_with_two_kinds_of_cache_and_a_step(self, installed: PriceList) -> None:
        terms = installed.prices["claude-sonnet-4-5-20250929-v1:0"]
        dear = {"cached_input_tokens": 0.6, "cache_write_tokens": 7.5, "cache_write_1h_tokens": 12}
        cheap = {"cached_input_tokens": 0.3, "cache_write_tokens": 3.75, "cache_write_1h_tokens": 6}
        assert terms.tiers["default"] == (
            step(input_tokens=3, output_tokens=15, **cheap),
            step(above=200_000, input_tokens=6, output_tokens=22.5, **dear),
        )

    def test_a_gemini_with_tiers_and_steps_together(self, installed: PriceList) -> None:
        terms = installed.prices["gemini/gemini-2.5-pro"]
        assert terms.tiers["default"] == (
            step(input_tokens=1.25, cached_input_tokens=0.125, output_tokens=10),
            step(above=200_000, input_tokens=2.5, cached_input_tokens=0.25, output_tokens=15),
        )
        assert terms.tiers["priority"] == (
            step(input_tokens=2.25, cached_input_tokens=0.225, output_tokens=18),
            step(above=200_000, input_tokens=4.5, cached_input_tokens=0.45, output_tokens=27),
        )
        assert terms.tiers["flex"][0] == step(input_tokens=0.625, cached_input_tokens=0.125, output_tokens=5)
        assert (terms.input_tokens_max, terms.output_tokens_max) == (1_048_576, 65_536)

    def test_reasoning_that_costs_what_output_does_follows_it_into_every_tier(self, installed: PriceList) -> None:
        terms = installed.prices["gemini/gemini-2.5-flash"]
        assert all(step.rates.reasoning_tokens is None for steps in terms.tiers.values() for step in steps)
        assert terms.tiers["priority"][0].rates.output_tokens == 4_500_000_000
        assert terms.tiers["default"][0].rates.input_audio_tokens == 1_000_000_000

    def test_pictures_sound_and_embeddings(self, installed: PriceList) -> None:
        assert installed.prices["gpt-image-1"].tiers["default"] == (
            step(
                input_tokens=5,
                cached_input_tokens=1.25,
                input_image_tokens=10,
                output_tokens=40,
                output_image_tokens=40,
            ),
        )
        whisper = Rates(audio_seconds=100_000_000_000, input_tokens=0, output_tokens=0)
        assert installed.prices["whisper-1"].tiers == {"default": (Step(rates=whisper),)}
        assert installed.prices["text-embedding-3-small"].tiers["default"] == (
            step(input_tokens=0.02, output_tokens=0),
        )

    def test_a_range_of_its_own_is_a_step(self, installed: PriceList) -> None:
        assert installed.prices["dashscope/qwen3-coder-flash"].tiers["default"] == (
            step(input_tokens=0.3, cached_input_tokens=0.08, output_tokens=1.5),
            step(above=32_000, input_tokens=0.5, cached_input_tokens=0.12, output_tokens=2.5),
            step(above=128_000, input_tokens=0.8, cached_input_tokens=0.2, output_tokens=4),
            step(above=256_000, input_tokens=1.6, cached_input_tokens=0.4, output_tokens=9.6),
        )

    def test_nearly_all_is_taken_and_the_rest_is_named(self, installed: PriceList) -> None:
        """Guarantee: nothing is left out silently: an entry is a price, named, skipped by its kind, or without a price."""
        entries = msgspec.json.decode(installed_price_list().read_bytes())
        counted = len(installed.prices) + len(installed.incomplete) + installed.skipped + installed.without_price
        assert counted == len(entries)
        assert len(installed.prices) > 3_000
        assert len(installed.incomplete) < 200
        assert installed.incomplete["perplexity/sonar-deep-research"] == ("citation_cost_per_token",)
        assert installed.prices.keys().isdisjoint(installed.incomplete)
        assert len(installed.digest) == 64

    def test_litellm_is_not_imported_for_it(self) -> None:
        code = (
            "import sys; from metering.price_list import *; read_price_list(installed_price_list()); "
            "print([name for name in sys.modules if name.partition('.')[0] == 'litellm'])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestFields:
    def test_tiers_steps_and_both(self, tmp_path: Path) -> None:
        terms = only(
            tmp_path,
            input_cost_per_token=1e-06,
            input_cost_per_token_priority=2e-06,
            input_cost_per_token_above_200k_tokens=3e-06,
            input_cost_per_token_above_200k_tokens_priority=4e-06,
            input_cost_per_token_above_272k_tokens=5e-06,
            input_cost_per_token_ultrafast=6e-06,
            output_cost_per_token=7e-06,
        )
        assert terms.tiers == {
            "default": (
                step(input_tokens=1, output_tokens=7),
                step(above=200_000, input_tokens=3),
                step(above=272_000, input_tokens=5),
            ),
            "priority": (
                step(input_tokens=2, output_tokens=7),
                step(above=200_000, input_tokens=4),
                step(above=272_000, input_tokens=5),
            ),
            "ultrafast": (
                step(input_tokens=6, output_tokens=7),
                step(above=200_000, input_tokens=3),
                step(above=272_000, input_tokens=5),
            ),
        }

    def test_a_prompt_of_just_the_bound_is_dear_at_xai_and_nowhere_else(self, tmp_path: Path) -> None:
        fields = {"input_cost_per_token": 1e-06, "input_cost_per_token_above_128k_tokens": 2e-06}
        at_xai = only(tmp_path, litellm_provider="xai", **fields)
        elsewhere = only(tmp_path, litellm_provider="openai", **fields)
        assert [one.above_input_tokens for one in at_xai.tiers["default"]] == [0, 127_999]
        assert [one.above_input_tokens for one in elsewhere.tiers["default"]] == [0, 128_000]

    def test_a_step_without_a_base_leaves_short_prompts_unpriced(self, tmp_path: Path) -> None:
        terms = only(tmp_path, input_cost_per_token_above_128k_tokens=2e-06)
        assert terms.tiers["default"] == (step(), step(above=128_000, input_tokens=2))

    def test_the_cache_hit_price_counts_where_there_is_no_other(self, tmp_path: Path) -> None:
        hit = {"input_cost_per_token": 1e-06, "input_cost_per_token_cache_hit": 1e-07}
        assert only(tmp_path, **hit).tiers["default"][0].rates.cached_input_tokens == 100_000_000
        both = only(tmp_path, **hit, cache_read_input_token_cost=2e-07)
        assert both.tiers["default"][0].rates.cached_input_tokens == 200_000_000

    @pytest.mark.parametrize(
        ("mode", "fields", "rates"),
        [
            ("image_generation", {"input_cost_per_image": 0.02}, {"images": 20_000_000 * 10**6}),
            (
                "image_generation",
                {"input_cost_per_image": 0.02, "output_cost_per_image": 0.04},
                {"images": 40 * 10**12},
            ),
            ("audio_transcription", {"output_cost_per_second": 0.0001}, {"audio_seconds": 10**11}),
            ("audio_transcription", {"input_cost_per_second": 0, "output_cost_per_second": 1}, {"audio_seconds": 0}),
        ],
    )
    def test_pictures_and_seconds(
        self, tmp_path: Path, mode: str, fields: dict[str, float], rates: dict[str, int]
    ) -> None:
        found = written(tmp_path, m={"mode": mode, **fields}).prices["m"].tiers["default"][0].rates
        assert {name: value for name, value in msgspec.structs.asdict(found).items() if value} == {
            name: value for name, value in rates.items() if value
        }

    def test_free_is_a_price_and_nothing_is_none(self, tmp_path: Path) -> None:
        listed = written(
            tmp_path,
            free={"mode": "chat", "input_cost_per_token": 0.0, "output_cost_per_token": 0},
            nothing={"mode": "chat", "max_tokens": 5},
        )
        assert listed.prices == {"free": PriceTerms(tiers={"default": (step(input_tokens=0, output_tokens=0),)})}
        assert listed.without_price == 1

    @pytest.mark.parametrize(
        "fields",
        [
            {"input_cost_per_pixel": 1e-09},
            {"input_cost_per_character": 1e-09},
            {"input_cost_per_second": 1e-09},
            {"input_cost_per_image": 0.1},
            {"input_cost_per_token_at_night": 1e-09},
            {"input_cost_per_token_above_200k_words": 1e-09},
            {"explicit_cache_read_input_token_cost": 1e-09},
            {"off_peak_pricing": {"hours": "00:00-08:00"}},
            {"output_cost_per_token": -1e-09},
            {"output_cost_per_token": "1e-09"},
            {"output_cost_per_token": True},
            {"output_cost_per_token": 1e300},
            {"tiered_pricing": [{"range": [0, 5], "input_cost_per_word": 1.0}]},
            {"tiered_pricing": [{"input_cost_per_token": 1e-06}]},
            {"tiered_pricing": 5},
        ],
        ids=lambda fields: next(iter(fields)),
    )
    def test_a_price_that_is_not_understood_whole_is_not_taken(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        """Guarantee: half a price is none. What could not be read is named."""
        listed = written(tmp_path, m={"mode": "chat", "input_cost_per_token": 1e-06, **fields})
        assert (listed.prices, listed.incomplete) == ({}, {"m": tuple(fields)})

    @pytest.mark.parametrize(
        "fields",
        [
            {"search_context_cost_per_query": {"search_context_size_low": 0.03}},
            {"google_maps_grounding_cost_per_query": 0.025},
            {"input_dbu_cost_per_token": 1e-05},
            {"input_cost_per_video_per_second_above_15s_interval": 0.1},
            {"input_cost_per_token_decisions": 1e-07},
            {"ocr_cost_per_page_batches": 0.1},
            {"input_cost_per_character": 0},
            {"input_cost_per_parsec": None},
        ],
        ids=lambda fields: next(iter(fields)),
    )
    def test_prices_of_what_is_not_metered_do_not_matter(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        assert only(tmp_path, input_cost_per_token=1e-06, **fields) == only(tmp_path, input_cost_per_token=1e-06)

    def test_other_routes_are_skipped_and_counted(self, tmp_path: Path) -> None:
        listed = written(tmp_path, a={"mode": "video_generation"}, b={"rules": []}, c="no entry", d={"mode": [7]})
        assert (listed.prices, listed.incomplete, listed.skipped) == ({}, {}, 4)

    def test_finer_than_a_nano_usd_per_million_is_rounded_half_to_even_and_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "list.json"
        path.write_text(
            '{"m": {"mode": "chat", "input_cost_per_token": 2.5e-15, "output_cost_per_token": 3.5e-15,'
            ' "cache_read_input_token_cost": 1e-15}}'
        )
        listed = read_price_list(path)
        assert listed.prices["m"].tiers["default"][0].rates == Rates(
            input_tokens=2, output_tokens=4, cached_input_tokens=1
        )
        assert listed.rounded == 2

    @pytest.mark.parametrize("limit", ["many", 0, -5, 1.5, 10**12, None, [3]])
    def test_a_limit_that_is_none_is_none(self, tmp_path: Path, limit: object) -> None:
        assert only(tmp_path, input_cost_per_token=1, max_input_tokens=limit).input_tokens_max is None

    @pytest.mark.parametrize("content", [b"", b"[]", b'{"a": ', b"\xff", b"[" * 100_000])
    def test_a_file_that_is_no_list_is_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "list.json"
        path.write_bytes(content)
        with pytest.raises(PriceListUnreadable, match=r"list\.json"):
            read_price_list(path)
        with pytest.raises(PriceListUnreadable):
            read_price_list(tmp_path / "absent.json")
