"""Calls whose gateway died: from the intents that it left, estimated entries. Run by every worker, again and again.

A gateway renews its lease every two seconds, in the statement that checkpoints its live calls. So an intent is an
orphan when its gateway's lease has run out, or when a living gateway has long ceased to mention it. What is found twice
is entered once; what turns out to have been known better is corrected (`metering/corrections.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any, Final

import msgspec
import structlog

from metering import partitions
from metering.entries import LOST, SETTLE, Attribution, Entry, Result, settle_arguments
from metering.prices import terms_of
from metering.rating import DEFAULT_TIER, PriceTerms, fitting, rate
from metering.usage import NO_UNITS, Media, Units, units_of_media

Run = Callable[..., Awaitable[list[Any]]]
"""Runs a statement with arguments, and returns its rows."""

_ORPHANS: Final = files("metering").joinpath("orphans.sql").read_text()
_PRICES: Final = "SELECT id, terms::text FROM prices WHERE id = ANY($1)"
_LEASES_FORGOTTEN: Final = "DELETE FROM gateway_leases WHERE seen_at < now() - interval '1 day'"
_ROWS_MAX: Final = 500
_log = structlog.get_logger(__name__)


async def sweep(run: Run, *, lease_seconds: float) -> int:
    """Enter an estimate for every orphan; return how many there were. Errors: those of *run*; nothing is half done."""
    count = 0
    while True:
        orphans = await run(_ORPHANS, lease_seconds, _ROWS_MAX)
        if not orphans:
            break
        terms = await _terms(run, orphans)
        entries = [_estimate(orphan, terms) for orphan in orphans]
        await partitions.make_for(run, [entry.request_id for entry in entries])
        await run(SETTLE, *settle_arguments(entries))
        count += len(entries)
        _log.warning("sweeper.calls_lost", count=len(entries), first=entries[0].request_id)
    await run(_LEASES_FORGOTTEN)
    return count


async def _terms(run: Run, orphans: Iterable[Mapping[str, Any]]) -> dict[str, PriceTerms]:
    ids = {orphan[name] for orphan in orphans for name in ("price_id", "charge_price_id")} - {None}
    return {row["id"]: terms_of(row["id"], msgspec.json.decode(row["terms"])) for row in await run(_PRICES, list(ids))}


def _estimate(orphan: Mapping[str, Any], terms: Mapping[str, PriceTerms]) -> Entry:
    """Return what is known of a lost call: what went in as it was estimated, its output as it was last seen.

    Of pictures and sound what was asked for, unless the price knows only tokens.
    """
    text = Units(input_tokens=orphan["prompt_tokens"], output_tokens=orphan["observed_output_tokens"])
    media = units_of_media(Media(orphan["images"], orphan["audio_seconds"]))
    prices = [terms.get(orphan[name] or "") for name in ("price_id", "charge_price_id")]
    known = [units for units in (media, text) if units != NO_UNITS] or [NO_UNITS]
    units = fitting(known, prices, DEFAULT_TIER)
    cost, charge = (rate(units, price, DEFAULT_TIER) for price in prices)
    return Entry(
        request_id=orphan["request_id"],
        attribution=Attribution(*(orphan[name] for name in Attribution._fields)),
        result=Result(
            kind="usage",
            seq=0,
            service_tier=DEFAULT_TIER,
            quality="estimated",
            is_unpriced=cost is None or charge is None,
            requests=1,
            status=0,
            outcome=LOST,
        ),
        units=units,
        cost_nano_usd=cost or 0,
        charge_nano_usd=charge or 0,
        started_ms=orphan["started_ms"],
        duration_ms=orphan["duration_ms"],
    )
