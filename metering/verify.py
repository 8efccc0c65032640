"""Do the books agree: entries, windows, budgets, intents. Reads everything in one snapshot, and may run beside traffic.

What agrees by construction (it is written in one statement) is worked out here a second time, in other ways. Drift is a
bug, or somebody's hand in the database; it is printed, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from importlib.resources import files
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from core.plain_sql import fetch
from metering.prices import Price, get_prices_by_id
from metering.rating import rate
from metering.usage import NO_UNITS, UNIT_NAMES, Units
from metering.worker import MINUTES_KEPT

_WINDOWS: Final = files("metering").joinpath("verify_windows.sql").read_text()
_BUDGETS: Final = files("metering").joinpath("verify_budgets.sql").read_text()
_INTENTS: Final = files("metering").joinpath("verify_intents.sql").read_text()
_RATED: Final = files("metering").joinpath("verify_rated.sql").read_text()
_COUNTS: Final = """
SELECT (SELECT count(*) FROM ledger_entries), (SELECT count(*) FROM spend_windows),
  (SELECT count(*) FROM budget_periods), (SELECT count(*) FROM usage_intents)
"""
_PAGE_ROWS: Final = 5_000
_NAMED_MAX: Final = 1_000
# Younger than what a worker forgets, whenever it does: these must all be there.
_MINUTES_CHECKED: Final = MINUTES_KEPT - timedelta(days=1)
# A lost call is an entry within a minute of its gateway's death, if a worker runs.
_OVERDUE: Final = timedelta(minutes=2)


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """Two things that ought to be the same."""

    what: Literal["window", "budget", "intent", "rating"]
    where: str
    expected: str
    found: str


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, and what did not agree; at most a thousand drifts of a kind are named."""

    entries: int
    windows: int
    budgets: int
    """Periods of budgets."""
    intents: int
    rated: int
    """Entries that were rated once more."""
    drifts: list[Drift]


async def verify(database: Database, *, rerate: bool = True, overdue: timedelta = _OVERDUE) -> Verification:
    """Compare everything with everything; without *rerate* all but what rating can say.

    An intent is *overdue* when its call has not been heard of for so long. Errors: those of `core.database.DOWN`.
    """
    async with database.transaction() as session:
        await session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        [(entries, windows, budgets, intents)] = await fetch(session, _COUNTS)
        drifts = [_window_drift(row) for row in await fetch(session, _WINDOWS, _NAMED_MAX, _MINUTES_CHECKED)]
        drifts += [_budget_drift(row) for row in await fetch(session, _BUDGETS, _NAMED_MAX)]
        drifts += [_intent_drift(row) for row in await fetch(session, _INTENTS, _NAMED_MAX, overdue)]
        rated, misrated = await _rate_again(session) if rerate else (0, [])
    return Verification(
        entries=entries,
        windows=windows,
        budgets=budgets,
        intents=intents,
        rated=rated,
        drifts=drifts + misrated,
    )


def _window_drift(row: Any) -> Drift:
    place = (row.organization_id, row.project_id, row.key_id, row.model, row.operation, row.service_tier)
    return Drift(
        what="window",
        where=f"{' '.join(place)} {row.starts_at.isoformat()} +{row.seconds} s",
        expected=_numbers(row.expected, "no entries"),
        found=_numbers(row.found, "no window"),
    )


def _numbers(values: list[int] | None, nothing: str) -> str:
    """Return the numbers of a window by name, without those that are 0."""
    if values is None:
        return nothing
    names = ("requests", "unpriced_requests", "cost_nano_usd", "charge_nano_usd", *UNIT_NAMES)
    return " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True) if value) or "all 0"


def _budget_drift(row: Any) -> Drift:
    return Drift(
        what="budget",
        where=f"{row.budget_id} {row.starts_at.isoformat()}",
        expected=f"spent_nano_usd={row.expected}",
        found=f"spent_nano_usd={row.found}",
    )


def _intent_drift(row: Any) -> Drift:
    expected = "no intent beside its entry" if row.is_entered else "an entry: its gateway is dead or has forgotten it"
    found = f"an intent of {row.gateway_id}, last seen {row.checkpoint_at.isoformat()}"
    return Drift(what="intent", where=row.request_id, expected=expected, found=found)


async def _rate_again(session: AsyncSession) -> tuple[int, list[Drift]]:
    """Rate every entry of usage once more by the prices that it names; return how many, and those that differ.

    What was corrected is rated as it was entered; corrections are differences, and are not rated.
    """
    prices: dict[str, Price] = {}
    count, drifts = 0, list[Drift]()
    async for page in _pages(session):
        named = {name for row in page for name in (row.price_id, row.charge_price_id) if name is not None}
        prices.update(await get_prices_by_id(session, named - prices.keys()))
        count += len(page)
        found = [drift for row in page if (drift := _rating_drift(row, prices)) is not None]
        drifts += found[: _NAMED_MAX - len(drifts)]
    return count, drifts


async def _pages(session: AsyncSession) -> AsyncIterator[list[Any]]:
    last = ""
    while page := await fetch(session, _RATED, last, _PAGE_ROWS):
        yield page
        last = page[-1].request_id


def _rating_drift(row: Any, prices: dict[str, Price]) -> Drift | None:
    units = Units(**{name: getattr(row, name) for name in UNIT_NAMES})
    cost = _rated(units, prices.get(row.price_id or ""), row.service_tier)
    charge = _rated(units, prices.get(row.charge_price_id or ""), row.service_tier)
    expected = (cost or 0, charge or 0, cost is None or charge is None)
    found = (row.cost_nano_usd, row.charge_nano_usd, row.is_unpriced)
    # Where nothing was used, that nothing was priced is not told everywhere, and makes no difference.
    if expected == found or (units == NO_UNITS and expected[:2] == found[:2]):
        return None
    return Drift(what="rating", where=row.request_id, expected=_rating(*expected), found=_rating(*found))


def _rating(cost: int, charge: int, is_unpriced: bool) -> str:  # noqa: FBT001 - as the columns of an entry
    return f"cost_nano_usd={cost} charge_nano_usd={charge} {'unpriced' if is_unpriced else 'priced'}"


def _rated(units: Units, price: Price | None, service_tier: str) -> int | None:
    """Return what *units* cost. None: unpriced, or such as nobody can have used."""
    try:
        return rate(units, None if price is None else price.terms, service_tier)
    except ValueError:
        return None
