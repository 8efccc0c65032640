"""Plans' unit prices from aap.toml into rows of `prices`, which alone calls are rated by.

Rows are never changed: another price in the file is another version, and one that the file no longer has is ended by a
version with the source `plan_end`. So each entry names what it was charged by, for good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import structlog
from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from core.ids import new_id
from metering.billing.plans import Plans
from metering.prices import NOTHING_PRICED, PLAN, PLAN_END, terms_of
from metering.rating import PriceTerms
from metering.tables import PriceRow

_LOCK: Final = 0x706C616E
_log = structlog.get_logger(__name__)

Wanted = Mapping[tuple[str, str], PriceTerms]
"""Plan and model → what organizations on that plan pay for it."""


class PlanPrices:
    """Keeps rows as the file of this process says. Whoever sees the file change writes, and nobody else does.

    A worker whose file is an older one, as during a release, does not put the old prices back unless it starts anew.
    """

    def __init__(self, database: Database, plans: Callable[[], Plans | None]) -> None:
        """*plans* returns None while the file cannot be read: nothing is ended then."""
        self._database = database
        self._plans = plans
        self._kept: Wanted | None = None

    async def keep(self) -> int:
        """Write down what the file says otherwise; return how many versions. Errors: those of `core.database.DOWN`."""
        plans = self._plans()
        wanted = None if plans is None else wanted_of(plans)
        if wanted is None or wanted == self._kept:
            return 0
        async with self._database.transaction() as session:
            count = await keep_prices(session, wanted)
        self._kept = wanted
        if count:
            _log.info("plan_prices.changed", versions=count)
        return count


def wanted_of(plans: Plans) -> Wanted:
    """Return the unit prices of all plans."""
    return {(plan.name, model): terms for plan in plans for model, terms in plan.prices.items()}


async def keep_prices(session: AsyncSession, wanted: Wanted) -> int:
    """Make *wanted* what plans' models cost from now on; return how many versions that takes. Idempotent."""
    await session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    present = await _present(session)
    rows = [_row(key, terms, PLAN) for key, terms in wanted.items() if present.get(key) != terms]
    rows += [_row(key, NOTHING_PRICED, PLAN_END) for key in present if key not in wanted]
    session.add_all(rows)
    return len(rows)


async def _present(session: AsyncSession) -> dict[tuple[str, str], PriceTerms]:
    """Return what holds by now, without what was ended."""
    row = PriceRow
    rows = await session.execute(
        select(row.plan, row.model, row.source, row.id, row.terms)
        .where(row.plan.is_not(None))
        .ext(distinct_on(row.plan, row.model))
        .order_by(row.plan, row.model, row.effective_from.desc(), row.id.desc())
    )
    return {
        (plan, model): terms_of(price_id, terms)
        for plan, model, source, price_id, terms in rows
        if plan is not None and source != PLAN_END
    }


def _row(key: tuple[str, str], terms: PriceTerms, source: str) -> PriceRow:
    plan, model = key
    return PriceRow(
        id=new_id("price"),
        plan=plan,
        model=model,
        source=source,
        terms=msgspec.to_builtins(terms),
        # Not now(): that is when the transaction began, before it waited for others.
        effective_from=func.clock_timestamp(),
    )
