"""What was spent of budgets: PostgreSQL knows, and Redis is told.

Redis holds hard budgets so that a call is admitted in one command (`keys/quota.lua`). A call that has ended is charged
in PostgreSQL first, and in Redis when that is durable; until then the most that it could cost stays reserved. So what
Redis counts as spent is in PostgreSQL, and what is in PostgreSQL and not yet spent in Redis is reserved there. Whatever
breaks that (a Redis that forgot, a gateway that died, a correction) is put right by `reconcile`, which a worker runs
every few seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final, cast

import msgspec
from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId, new_id
from core.money import NanoUsd
from core.plain_sql import fetch
from keys.budgets import Budget, budget_of, period_bounds
from keys.caps import Standing
from keys.dimensions import BUDGET_LIMIT_MAX, BudgetPeriod, BudgetScope, LimitScope
from keys.errors import BudgetInvalid, TenantNotFound
from keys.lifecycle import record_change, require_scope_target
from keys.tables import BudgetRow
from metering.tables import BudgetEventRow, BudgetPeriodRow, SpendWindowRow, UsageIntentRow

_SCOPES: Final = {
    "organization": "organization_id",
    "project": "project_id",
    "key": "key_id",
    "credit": "organization_id",
}
_CHARGED: Final = """
SELECT budget_id, spent_nano_usd
FROM unnest($1::text[], $2::timestamptz[]) AS wanted (budget_id, starts_at)
JOIN budget_periods USING (budget_id, starts_at)
"""


class BudgetStanding(msgspec.Struct, frozen=True, kw_only=True):
    """A budget and what was charged against it in the present period."""

    budget: Budget
    spent_nano_usd: int
    starts_at: datetime
    ends_at: datetime | None


async def standing_of(session: AsyncSession, budget: Budget, starts_at: datetime) -> Standing:
    """Return what was charged in the period that began at *starts_at*, and what its running calls may still be.

    One statement: a call is in one of the two, whenever it ends.
    """
    scope = getattr(UsageIntentRow, _SCOPES[budget.scope])
    held = (
        select(func.array_agg(UsageIntentRow.request_id), func.array_agg(UsageIntentRow.reserved_nano_usd))
        .where(
            UsageIntentRow.organization_id == budget.organization_id,
            scope == budget.scope_id,
            UsageIntentRow.started_at >= starts_at,
        )
        .subquery()
    )
    spent = (
        select(BudgetPeriodRow.spent_nano_usd)
        .where(BudgetPeriodRow.budget_id == budget.id, BudgetPeriodRow.starts_at == starts_at)
        .scalar_subquery()
    )
    row = (await session.execute(select(spent, held))).one()
    return Standing(row[0] or 0, tuple(zip(row[1] or (), row[2] or (), strict=True)))


async def set_budget(
    session: AsyncSession,
    scope: tuple[BudgetScope, str],
    period: BudgetPeriod,
    *,
    limit: NanoUsd,
    is_hard: bool,
    organization_id: OrganizationId,
) -> int:
    """Make a budget, or change the one of the same scope and period; return the change's sequence.

    What was charged in the present period counts, also from before there was a budget: settlements wait for the moment
    that takes. Errors: TenantNotFound; BudgetInvalid for a limit that is none.
    """
    if not 0 <= limit <= BUDGET_LIMIT_MAX:
        raise BudgetInvalid
    target: LimitScope = "organization" if scope[0] == "credit" else scope[0]
    await require_scope_target(session, target, scope[1], organization_id=organization_id)
    await hold_settlements(session)
    row = await _row(session, scope, period, organization_id=organization_id)
    if row is None:
        row = BudgetRow(
            id=new_id("bdgt"), organization_id=organization_id, scope=scope[0], scope_id=scope[1], period=period
        )
        row.limit_nano_usd, row.is_hard = limit, is_hard
        session.add(row)
        await session.flush()
        await _count_past(session, budget_of(row))
    else:
        row.limit_nano_usd, row.is_hard = limit, is_hard
        await session.flush()
    return await record_change(session, None, organization_id=organization_id)


async def hold_settlements(session: AsyncSession) -> None:
    """Keep settlements out until this transaction has ended: none may fall between a sum and a budget made of it."""
    # Whoever holds it must not hold up all settlements for long, nor wait for it in front of them.
    await session.execute(text("SET LOCAL lock_timeout = '2s'"))
    await session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '5s'"))
    await session.execute(text("LOCK TABLE budget_periods IN SHARE ROW EXCLUSIVE MODE"))


async def _count_past(session: AsyncSession, budget: Budget) -> None:
    """Enter what was charged in the present period before there was a budget."""
    starts_at = period_bounds(budget.period, await _now(session))[0]
    scope = getattr(SpendWindowRow, _SCOPES[budget.scope])
    spent = await session.scalar(
        select(func.coalesce(func.sum(SpendWindowRow.charge_nano_usd), 0)).where(
            SpendWindowRow.organization_id == budget.organization_id,
            SpendWindowRow.seconds == 3600,
            SpendWindowRow.starts_at >= starts_at,
            scope == budget.scope_id,
        )
    )
    row = {"budget_id": budget.id, "starts_at": starts_at, "spent_nano_usd": int(spent or 0)}
    await session.execute(insert(BudgetPeriodRow).values(row))


async def _now(session: AsyncSession) -> datetime:
    # Not the transaction's: it may have waited for the lock into the next period.
    return cast("datetime", await session.scalar(select(func.clock_timestamp())))


async def delete_budget(
    session: AsyncSession, scope: tuple[BudgetScope, str], period: BudgetPeriod, *, organization_id: OrganizationId
) -> int:
    """Delete the budget of that scope and period; return the change's sequence. Errors: TenantNotFound."""
    row = await _row(session, scope, period, organization_id=organization_id)
    if row is None:
        raise TenantNotFound("budget")
    await session.delete(row)
    await session.flush()
    return await record_change(session, None, organization_id=organization_id)


async def _row(
    session: AsyncSession, scope: tuple[BudgetScope, str], period: BudgetPeriod, *, organization_id: OrganizationId
) -> BudgetRow | None:
    return await session.scalar(
        select(BudgetRow).where(
            BudgetRow.organization_id == organization_id,
            BudgetRow.scope == scope[0],
            BudgetRow.scope_id == scope[1],
            BudgetRow.period == period,
        )
    )


async def list_standings(
    session: AsyncSession, now: datetime, *, organization_id: OrganizationId
) -> list[BudgetStanding]:
    """Return the organization's budgets, oldest first, and what was charged against each in its present period."""
    own = select(BudgetRow).where(BudgetRow.organization_id == organization_id).order_by(BudgetRow.id)
    bounds = [(one, *period_bounds(one.period, now)) for one in map(budget_of, await session.scalars(own))]
    spent = await charged_in(session, {budget.id: starts_at for budget, starts_at, _ in bounds})
    return [
        BudgetStanding(
            budget=budget,
            spent_nano_usd=spent.get(budget.id, 0),
            starts_at=starts_at,
            ends_at=None if budget.period == "total" else ends_at,
        )
        for budget, starts_at, ends_at in bounds
    ]


class BudgetEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A threshold that spending has crossed in one period. Whose budget it is, is not known once that is deleted."""

    budget_id: str
    scope: str | None
    scope_id: str | None
    period: str | None
    starts_at: datetime
    threshold_percent: int
    spent_nano_usd: int
    limit_nano_usd: int
    created_at: datetime


async def list_events(session: AsyncSession, limit: int, *, organization_id: OrganizationId) -> list[BudgetEvent]:
    """Return the thresholds that the organization's spending has crossed, newest first."""
    rows = await session.execute(
        select(*BudgetEventRow.__table__.columns, BudgetRow.scope, BudgetRow.scope_id, BudgetRow.period)
        .outerjoin(BudgetRow, BudgetRow.id == BudgetEventRow.budget_id)
        .where(BudgetEventRow.organization_id == organization_id)
        .order_by(BudgetEventRow.created_at.desc(), BudgetEventRow.threshold_percent.desc())
        .limit(limit)
    )
    return [BudgetEvent(**{name: getattr(row, name) for name in BudgetEvent.__struct_fields__}) for row in rows]


async def charged_in(session: AsyncSession, starts: Mapping[str, datetime]) -> dict[str, int]:
    """Return what was charged of budgets, by id, in the periods that began then; nothing where nothing was."""
    rows = await fetch(session, _CHARGED, list(starts), list(starts.values()))
    return {row.budget_id: row.spent_nano_usd for row in rows}
