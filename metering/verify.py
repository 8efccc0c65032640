"""Do the books agree: entries, windows, budgets, intents. Reads everything in one snapshot, and may run beside traffic.

What agrees by construction (it is written in one statement) is worked out here a second time, in other ways. Drift is a
bug, or somebody's hand in the database; it is printed, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from importlib.resources import files
from typing import Any, Final, cast

import msgspec
from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from metering.rating import PriceTerms, rate
from metering.usage import UNIT_NAMES, Units

_WINDOWS: Final = text(files("metering").joinpath("verify_windows.sql").read_text())
_BUDGETS: Final = text(files("metering").joinpath("verify_budgets.sql").read_text())
_INTENTS: Final = text(files("metering").joinpath("verify_intents.sql").read_text()).bindparams(
    bindparam("overdue", type_=INTERVAL)
)
_RATED: Final = text(files("metering").joinpath("verify_rated.sql").read_text())
_PRICES: Final = text("SELECT id, terms::text FROM prices WHERE id = ANY(:ids)")
_PAGE_ROWS: Final = 5_000
_ROWS_SHOWN_MAX: Final = 1_000
# A lost call is an entry within a minute of its gateway's death, if a worker runs.
_OVERDUE: Final = timedelta(minutes=2)


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """Two numbers that ought to be the same."""

    what: str
    """window | budget | intent | rating"""
    where: str
    expected: str
    found: str


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, and what did not agree; at most a thousand drifts of a kind are named."""

    entries: int
    windows: int
    budgets: int
    intents: int
    rated: int
    drifts: list[Drift]


async def verify(database: Database, *, rerate: bool = True) -> Verification:
    """Compare everything with everything. Errors: those of `core.database.DOWN`."""
    async with database.transaction() as session:
        await session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        drifts = [_window_drift(row) for row in await _rows(session, _WINDOWS)]
        drifts += [_budget_drift(row) for row in await _rows(session, _BUDGETS)]
        drifts += [_intent_drift(row) for row in await _rows(session, _INTENTS, overdue=_OVERDUE)]
        rated = 0
        if rerate:
            async for drift in _misrated(session):
                rated += 1
                if drift is not None and len(drifts) < 4 * _ROWS_SHOWN_MAX:
                    drifts.append(drift)
        return Verification(
            entries=await _count(session, "SELECT count(*) FROM ledger_entries"),
            windows=await _count(session, "SELECT count(*) FROM spend_windows"),
            budgets=await _count(session, "SELECT count(*) FROM budget_periods"),
            intents=await _count(session, "SELECT count(*) FROM usage_intents"),
            rated=rated,
            drifts=drifts,
        )


async def _rows(session: AsyncSession, statement: Any, **values: Any) -> list[Any]:
    return list((await session.execute(statement, {"rows_max": _ROWS_SHOWN_MAX, **values})).all())


async def _count(session: AsyncSession, statement: str) -> int:
    return cast("int", await session.scalar(text(statement)))


def _window_drift(row: Any) -> Drift:
    return Drift(
        what="window",
        where=f"{row.organization_id} {row.model} {row.operation} {row.starts_at.isoformat()} +{row.seconds} s",
        expected=f"{row.expected} (requests, unpriced, cost, charge, units; of the entries)",
        found=str(row.found),
    )


def _budget_drift(row: Any) -> Drift:
    return Drift(
        what="budget",
        where=f"{row.budget_id} {row.starts_at.isoformat()}",
        expected=f"{row.expected} nano-USD (of the windows)",
        found=str(row.found),
    )


def _intent_drift(row: Any) -> Drift:
    return Drift(
        what="intent",
        where=row.request_id,
        expected="no intent beside its entry"
        if row.is_entered
        else "an entry: its gateway is dead or has forgotten it",
        found=f"an intent of {row.gateway_id}, last seen {row.checkpoint_at.isoformat()}",
    )


async def _misrated(session: AsyncSession) -> AsyncIterator[Drift | None]:
    """Rate every entry once more by the prices that it names; yield None for each that comes out the same.

    What is adjusted later is rated as it was entered; adjustments are differences, and are not rated.
    """
    terms: dict[str, PriceTerms] = {}
    last = ""
    while True:
        page = await _rows(session, _RATED, last=last, page_rows=_PAGE_ROWS)
        wanted = {name for row in page for name in (row.price_id, row.charge_price_id)} - {None} - terms.keys()
        if wanted:
            for row in await session.execute(_PRICES, {"ids": list(wanted)}):
                terms[row[0]] = msgspec.json.decode(row[1], type=PriceTerms)
        for row in page:
            yield _rating_drift(row, terms)
        if len(page) < _PAGE_ROWS:
            return
        last = page[-1].request_id


def _rating_drift(row: Any, terms: dict[str, PriceTerms]) -> Drift | None:
    units = Units(**{name: getattr(row, name) for name in UNIT_NAMES})
    cost = _rated(units, terms.get(row.price_id or ""), row.service_tier)
    charge = _rated(units, terms.get(row.charge_price_id or ""), row.service_tier)
    expected = (cost or 0, charge or 0, cost is None or charge is None)
    found = (row.cost_nano_usd, row.charge_nano_usd, row.is_unpriced)
    if expected == found:
        return None
    return Drift(what="rating", where=row.request_id, expected=f"{expected} (cost, charge, unpriced)", found=str(found))


def _rated(units: Units, terms: PriceTerms | None, service_tier: str) -> int | None:
    if units == Units():
        return 0
    return None if terms is None else rate(units, terms, service_tier)
