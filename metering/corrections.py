"""Later truth: what a gateway knows of a call that was given up for lost, entered as the difference.

An entry is never changed. A worker that took a gateway for dead has made estimates of its calls; when that gateway is
back (it was cut off, not dead) and settles them, what it knows stands beside the estimate as an adjustment.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any, Final

from metering.entries import LOST, SETTLE, Entry, Result, settle_arguments
from metering.usage import Units

Run = Callable[..., Awaitable[list[Any]]]
_ESTIMATES: Final = files("metering").joinpath("estimates.sql").read_text()


async def correct(run: Run, entries: Sequence[Entry]) -> int:
    """Enter how *entries*, some of which were there already, differ from estimates of the same calls; return how many.

    Idempotent: what was corrected once is not corrected again. Errors: those of *run*.
    """
    usage = {entry.request_id: entry for entry in entries if entry.result.kind == "usage"}
    rows = await run(_ESTIMATES, list(usage), LOST)
    found = [_difference(usage[row["request_id"]], row) for row in rows if not row["is_corrected"]]
    adjustments = [entry for entry in found if entry is not None]
    if adjustments:
        await run(SETTLE, *settle_arguments(adjustments))
    return len(adjustments)


def _difference(entry: Entry, estimated: Any) -> Entry | None:
    """Return what must be added to the estimate for *entry* to be true; None when it was right, or is our own."""
    if entry.result.outcome == LOST:
        return None
    units = Units(**{name: getattr(entry.units, name) - estimated[name] for name in Units.__struct_fields__})
    cost = entry.cost_nano_usd - estimated["cost_nano_usd"]
    charge = entry.charge_nano_usd - estimated["charge_nano_usd"]
    result = entry.result
    # An estimate counts as one request, whatever the provider said to it.
    requests = result.requests - 1
    if units == Units() and cost == charge == requests == 0 and not result.is_unpriced:
        return None
    return Entry(
        request_id=entry.request_id,
        attribution=entry.attribution,
        result=Result(
            kind="adjustment",
            seq=1,
            service_tier=result.service_tier,
            quality=result.quality,
            is_unpriced=result.is_unpriced,
            requests=requests,
            status=result.status,
            outcome=result.outcome,
            corrects_kind="usage",
            corrects_seq=0,
        ),
        units=units,
        cost_nano_usd=cost,
        charge_nano_usd=charge,
        started_ms=entry.started_ms,
        duration_ms=entry.duration_ms,
        first_byte_ms=entry.first_byte_ms,
    )
