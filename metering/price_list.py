"""litellm's price list, read as a file of facts: `model_prices_and_context_window_backup.json` of its wheel.

litellm itself is not imported for it. A price is taken only whole: an entry with a price of something that we would
meter, in a form that is not understood here, is named and left out, since half a price is a wrong one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from metering.errors import PriceListUnreadable
from metering.rating import BATCH_TIER, DEFAULT_TIER, PriceTerms, Rates, Step

_FILE: Final = "model_prices_and_context_window_backup.json"
# 1 USD per unit = 10^9 nano-USD per unit = 10^15 nano-USD per million units.
_RATE_PER_USD: Final = 10**15
# What the data plane serves. (Models of `responses` answer on chat routes too.)
_MODES: Final = frozenset({"chat", "completion", "responses", "embedding", "image_generation", "audio_transcription"})
_TIERS: Final = {
    "_priority": "priority",
    "_flex": "flex",
    "_batches": BATCH_TIER,
    "_ultrafast": "ultrafast",
    "_balanced": "balanced",
}
_STEP: Final = re.compile(r"(.+)_above_(\d+)(k?)_tokens")
# litellm compares by `>`, but for xAI by `>=` (litellm_core_utils/llm_cost_calc/utils.py, its inclusive providers).
_INCLUSIVE_PROVIDERS: Final = frozenset({"xai"})
_DIMENSIONS: Final = {
    "input_cost_per_token": "input_tokens",
    "cache_read_input_token_cost": "cached_input_tokens",
    "cache_creation_input_token_cost": "cache_write_tokens",
    "cache_creation_input_token_cost_above_1hr": "cache_write_1h_tokens",
    "input_cost_per_audio_token": "input_audio_tokens",
    "input_cost_per_image_token": "input_image_tokens",
    "output_cost_per_token": "output_tokens",
    "output_cost_per_reasoning_token": "reasoning_tokens",
    "output_cost_per_audio_token": "output_audio_tokens",
    "output_cost_per_image_token": "output_image_tokens",
    "output_cost_per_image": "images",
}
# Further names, by mode: what a picture costs is now an input price and now an output price, and so is a second of
# sound. Where both stand, they say the same thing, and the first one counts.
_FURTHER: Final[Mapping[str, Mapping[str, str]]] = {
    "image_generation": {"input_cost_per_image": "images"},
    "audio_transcription": {"input_cost_per_second": "audio_seconds", "output_cost_per_second": "audio_seconds"},
}
_CACHE_HIT: Final = {"input_cost_per_token_cache_hit": "cached_input_tokens"}
# Prices that concern none of our dimensions: a price without them is whole.
_NOT_METERED: Final = frozenset(
    {
        # Tools that a provider runs beside the model; they are not in its token counts.
        "search_context_cost_per_query",
        "google_maps_grounding_cost_per_query",
        "code_interpreter_cost_per_session",
        "computer_use_input_cost_per_1k_tokens",
        "computer_use_output_cost_per_1k_tokens",
        "file_search_cost_per_1k_calls",
        "file_search_cost_per_gb_per_day",
        "vector_store_cost_per_gb_per_day",
        "guardrail_cost_per_unit",
        # Documents and video: no route takes them.
        "ocr_cost_per_page",
        "ocr_cost_per_credit",
        "annotation_cost_per_page",
        "input_cost_per_video_token",
        "output_cost_per_video_token",
        "input_cost_per_video_per_second",
        "output_cost_per_video_per_second",
        # The same price once more, in Databricks' own units.
        "input_dbu_cost_per_token",
        "output_dbu_cost_per_token",
        # Cached sound and pictures have no dimension of their own: they are rated as cached text is.
        "cache_read_input_audio_token_cost",
        "cache_read_input_image_token_cost",
        "cache_creation_input_audio_token_cost",
    }
)
# OpenAI's decisions are a route of their own; intervals are video's.
_NOT_METERED_ENDINGS: Final = ("_decisions", "s_interval")
# A rate above a million dollars a unit is a mistake, and a number with such an exponent would fill the memory.
_USD_MAX: Final = 1_000_000


class PriceList(msgspec.Struct, frozen=True, kw_only=True):
    """What one file says. *incomplete* names the fields for which a model's price was not taken."""

    prices: dict[str, PriceTerms]
    incomplete: dict[str, tuple[str, ...]]
    skipped: int
    """Entries for routes that are not served, and such as are no models."""
    without_price: int
    rounded: int
    """Rates that the list gives finer than a nano-USD per million units."""
    digest: str
    """SHA-256 of the file."""


def installed_price_list() -> Path:
    """Return where the installed litellm keeps its list. Errors: PriceListUnreadable when it is not installed."""
    found = find_spec("litellm")
    for place in (found and found.submodule_search_locations) or ():
        if (path := Path(place) / _FILE).is_file():
            return path
    raise PriceListUnreadable("litellm is not installed, and with it its price list: name a file")


def read_price_list(path: Path) -> PriceList:
    """Return the prices in a file of litellm's form. Errors: PriceListUnreadable."""
    try:
        content = path.read_bytes()
        entries: Any = json.loads(content, parse_float=Decimal)
    except (OSError, ValueError, RecursionError) as error:
        raise PriceListUnreadable(f"{path.name} cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise PriceListUnreadable(f"{path.name} is not a price list: expected an object with a name for each model")
    return _sorted_out(cast("dict[str, Any]", entries), hashlib.sha256(content).hexdigest())


def _sorted_out(entries: Mapping[str, Any], digest: str) -> PriceList:
    prices: dict[str, PriceTerms] = {}
    incomplete: dict[str, tuple[str, ...]] = {}
    skipped = without_price = rounded = 0
    for model, fields in entries.items():
        mode = cast("dict[str, Any]", fields).get("mode") if isinstance(fields, dict) else None
        if not isinstance(mode, str) or mode not in _MODES:
            skipped += 1
            continue
        entry = _Entry(cast("dict[str, Any]", fields), mode)
        if entry.unknown:
            incomplete[model] = tuple(sorted(entry.unknown))
        elif terms := entry.terms():
            prices[model] = terms
            rounded += entry.rounded
        else:
            without_price += 1
    return PriceList(
        prices=prices,
        incomplete=incomplete,
        skipped=skipped,
        without_price=without_price,
        rounded=rounded,
        digest=digest,
    )


class _Entry:
    """One model's fields, sorted by tier, bound and dimension. *unknown* are those that hide a price."""

    def __init__(self, fields: Mapping[str, Any], mode: str) -> None:
        self._fields = fields
        self._further = {**_CACHE_HIT, **_FURTHER.get(mode, {})}
        self._is_inclusive = fields.get("litellm_provider") in _INCLUSIVE_PROVIDERS
        self._rates: dict[tuple[str, int], dict[str, int]] = {}
        self.unknown: set[str] = set()
        self.rounded = 0
        names = [name for name in fields if "cost" in name]
        for name in [*(one for one in names if one not in self._further), *self._further]:
            self._add(name, fields.get(name))
        try:
            self._add_ranges(fields.get("tiered_pricing") or [])
        except (TypeError, LookupError, AttributeError, ValueError, ArithmeticError):
            self.unknown.add("tiered_pricing")
        if fields.get("off_peak_pricing"):
            # It goes by the hour, for which a price has no place.
            self.unknown.add("off_peak_pricing")

    def terms(self) -> PriceTerms | None:
        """Return the price, None where the entry has none."""
        if not self._rates:
            return None
        base = self._rates.setdefault((DEFAULT_TIER, 0), {})
        if "output_image_tokens" in base:
            # Models that give pictures only: litellm, too, reads it as the price of all their output.
            base.setdefault("output_tokens", base["output_image_tokens"])
        if base.keys() == {"audio_seconds"}:
            # Billed by time alone. Tokens that are reported besides (Mistral does) cost nothing more.
            base.update(input_tokens=0, output_tokens=0)
        self._drop_plain_reasoning()
        tiers = dict.fromkeys([DEFAULT_TIER, *(tier for tier, _ in self._rates)])
        return PriceTerms(
            tiers={tier: tuple(self._steps(tier)) for tier in tiers},
            input_tokens_max=_limit(self._fields.get("max_input_tokens")),
            output_tokens_max=_limit(self._fields.get("max_output_tokens")),
        )

    def _drop_plain_reasoning(self) -> None:
        """Forget the rate of reasoning where it is output's: the list repeats it in the default tier only."""
        places = [rates for (tier, _), rates in self._rates.items() if tier == DEFAULT_TIER]
        if all(rates.get("reasoning_tokens") == rates.get("output_tokens") for rates in places):
            for rates in places:
                rates.pop("reasoning_tokens", None)

    def _steps(self, tier: str) -> Iterator[Step]:
        """Yield a tier's steps. What it leaves out costs there what it costs in the default tier, as litellm has it."""
        for bound in sorted({bound for other, bound in self._rates if other in {tier, DEFAULT_TIER}}):
            rates = {**self._rates.get((DEFAULT_TIER, bound), {}), **self._rates.get((tier, bound), {})}
            yield Step(above_input_tokens=bound, rates=Rates(**rates))

    def _add(self, name: str, value: Any) -> None:
        place = self._place(name)
        if place is None:
            if value not in (None, 0):
                self.unknown.add(name)
        elif place and value is not None and (rate := self._rate(name, value)) is not None:
            tier, bound, unit = place
            self._rates.setdefault((tier, bound), {}).setdefault(unit, rate)

    def _place(self, name: str) -> tuple[str, int, str] | tuple[()] | None:
        """Return tier, bound and dimension of a field; empty if it is not metered, None if it is not known."""
        stem, tier = name, DEFAULT_TIER
        for ending, named in _TIERS.items():
            if name.endswith(ending):
                stem, tier = name.removesuffix(ending), named
        bound = 0
        if step := _STEP.fullmatch(stem):
            stem = step[1]
            bound = max(int(step[2]) * (1_000 if step[3] else 1) - self._is_inclusive, 0)
        if stem in _NOT_METERED or name.endswith(_NOT_METERED_ENDINGS):
            return ()
        unit = _DIMENSIONS.get(stem) or self._further.get(stem)
        return None if unit is None else (tier, bound, unit)

    def _rate(self, name: str, value: Any) -> int | None:
        """Return USD per unit as nano-USD per million units, rounded half to even."""
        if not isinstance(value, int | Decimal) or isinstance(value, bool) or not 0 <= value <= _USD_MAX:
            self.unknown.add(name)
            return None
        exact = value * _RATE_PER_USD
        rate = int(Decimal(exact).to_integral_value(ROUND_HALF_EVEN))
        self.rounded += rate != exact
        return rate

    def _add_ranges(self, ranges: list[dict[str, Any]]) -> None:
        """Add prices by ranges of prompt lengths, of which each is whole: nothing holds over from the range below."""
        places: list[dict[str, int]] = []
        for one in ranges:
            rates = self._rates.setdefault((DEFAULT_TIER, max(int(one["range"][0]), 0)), {})
            for name, value in one.items():
                if name in _DIMENSIONS and (rate := self._rate(name, value)) is not None:
                    rates.setdefault(_DIMENSIONS[name], rate)
                elif name != "range":
                    self.unknown.add("tiered_pricing")
            places.append(rates)
        for unit, other in (("cached_input_tokens", "input_tokens"), ("reasoning_tokens", "output_tokens")):
            for rates in places:
                if any(unit in there for there in places) and other in rates:
                    rates.setdefault(unit, rates[other])


def _limit(value: Any) -> int | None:
    is_count = isinstance(value, int | Decimal) and 0 < value <= 10**9 and value == int(value)
    return int(value) if is_count else None
