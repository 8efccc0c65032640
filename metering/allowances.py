"""What was used of plans' allowances: PostgreSQL knows, by the sums of the month's hours and the calls that run.

There is no counter of its own. What a month's `spend_windows` hold is what was used, settled or corrected; a call that
runs is held from its intent. Redis is told as it is told of budgets (`metering/caps.py`), and put right as they are.

Workflow executions are not in the ledger: who reserves them (`Quota.reserve_one`) adds here where they are counted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from functools import reduce
from operator import add
from typing import Any, Final, cast

import msgspec
from sqlalchemy import ColumnElement, func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import Database
from core.ids import OrganizationId
from keys.allowances import (
    CHAT_OPERATIONS,
    NOTHING_COUNTED,
    UNITS,
    Allowance,
    AllowanceUnit,
    Counted,
    allowances_of,
    limit_of,
    month_of,
)
from keys.caps import Standing
from keys.plans import PlanLimits
from keys.tables import OrganizationRow
from metering.billing.plans import Plans
from metering.tables import AllowanceEventRow, LedgerEntryRow, SpendWindowRow, UsageIntentRow
from metering.usage import UNIT_NAMES
from webhooks.events import LimitThresholdReached
from webhooks.publish import publish

COUNTED_UNITS: Final[tuple[AllowanceUnit, ...]] = ("chat_requests", "tokens")
"""What the ledger can say of: for these Redis is told, put right and compared."""
THRESHOLDS_PERCENT: Final = (80, 100)
_TOKENS: Final = tuple(name for name in UNIT_NAMES if name.endswith("_tokens"))
_PAGE_ORGANIZATIONS: Final = 200


class AllowanceStanding(msgspec.Struct, frozen=True, kw_only=True):
    """What was used of one unit this month, and how much the plan includes. *limit* is None for what is unlimited."""

    unit: AllowanceUnit
    used: int
    limit: int | None
    renews_at: datetime


async def list_allowances(
    session: AsyncSession, limits: PlanLimits, now: datetime, *, organization_id: OrganizationId
) -> list[AllowanceStanding]:
    """Return what the organization has used of every unit in the present month: calls that have ended."""
    starts_at, renews_at = month_of(now)
    used = await used_of(session, [organization_id], starts_at)
    counted = used.get(organization_id, NOTHING_COUNTED)
    return [
        AllowanceStanding(
            unit=unit,
            used=counted.of(unit) if unit in COUNTED_UNITS else 0,
            limit=limit_of(limits, unit),
            renews_at=renews_at,
        )
        for unit in UNITS
    ]


async def used_of(
    session: AsyncSession, organization_ids: Sequence[OrganizationId], starts_at: datetime
) -> dict[OrganizationId, Counted]:
    """Return what each organization used in the month that began at *starts_at*; nothing where nothing was."""
    row = SpendWindowRow
    statement = (
        select(row.organization_id, *_sums(row))
        .where(row.organization_id.in_(organization_ids), row.seconds == 3600, *_within(row.starts_at, starts_at))
        .group_by(row.organization_id)
    )
    return {found[0]: _counted(found[1:]) for found in await session.execute(statement)}


async def ended(session: AsyncSession, request_ids: Any) -> dict[str, Counted]:
    """Return what those of the calls that are in the ledger count for. *request_ids* is what an id is compared with."""
    row = LedgerEntryRow
    statement = select(row.request_id, *_sums(row)).where(row.request_id == request_ids).group_by(row.request_id)
    return {found[0]: _counted(found[1:]) for found in await session.execute(statement)}


async def standing_of(session: AsyncSession, allowance: Allowance, starts_at: datetime) -> Standing:
    """Return what was used, and what each running call may still use. One statement: a call is in one of the two."""
    unit = allowance.unit
    if unit not in COUNTED_UNITS:
        return Standing(0, ())
    row, intent = SpendWindowRow, UsageIntentRow
    is_own = row.organization_id == allowance.organization_id, row.seconds == 3600
    used = select(_sum(row, unit)).where(*is_own, *_within(row.starts_at, starts_at)).scalar_subquery()
    is_held = [intent.organization_id == allowance.organization_id, *_within(intent.started_at, starts_at)]
    amount: ColumnElement[Any] = intent.prompt_tokens + intent.observed_output_tokens
    if unit == "chat_requests":
        is_held.append(intent.operation.in_(CHAT_OPERATIONS))
        amount = literal(1)
    held = select(func.array_agg(intent.request_id), func.array_agg(amount)).where(*is_held).subquery()
    found = (await session.execute(select(used, held))).one()
    return Standing(int(found[0] or 0), tuple(zip(found[1] or (), found[2] or (), strict=True)))


async def pages(database: Database) -> AsyncIterator[list[tuple[OrganizationId, str]]]:
    """Yield every organization that has a plan, and its name, a page at a time."""
    last = ""
    while True:
        async with database.transaction() as session:
            statement = (
                select(OrganizationRow.id, OrganizationRow.plan)
                .where(OrganizationRow.id > last, OrganizationRow.plan.is_not(None))
                .order_by(OrganizationRow.id)
                .limit(_PAGE_ORGANIZATIONS)
            )
            page = [(OrganizationId(row[0]), cast("str", row[1])) for row in await session.execute(statement)]
        if page:
            yield page
        if len(page) < _PAGE_ORGANIZATIONS:
            return
        last = page[-1][0]


async def note_thresholds(database: Database, plans: Plans, clock: Clock) -> int:
    """Write down which organizations' use has crossed a threshold of their plan this month; return how many were new.

    Errors: what PostgreSQL raises; the pages before that are done.
    """
    count = 0
    starts_at = month_of(clock.now())[0]
    async for page in pages(database):
        limited = [one for found, plan in page for one in allowances_of(plans.limits_of(plan), found)]
        limited = [one for one in limited if one.unit in COUNTED_UNITS and one.limit > 0]
        if not limited:
            continue
        async with database.transaction() as session:
            used = await used_of(session, sorted({one.organization_id for one in limited}), starts_at)
            events = [
                event
                for one in limited
                for event in _crossed(one, used.get(one.organization_id, NOTHING_COUNTED).of(one.unit), starts_at)
            ]
            count += await _note(session, events)
    return count


def _crossed(allowance: Allowance, used: int, starts_at: datetime) -> list[dict[str, Any]]:
    return [
        {
            "organization_id": allowance.organization_id,
            "unit": allowance.unit,
            "starts_at": starts_at,
            "threshold_percent": percent,
            "used": used,
            "limit": allowance.limit,
        }
        for percent in THRESHOLDS_PERCENT
        if used * 100 >= allowance.limit * percent
    ]


async def _note(session: AsyncSession, events: list[dict[str, Any]]) -> int:
    """Write thresholds down, and have the organizations' webhooks tell of those that are new; return how many."""
    if not events:
        return 0
    statement = insert(AllowanceEventRow).values(events).on_conflict_do_nothing()
    noted = (await session.scalars(statement.returning(AllowanceEventRow))).all()
    for row in noted:
        reached = LimitThresholdReached(
            unit=row.unit,
            threshold_percent=row.threshold_percent,
            used=row.used,
            limit=row.limit,
            period_start=int(row.starts_at.timestamp()),
            renews_at=int(month_of(row.starts_at)[1].timestamp()),
        )
        await publish(session, reached, organization_id=OrganizationId(row.organization_id))
    return len(noted)


def _sums(row: type[SpendWindowRow | LedgerEntryRow]) -> list[ColumnElement[Any]]:
    return [_sum(row, unit) for unit in COUNTED_UNITS]


def _sum(row: type[SpendWindowRow | LedgerEntryRow], unit: AllowanceUnit) -> ColumnElement[Any]:
    if unit == "tokens":
        return func.sum(reduce(add, (getattr(row, name) for name in _TOKENS)))
    return func.sum(row.requests).filter(row.operation.in_(CHAT_OPERATIONS))


def _counted(sums: Sequence[Any]) -> Counted:
    return Counted(*(int(value or 0) for value in sums))


def _within(column: Any, starts_at: datetime) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return column >= starts_at, column < month_of(starts_at)[1]
