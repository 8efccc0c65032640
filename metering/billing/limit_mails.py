"""Mails for thresholds: what crossed 80 or 100 % of a plan's allowance, or of an organization's budget, is told once.

The thresholds themselves are rows of others (`metering/allowances.py`, `metering/settle.sql`). What a project or a key
has spent of its budget is seen at `aap budgets`, and mailed to nobody.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, String, and_, cast, exists, func, literal, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from core.database import Database
from core.ids import OrganizationId
from core.money import NANO_USD_PER_CENT, usd_text
from keys.allowances import month_of
from keys.tables import BudgetRow
from metering.billing import emails
from metering.billing.mail_texts import AllowanceFacts, BudgetFacts
from metering.billing.tables import EmailRow
from metering.tables import AllowanceEventRow, BudgetEventRow

_THRESHOLDS_PERCENT: Final = (80, 100)
_FRESH: Final = timedelta(days=2)
"""Older thresholds are no news: nobody wants those from before mails were sent."""
_PAGE_EVENTS: Final = 500


async def note_limits(database: Database) -> int:
    """Write down a mail for each threshold that has none yet; return how many. Errors: those of DOWN."""
    count = 0
    for note in (_note_allowances, _note_budgets):
        while True:
            async with database.transaction() as session:
                noted = await note(session)
            count += noted
            if noted < _PAGE_EVENTS:
                break
    return count


async def _note_allowances(session: AsyncSession) -> int:
    # Both may be crossed by one call: only the higher one is news.
    event, higher = AllowanceEventRow, aliased(AllowanceEventRow)
    reason = _reason("allowance", event.unit, event.starts_at, event.threshold_percent)
    rows = await session.execute(
        select(event, reason.label("reason"))
        .outerjoin(EmailRow, _is_told(event.organization_id, reason))
        .where(
            event.threshold_percent.in_(_THRESHOLDS_PERCENT),
            _is_fresh(event.created_at),
            EmailRow.id.is_(None),
            ~exists().where(
                higher.organization_id == event.organization_id,
                higher.unit == event.unit,
                higher.starts_at == event.starts_at,
                higher.threshold_percent > event.threshold_percent,
            ),
        )
        .limit(_PAGE_EVENTS)
    )
    count = 0
    for row, key in rows:
        facts = AllowanceFacts(
            unit=row.unit,
            percent=row.threshold_percent,
            used=row.used,
            limit=row.limit,
            renews_at=month_of(row.starts_at)[1],
        )
        count += await _note(session, key, facts, organization_id=OrganizationId(row.organization_id))
    return count


async def _note_budgets(session: AsyncSession) -> int:
    event, higher, budget = BudgetEventRow, aliased(BudgetEventRow), BudgetRow
    reason = _reason("budget", event.budget_id, event.starts_at, event.threshold_percent)
    rows = await session.execute(
        select(event, budget.period, budget.is_hard, reason.label("reason"))
        .join(budget, and_(budget.id == event.budget_id, budget.scope == "organization"))
        .outerjoin(EmailRow, _is_told(event.organization_id, reason))
        .where(
            event.threshold_percent.in_(_THRESHOLDS_PERCENT),
            _is_fresh(event.created_at),
            EmailRow.id.is_(None),
            ~exists().where(
                higher.budget_id == event.budget_id,
                higher.starts_at == event.starts_at,
                higher.threshold_percent > event.threshold_percent,
            ),
        )
        .limit(_PAGE_EVENTS)
    )
    count = 0
    for row, period, is_hard, key in rows:
        facts = BudgetFacts(
            period=period,
            percent=row.threshold_percent,
            spent_usd=_whole_cents(row.spent_nano_usd, row.limit_nano_usd),
            limit_usd=usd_text(row.limit_nano_usd),
            is_hard=is_hard,
        )
        count += await _note(session, key, facts, organization_id=OrganizationId(row.organization_id))
    return count


async def _note(
    session: AsyncSession, reason: str, facts: AllowanceFacts | BudgetFacts, *, organization_id: OrganizationId
) -> bool:
    stored = msgspec.to_builtins(facts)
    return await emails.note(session, "limit_near", reason, stored, organization_id=organization_id)


def _whole_cents(spent_nano_usd: int, limit_nano_usd: int) -> str:
    """Return what was spent, in US dollars, without parts of a cent, unless the budget is less than that."""
    if limit_nano_usd >= NANO_USD_PER_CENT:
        spent_nano_usd -= spent_nano_usd % NANO_USD_PER_CENT
    return usd_text(spent_nano_usd)


def _reason(kind: str, name: ColumnElement[Any] | Any, starts_at: Any, percent: Any) -> ColumnElement[str]:
    """Return what makes a mail one: the same text for the same threshold in the same period."""
    began = func.to_char(func.timezone("UTC", starts_at), "YYYY-MM-DD")
    return func.concat_ws(":", literal(kind, String), name, began, cast(percent, String))


def _is_told(organization_id: Any, reason: ColumnElement[str]) -> ColumnElement[bool]:
    return and_(EmailRow.organization_id == organization_id, EmailRow.kind == "limit_near", EmailRow.reason == reason)


def _is_fresh(created_at: Any) -> ColumnElement[bool]:
    return created_at > func.now() - literal(_FRESH)
