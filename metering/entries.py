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

from metering.usage import NO_MEDIA, Media, Units

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
    media: Media = NO_MEDIA


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
_encode: Final = msgspec.json.Encoder().encode
_SHARED_UNITS: Final = (
    "cache_write_tokens",
    "cache_write_1h_tokens",
    "input_audio_tokens",
    "input_image_tokens",
    "output_audio_tokens",
    "output_image_tokens",
    "images",
    "audio_seconds",
)
_INTENT_NAMES: Final = (*Attribution._fields, *Media._fields)
_NO_SHARED_UNITS: Final = (0,) * len(_SHARED_UNITS)
_SHARED_NAMES: Final = (*Attribution._fields, *Result._fields, *_SHARED_UNITS)


def settle_arguments(entries: Sequence[Entry]) -> list[str]:
    """Return the arguments of metering/settle.sql for *entries*: dimensions that are nearly always zero are shared."""
    # By identity: what is equal and not the same is sent twice, which is as right.
    places: dict[tuple[int, int, int], int] = {}
    shared: list[tuple[Attribution, Result, tuple[int, ...]]] = []
    own: list[tuple[str, int, int, int, int, int, int, int, int, int, int]] = []
    for entry in entries:
        units, attribution, result = entry.units, entry.attribution, entry.result
        rest = _shared_units(units)
        key = (id(attribution), id(result), id(rest))
        place = places.get(key)
        if place is None:
            shared.append((attribution, result, rest))
            place = places[key] = len(shared)
        own.append(
            (
                entry.request_id,
                place,
                entry.started_ms,
                entry.duration_ms,
                -1 if entry.first_byte_ms is None else entry.first_byte_ms,
                entry.cost_nano_usd,
                entry.charge_nano_usd,
                units.input_tokens,
                units.cached_input_tokens,
                units.output_tokens,
                units.reasoning_tokens,
            )
        )
    named = [
        {"n": place, **dict(zip(_SHARED_NAMES, (*attribution, *result, *rest), strict=True))}
        for place, (attribution, result, rest) in enumerate(shared, 1)
    ]
    return [*_arrays(own), _encode(named).decode()]


def _shared_units(units: Units) -> tuple[int, ...]:
    rest = (
        units.cache_write_tokens,
        units.cache_write_1h_tokens,
        units.input_audio_tokens,
        units.input_image_tokens,
        units.output_audio_tokens,
        units.output_image_tokens,
        units.images,
        units.audio_seconds,
    )
    return rest if any(rest) else _NO_SHARED_UNITS


def intend_arguments(gateway_id: str, intents: Sequence[Intent]) -> list[str]:
    """Return the arguments of metering/intend.sql for *intents*, of which no two are of one call."""
    places: dict[tuple[int, Media], int] = {}
    shared: list[tuple[Attribution, Media]] = []
    own: list[tuple[str, int, int, int, int]] = []
    for intent in intents:
        attribution = intent.attribution
        key = (id(attribution), intent.media)
        place = places.get(key)
        if place is None:
            shared.append((attribution, intent.media))
            place = places[key] = len(shared)
        own.append((intent.request_id, place, intent.prompt_tokens, intent.reserved_nano_usd, intent.started_ms))
    named = [
        {"n": place, **dict(zip(_INTENT_NAMES, (*attribution, *media), strict=True))}
        for place, (attribution, media) in enumerate(shared, 1)
    ]
    return [gateway_id, *_arrays(own), _encode(named).decode()]


def _arrays(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """Return the columns of *rows* as PostgreSQL writes arrays: ids, which need no quotes, and then whole numbers."""
    ids, *columns = zip(*rows, strict=True)
    # Numbers through the encoder of JSON, a tenth of what `str` takes: the two differ in their brackets alone.
    return [f"{{{','.join(ids)}}}", *[f"{{{_encode(column)[1:-1].decode()}}}" for column in columns]]
