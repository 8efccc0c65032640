"""Budgets: the most that an organization, project or key may be charged in a period.

What was spent is PostgreSQL's to say (`metering/budgets.py`). A hard budget is held in Redis too, in the same command
as the limits (`keys/caps.py`): a call is admitted only if the most that it can cost still fits, so that a healthy
Redis never lets it be overspent. A soft one refuses nothing; both tell when thresholds are crossed.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final, cast

import msgspec

from core.ids import OrganizationId
from core.money import NanoUsd
from keys.dimensions import BudgetPeriod, BudgetScope
from keys.tables import BudgetRow

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """A budget as it was set. *scope_id* is the organization's, project's or key's id."""

    id: str
    organization_id: OrganizationId
    scope: BudgetScope
    scope_id: str
    period: BudgetPeriod
    limit_nano_usd: NanoUsd
    is_hard: bool


def period_bounds(period: BudgetPeriod, moment: datetime) -> tuple[datetime, datetime]:
    """Return when the period around *moment* began and when it ends, in UTC; weeks begin on Mondays (ISO 8601)."""
    day = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "total":
        return _EPOCH, datetime.max.replace(tzinfo=UTC)
    if period == "day":
        return day, day + timedelta(days=1)
    if period == "week":
        monday = day - timedelta(days=day.weekday())
        return monday, monday + timedelta(days=7)
    month = day.replace(day=1)
    return month, month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)


def budget_of(row: BudgetRow) -> Budget:
    """Return what a row says."""
    return Budget(
        id=row.id,
        organization_id=OrganizationId(row.organization_id),
        scope=cast("BudgetScope", row.scope),
        scope_id=row.scope_id,
        period=cast("BudgetPeriod", row.period),
        limit_nano_usd=NanoUsd(row.limit_nano_usd),
        is_hard=row.is_hard,
    )
