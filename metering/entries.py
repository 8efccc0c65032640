"""Intents, entries and what follows from them, as rows: one statement for a batch of calls, whatever their number.

Most of what is known of a call is the same for many calls of a batch (who called, which model, which price, how it
went). That part is sent once for all of them, and each call's own numbers in arrays beside it: a row costs a few
microseconds here, where a statement of its own would cost a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Final, Literal, NamedTuple

import msgspec

from metering.usage import NO_UNITS, Units

Quality = Literal["exact", "estimated"]
EntryKind = Literal["usage", "adjustment", "credit"]
# What a sweeper writes of a call whose gateway died: the one outcome that later truth may correct.
LOST: Final = "gateway_lost"


class Attribution(NamedTuple):
    """Who called what, and by which price: the same for every call of a key on a deployment."""

    organization_id: str
    project_id: str
    key_id: str
    secret_id: str
    model: str
    deployment: str
    operation: str
    price_id: str | None
    charge_price_id: str | None


class Intent(msgspec.Struct, frozen=True, gc=False):
    """A call that is about to reach a provider. *reserved_nano_usd* is the most that it can cost under hard budgets."""

    request_id: str
    attribution: Attribution
    prompt_tokens: int
    reserved_nano_usd: int
    started_ms: int


class Result(NamedTuple):
    """How a call went, as far as many calls go alike."""

    kind: EntryKind
    seq: int
    service_tier: str
    quality: Quality
    is_unpriced: bool
    requests: int
    status: int
    outcome: str
    corrects_kind: str | None = None
    corrects_seq: int | None = None
    reported_cost_nano_usd: int | None = None


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One row of the ledger. Times are milliseconds since 1970."""

    request_id: str
    attribution: Attribution
    result: Result
    units: Units
    cost_nano_usd: int
    charge_nano_usd: int
    started_ms: int
    duration_ms: int = 0
    first_byte_ms: int | None = None


SETTLE: Final = files("metering").joinpath("settle.sql").read_text()
INTEND: Final = files("metering").joinpath("intend.sql").read_text()
_NO_SHARED_UNITS: Final = (0,) * 8


def settle_arguments(entries: Sequence[Entry]) -> list[list[Any]]:
    """Return the arguments of metering/settle.sql for *entries*: dimensions that are nearly always zero are shared."""
    shared: dict[tuple[Any, ...], int] = {}
    own: list[tuple[Any, ...]] = []
    for entry in entries:
        units = entry.units
        rest = _NO_SHARED_UNITS if units is NO_UNITS else _shared_units(units)
        key = (*entry.attribution, *entry.result, *rest)
        own.append(
            (
                entry.request_id,
                shared.setdefault(key, len(shared) + 1),
                entry.started_ms,
                entry.duration_ms,
                entry.first_byte_ms,
                entry.cost_nano_usd,
                entry.charge_nano_usd,
                units.input_tokens,
                units.cached_input_tokens,
                units.output_tokens,
                units.reasoning_tokens,
            )
        )
    return [*map(list, zip(*own, strict=True)), *map(list, zip(*shared, strict=True))]


def _shared_units(units: Units) -> tuple[int, ...]:
    return (
        units.cache_write_tokens,
        units.cache_write_1h_tokens,
        units.input_audio_tokens,
        units.input_image_tokens,
        units.output_audio_tokens,
        units.output_image_tokens,
        units.images,
        units.audio_seconds,
    )


def intend_arguments(gateway_id: str, intents: Sequence[Intent]) -> list[Any]:
    """Return the arguments of metering/intend.sql for *intents*, of which no two are of one call."""
    shared: dict[Attribution, int] = {}
    own = [
        (
            intent.request_id,
            shared.setdefault(intent.attribution, len(shared) + 1),
            intent.prompt_tokens,
            intent.reserved_nano_usd,
            intent.started_ms,
        )
        for intent in intents
    ]
    return [gateway_id, *map(list, zip(*own, strict=True)), *map(list, zip(*shared, strict=True))]
