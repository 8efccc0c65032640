"""Prices from lists into rows: what would change, and the writing of it. Nothing is ever overwritten.

A model that a list no longer has keeps its last price: calls go on, and must go on being priced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import insert, select, text
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import new_id
from metering.prices import MANUAL, terms_of
from metering.rating import DEFAULT_TIER, PriceTerms, Rates, Step, effective_rates, rate_of
from metering.tables import PriceRow
from metering.usage import UNIT_NAMES

# What the built-in model is shown to cost, so that a fresh installation has amounts to show: those of a small model.
# Nobody is billed for it.
_DEMO_RATES: Final = Rates(input_tokens=150_000_000, cached_input_tokens=75_000_000, output_tokens=600_000_000)
BUILTIN_PRICES: Final[Mapping[str, PriceTerms]] = {
    "demo/demo": PriceTerms(tiers={DEFAULT_TIER: (Step(rates=_DEMO_RATES),)})
}
_BUILTIN: Final = "builtin"
_LITELLM: Final = "litellm"
_LOCK: Final = 0x7072696365
_BATCH_ROWS: Final = 1_000


class PriceChange(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose price in a list is not the one that was imported last.

    *largest_change_percent* is of what one unit cost, rounded up; 100 where that was nothing, or is no longer priced.
    """

    model: str
    kind: Literal["new", "changed"]
    old: PriceTerms | None
    new: PriceTerms
    largest_change_percent: int | None


async def diff(session: AsyncSession, wanted: Mapping[str, PriceTerms]) -> list[PriceChange]:
    """Return what importing *wanted* would add, by model."""
    present = await _imported(session)
    return [
        _change(model, present.get(model), wanted[model])
        for model in sorted(wanted)
        if present.get(model) != wanted[model]
    ]


async def vanished(session: AsyncSession, wanted: Collection[str]) -> list[str]:
    """Return the models that were imported once and are not in *wanted*. They keep their last price."""
    return sorted((await _imported(session)).keys() - wanted - BUILTIN_PRICES.keys())


async def import_prices(session: AsyncSession, changes: Sequence[PriceChange], digest: str) -> int:
    """Add the new price of each change, in force from now; return how many were added.

    *digest* is the list's SHA-256. Idempotent, also when two import at once: what stands there already is not added.
    """
    await session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    present = await _imported(session)
    rows = [_row(change, digest) for change in changes if present.get(change.model) != change.new]
    for start in range(0, len(rows), _BATCH_ROWS):
        await session.execute(insert(PriceRow), rows[start : start + _BATCH_ROWS])
    return len(rows)


async def _imported(session: AsyncSession) -> dict[str, PriceTerms]:
    """Return the newest imported price of each model."""
    rows = await session.execute(
        select(PriceRow.model, PriceRow.id, PriceRow.terms)
        .where(PriceRow.source != MANUAL, PriceRow.organization_id.is_(None), PriceRow.plan.is_(None))
        .ext(distinct_on(PriceRow.model))
        .order_by(PriceRow.model, PriceRow.effective_from.desc(), PriceRow.id.desc())
    )
    return {model: terms_of(price_id, terms) for model, price_id, terms in rows}


def _row(change: PriceChange, digest: str) -> dict[str, Any]:
    is_builtin = change.model in BUILTIN_PRICES
    return {
        "id": new_id("price"),
        "model": change.model,
        "source": _BUILTIN if is_builtin else _LITELLM,
        "source_digest": None if is_builtin else digest,
        "terms": msgspec.to_builtins(change.new),
    }


def _change(model: str, old: PriceTerms | None, new: PriceTerms) -> PriceChange:
    return PriceChange(
        model=model,
        kind="new" if old is None else "changed",
        old=old,
        new=new,
        largest_change_percent=None if old is None else max(_changes_percent(old, new), default=0),
    )


def _changes_percent(old: PriceTerms, new: PriceTerms) -> Iterator[int]:
    """Yield by how much each unit's price changes, in every tier, for a prompt just above every bound of either."""
    for tier in old.tiers.keys() | new.tiers.keys():
        steps = [step for terms in (old, new) for step in terms.tiers.get(tier, terms.tiers[DEFAULT_TIER])]
        for bound in {step.above_input_tokens for step in steps}:
            before, after = (effective_rates(terms, tier, bound + 1) for terms in (old, new))
            for unit in UNIT_NAMES:
                paid, due = rate_of(before, unit), rate_of(after, unit)
                if paid is not None and paid != due:
                    yield 100 if not paid or due is None else -(-abs(due - paid) * 100 // paid)
