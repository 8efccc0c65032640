"""Unit prices of plans: the tables `[plans.NAME.prices."MODEL"]`, read into the terms that calls are rated by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from core.configuration import unknown_names
from core.money import parse_usd, parse_usd_each
from metering.rating import DEFAULT_TIER, PriceTerms, Rates, Step
from metering.usage import UNIT_NAMES

_COUNTED: Final = {"images": "image_usd", "audio_seconds": "audio_second_usd"}


def _field_of(unit: str) -> str:
    return _COUNTED.get(unit) or f"{unit.removesuffix('_tokens')}_usd_per_million"


# Name in the file → the dimension of `metering.usage.Units` that it prices.
PRICE_FIELDS: Final = {_field_of(unit): unit for unit in UNIT_NAMES}


def read_terms(value: object, where: str, problems: list[str]) -> dict[str, PriceTerms]:
    """Return the terms of each model in a plan's `prices`; what is wrong with them is added to *problems*."""
    if not isinstance(value, dict):
        problems.append(f"{where}: expected a table of models")
        return {}
    described = cast("dict[str, Any]", value)
    return {model: _terms(table, f'{where}."{model}"', problems) for model, table in described.items()}


def _terms(value: object, where: str, problems: list[str]) -> PriceTerms:
    table: Mapping[str, Any] = {}
    if isinstance(value, dict) and value:
        table = cast("dict[str, Any]", value)
    else:
        problems.append(f"{where}: expected prices, such as input_usd_per_million")
    problems += unknown_names(table, PRICE_FIELDS, f"{where}.")
    rates = {
        unit: _rate(table[name], parse_usd_each if unit in _COUNTED else parse_usd, f"{where}.{name}", problems)
        for name, unit in PRICE_FIELDS.items()
        if name in table
    }
    return PriceTerms(tiers={DEFAULT_TIER: (Step(rates=Rates(**rates)),)})


def _rate(value: object, parse: Callable[[str], int], where: str, problems: list[str]) -> int:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    try:
        rate = parse(text)
    except ValueError:
        rate = -1
    if rate < 0:
        problems.append(f'{where}: expected US dollars as a whole number or as a text, such as 3 or "2.50"')
        return 0
    return rate
