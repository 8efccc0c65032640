"""What units cost: pure functions on integers. An amount is multiplied first and rounded once.

A rate is nano-USD per million units. Which rates hold is chosen twice: by the service tier that the provider says it
served, and within it by how long the whole prompt was. A unit without a rate of its own has the rate of a coarser one
(a cached token is an input token); where that is missing too, the call is unpriced, which is not the same as free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Final

import msgspec
from msgspec.structs import asdict, astuple, replace

from core.money import NanoUsd
from metering.usage import NO_UNITS, UNIT_NAMES, Units

UNITS_PER_PRICE: Final = 1_000_000
DEFAULT_TIER: Final = "default"
BATCH_TIER: Final = "batch"
# OpenAI's API document: `fast` asks for what the answer then calls `priority`; `auto` leaves the choice to the project.
_TIER_ALIASES: Final = {"fast": "priority"}
# Names that answers may carry: those of OpenAI's API document and of litellm's list. What is entered comes from here,
# and not from a provider's answer: that may hold anything.
_TIERS: Final = frozenset({"default", "flex", "priority", "batch", "scale", "fast", "ultrafast", "balanced"})
_OUTPUT: Final = UNIT_NAMES.index("output_tokens")
_NO_OTHERS: Final = (0,) * (len(UNIT_NAMES) // 2 - 1)
"""The units before the output tokens but for the first, and as many behind them."""
_PROVIDER_DECIDES: Final = frozenset({None, "auto"})
# What has no rate of its own is rated as the next one of these.
_INSTEAD: Final[Mapping[str, tuple[str, ...]]] = {
    "cached_input_tokens": ("input_tokens",),
    "cache_write_tokens": ("input_tokens",),
    "cache_write_1h_tokens": ("cache_write_tokens", "input_tokens"),
    "input_audio_tokens": ("input_tokens",),
    "input_image_tokens": ("input_tokens",),
    "reasoning_tokens": ("output_tokens",),
    "output_audio_tokens": ("output_tokens",),
    "output_image_tokens": ("output_tokens",),
}
Rate = Annotated[int, msgspec.Meta(ge=0)]


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Nano-USD per million units of each dimension of `Units`. None: no rate of its own; 0: free."""

    input_tokens: Rate | None = None
    cached_input_tokens: Rate | None = None
    cache_write_tokens: Rate | None = None
    cache_write_1h_tokens: Rate | None = None
    input_audio_tokens: Rate | None = None
    input_image_tokens: Rate | None = None
    output_tokens: Rate | None = None
    reasoning_tokens: Rate | None = None
    output_audio_tokens: Rate | None = None
    output_image_tokens: Rate | None = None
    images: Rate | None = None
    audio_seconds: Rate | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Rates for calls whose whole prompt is longer than the bound. What it leaves out holds as in the step below."""

    above_input_tokens: int = 0
    rates: Rates


class PriceTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a model costs, by service tier; a tier that is not named costs what the default one does.

    The two limits are what the model can take and give at most, where that is known.
    """

    tiers: dict[str, tuple[Step, ...]]
    input_tokens_max: int | None = None
    output_tokens_max: int | None = None

    def __post_init__(self) -> None:
        """Errors: ValueError for terms that would leave some calls without steps, or pay for usage."""
        if DEFAULT_TIER not in self.tiers:
            raise ValueError("a price needs its default tier")
        for tier, steps in self.tiers.items():
            bounds = [step.above_input_tokens for step in steps]
            if bounds[:1] != [0] or sorted(set(bounds)) != bounds:
                raise ValueError(f"the steps of tier {tier} must begin above 0 tokens and rise")
            if any(value is not None and value < 0 for step in steps for value in astuple(step.rates)):
                raise ValueError(f"tier {tier} has a rate below 0")


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """The most that a call can use. *service_tier* as the caller asked; None or `auto` lets the provider decide."""

    input_tokens_max: int
    output_tokens_max: int
    may_write_cache: bool = False
    has_audio_input: bool = False
    may_output_audio: bool = False
    may_output_images: bool = False
    service_tier: str | None = None


def known_tier(service_tier: str | None) -> str:
    """Return the service tier that an answer names, if it is one that a price can have; else the default one."""
    return service_tier if service_tier in _TIERS else DEFAULT_TIER


def rate(units: Units, terms: PriceTerms | None, service_tier: str | None) -> NanoUsd | None:
    """What *units* cost in nano-USD, rounded up once: rounding per dimension would overcharge.

    None when something was used that has no rate; what used nothing costs nothing, whatever it would have cost.
    Errors: ValueError for negative units: a correction is the difference of two whole calls, each rated by itself.
    """
    if terms is None:
        return NanoUsd(0) if units == NO_UNITS else None
    steps = _steps(terms, service_tier)
    counts = astuple(units)
    prompt, output = counts[0], counts[_OUTPUT]
    if prompt > 0 and output > 0 and counts[1:_OUTPUT] == _NO_OTHERS and counts[_OUTPUT + 1 :] == _NO_OTHERS:
        # By far the commonest case, and this is the hot path.
        rates = steps[0].rates if len(steps) == 1 else _rates_at(steps, prompt)
        if rates.input_tokens is None or rates.output_tokens is None:
            return None
        return _rounded_up(prompt * rates.input_tokens + output * rates.output_tokens)
    rates = _rates_at(steps, units.all_input_tokens)
    scaled = 0
    for name, count in zip(UNIT_NAMES, counts, strict=True):
        if count:
            price = rate_of(rates, name)
            if count < 0:
                raise ValueError(f"{name} is {count}: only a whole call can be rated")
            if price is None:
                return None
            scaled += count * price
    return _rounded_up(scaled)


def fitting(candidates: Sequence[Units], prices: Sequence[PriceTerms | None], service_tier: str | None) -> Units:
    """Return the first of several ways to count a call that every one of *prices* asks something for.

    Else the first that the last one does, which is what the organization pays by; else that any does. (A price by the
    second may have tokens for nothing.) Else the first that they can rate, in the same order; else simply the first.
    """

    def rank(units: Units) -> tuple[bool, ...]:
        amounts = [rate(units, terms, service_tier) for terms in prices]
        known = [amount for amount in amounts if amount is not None]
        asked, is_whole = [bool(amount) for amount in amounts], len(known) == len(amounts)
        return all(asked), asked[-1], is_whole and any(asked), is_whole, amounts[-1] is not None

    return max(candidates, key=rank)


def worst_case(terms: PriceTerms, ask: Ask) -> NanoUsd | None:
    """Return the least amount that `rate` cannot exceed for any usage within *ask*; None if some could be unpriced."""
    dearest = 0
    for steps in _possible_tiers(terms, ask.service_tier):
        for rates, prompt_max in _reachable(steps, ask.input_tokens_max):
            scaled = _dearest(rates, ask, prompt_max)
            if scaled is None:
                return None
            dearest = max(dearest, scaled)
    return _rounded_up(dearest)


def rate_of(rates: Rates, unit: str) -> int | None:
    """Return the rate of one dimension, or of the one that stands in for it."""
    own: int | None = getattr(rates, unit)
    if own is not None:
        return own
    for other in _INSTEAD.get(unit, ()):
        value: int | None = getattr(rates, other)
        if value is not None:
            return value
    return None


def effective_rates(terms: PriceTerms, service_tier: str | None, input_tokens: int) -> Rates:
    """Return the rates that hold in a tier for a prompt of *input_tokens*, before dimensions stand in for others."""
    return _rates_at(_steps(terms, service_tier), input_tokens)


def _steps(terms: PriceTerms, service_tier: str | None) -> tuple[Step, ...]:
    if service_tier is None or service_tier == DEFAULT_TIER:
        return terms.tiers[DEFAULT_TIER]
    name = _TIER_ALIASES.get(service_tier, service_tier)
    return terms.tiers.get(name) or terms.tiers[DEFAULT_TIER]


def _rates_at(steps: tuple[Step, ...], input_tokens: int) -> Rates:
    rates = steps[0].rates
    for step in steps[1:]:
        if input_tokens <= step.above_input_tokens:
            break
        rates = _over(step.rates, rates)
    return rates


def _over(higher: Rates, lower: Rates) -> Rates:
    return replace(lower, **{name: value for name, value in asdict(higher).items() if value is not None})


def _rounded_up(scaled: int) -> NanoUsd:
    return NanoUsd(-(-scaled // UNITS_PER_PRICE))


def _possible_tiers(terms: PriceTerms, service_tier: str | None) -> list[tuple[Step, ...]]:
    """Return the steps of each tier that may serve the call: the provider may serve another than it was asked for."""
    if service_tier in _PROVIDER_DECIDES:
        return [steps for tier, steps in terms.tiers.items() if tier != BATCH_TIER]
    return [terms.tiers[DEFAULT_TIER], _steps(terms, service_tier)]


def _reachable(steps: tuple[Step, ...], input_tokens_max: int) -> Iterator[tuple[Rates, int]]:
    """Yield the rates of each step that a prompt may fall into, and the longest such prompt.

    The prompt may be shorter than its bound, and a lower step may be the dearer one.
    """
    rates = Rates()
    for step, above in zip(steps, [*steps[1:], None], strict=True):
        if step.above_input_tokens and input_tokens_max <= step.above_input_tokens:
            return
        rates = _over(step.rates, rates)
        yield rates, input_tokens_max if above is None else min(input_tokens_max, above.above_input_tokens)


def _dearest(rates: Rates, ask: Ask, prompt_max: int) -> int | None:
    """Return the most that calls in one step can cost, scaled; None if a unit that may occur has no rate."""
    scaled = 0
    for count, names in (
        (prompt_max, _input_names(ask)),
        (ask.output_tokens_max, _output_names(ask)),
    ):
        if count > 0:
            prices = [rate_of(rates, name) for name in names]
            known = [price for price in prices if price is not None]
            if len(known) < len(prices):
                return None
            scaled += count * max(known)
    return scaled


def _input_names(ask: Ask) -> tuple[str, ...]:
    names = ("input_tokens", "cached_input_tokens", "input_image_tokens")
    if ask.may_write_cache:
        names += ("cache_write_tokens", "cache_write_1h_tokens")
    return (*names, "input_audio_tokens") if ask.has_audio_input else names


def _output_names(ask: Ask) -> tuple[str, ...]:
    names = ("output_tokens", "reasoning_tokens")
    if ask.may_output_audio:
        names += ("output_audio_tokens",)
    return (*names, "output_image_tokens") if ask.may_output_images else names
