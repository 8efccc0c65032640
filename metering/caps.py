"""Budgets and allowances alike: what PostgreSQL knows of them, for Redis to be told and to be put right by."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from keys.allowances import NOTHING_COUNTED, Allowance, Counted
from keys.budgets import Budget, budget_of, period_bounds
from keys.caps import Cap, Standing, state_key
from keys.tables import BudgetRow
from metering import allowances, budgets

_PAGE_BUDGETS: Final = 200
Pages = Callable[[Database], AsyncIterator[list[Cap]]]


class SpentCaps:
    """Tells gateways what PostgreSQL knows: `keys.caps.CapAuthority`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def standing(self, cap: Cap, starts_at: datetime) -> Standing:
        """Return what was used in the period that began at *starts_at*, and what its running calls may still use.

        One statement: a call is in one of the two, whenever it ends. Errors: those of `core.database.DOWN`.
        """
        async with self._database.transaction() as session:
            if isinstance(cap, Allowance):
                return await allowances.standing_of(session, cap, starts_at)
            return await budgets.standing_of(session, cap, starts_at)


class CapPeriod(NamedTuple):
    """A cap in one of its periods. *key* is where Redis holds it."""

    cap: Cap
    starts_at: datetime
    key: bytes

    @classmethod
    def around(cls, cap: Cap, moment: datetime) -> CapPeriod:
        """Return the cap's period around *moment*."""
        starts_at = period_bounds(cap.period, moment)[0]
        return cls(cap, starts_at, state_key(cap, starts_at))


def amount(cap: Cap, nano_usd: int, counted: Counted) -> int:
    """Return what a call takes of *cap*."""
    return counted.of(cap.unit) if isinstance(cap, Allowance) else nano_usd


async def spent_in(session: AsyncSession, periods: Sequence[CapPeriod]) -> dict[bytes, int]:
    """Return what was used of caps in these periods, by their keys; nothing where nothing was."""
    starts = {one.cap.id: one.starts_at for one in periods if isinstance(one.cap, Budget)}
    charged = await budgets.charged_in(session, starts) if starts else {}
    found = {one.key: charged[one.cap.id] for one in periods if one.cap.id in charged}
    months: dict[datetime, list[tuple[bytes, Allowance]]] = {}
    for one in periods:
        if isinstance(one.cap, Allowance):
            months.setdefault(one.starts_at, []).append((one.key, one.cap))
    for starts_at, allowed in months.items():
        owners = sorted({allowance.organization_id for _, allowance in allowed})
        used = await allowances.used_of(session, owners, starts_at)
        for key, allowance in allowed:
            found[key] = used.get(allowance.organization_id, NOTHING_COUNTED).of(allowance.unit)
    return found


async def budget_pages(database: Database) -> AsyncIterator[list[Cap]]:
    """Yield every budget, a page at a time: nothing is held open while Redis is asked."""
    last = ""
    while True:
        async with database.transaction() as session:
            statement = select(BudgetRow).where(BudgetRow.id > last).order_by(BudgetRow.id)
            page = [budget_of(row) for row in await session.scalars(statement.limit(_PAGE_BUDGETS))]
        if page:
            yield list(page)
        if len(page) < _PAGE_BUDGETS:
            return
        last = page[-1].id


async def allowance_pages(database: Database) -> AsyncIterator[list[Cap]]:
    """Yield each unit of every organization that has a plan, a page at a time.

    Also what its plan does not limit: it may have done so a moment ago, and may again.
    """
    async for owners in allowances.pages(database):
        yield [Allowance(owner, unit, 0) for owner, _ in owners for unit in allowances.COUNTED_UNITS]
