"""What Stripe is told of: meters, and how the ledger's windows are counted in their units.

One meter bills: charged micro-USD, at a hundredth of a cent's hundredth each. Rating stays ours, so that no price of a
model is kept twice. Meters cannot be changed once they are made; another way of counting is another name.
"""

from __future__ import annotations

from typing import Final

import msgspec
from sqlalchemy import ColumnElement

from metering.tables import SpendWindowRow


class Meter(msgspec.Struct, frozen=True, kw_only=True):
    """A meter. *per_unit* is how much of the ledger's unit makes one of the meter's."""

    event_name: str
    title: str
    per_unit: int
    columns: tuple[str, ...]
    bills: bool = False

    def total(self) -> ColumnElement[int]:
        """Return what a window counts, in the ledger's unit."""
        first: ColumnElement[int]
        first, *rest = [getattr(SpendWindowRow, name) for name in self.columns]
        for column in rest:
            first = first + column
        return first


USAGE: Final = Meter(
    event_name="usage_micro_usd_v1",
    title="Usage in millionths of a US dollar",
    per_unit=1_000,
    columns=("charge_nano_usd",),
    bills=True,
)
USAGE_CENTS_PER_UNIT: Final = "0.0001"
"""The price of a micro-USD, in cents."""
TOKENS: Final = (
    Meter(
        event_name="input_tokens_v1",
        title="Input tokens",
        per_unit=1,
        columns=(
            *("input_tokens", "cached_input_tokens", "cache_write_tokens", "cache_write_1h_tokens"),
            *("input_audio_tokens", "input_image_tokens"),
        ),
    ),
    Meter(
        event_name="output_tokens_v1",
        title="Output tokens",
        per_unit=1,
        columns=("output_tokens", "reasoning_tokens", "output_audio_tokens", "output_image_tokens"),
    ),
)
METERS: Final = {meter.event_name: meter for meter in (USAGE, *TOKENS)}
VALUE_MAX: Final = 10**15 - 1
"""Stripe refuses more than 15 digits (2026-04-22.dahlia): it sums in doubles."""
