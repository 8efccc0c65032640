"""Budgets: the most that an organization, project or key may be charged in a period.

What was spent is PostgreSQL's to say (`metering/budgets.py`). A hard budget is held in Redis too, in the same command
as the limits (`keys/quota.lua`): a call is admitted only if the most that it can cost still fits, so that a healthy
Redis never lets it be overspent. A soft one refuses nothing; both tell when thresholds are crossed.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Final, Protocol, cast

import msgspec

from core.ids import OrganizationId
from core.money import NanoUsd
from core.resp import Script, ScriptCall, ScriptShape
from keys.dimensions import BudgetPeriod, BudgetScope
from keys.tables import BudgetRow

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# A budget's state outlives its period for those calls that end after it.
_STATE_DAYS_MORE: Final = 2
_STATE_DAYS_MAX: Final = 40
SEED_SCRIPT: Final = Script(files("keys").joinpath("budget_seed.lua").read_text())


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """A budget as it was set. *scope_id* is the organization's, project's or key's id."""

    id: str
    organization_id: OrganizationId
    scope: BudgetScope
    scope_id: str
    period: BudgetPeriod
    limit_nano_usd: NanoUsd
    is_hard: bool


class Standing(msgspec.Struct, frozen=True):
    """What PostgreSQL knows of a budget: what was charged, and the most that each running call may still be."""

    spent_nano_usd: int
    held: tuple[tuple[str, int], ...]


class BudgetAuthority(Protocol):
    """Who knows what was spent."""

    async def standing(self, budget: Budget, starts_at: datetime) -> Standing:
        """Return what was spent in the period that began at *starts_at*. Errors: those of `core.database.DOWN`."""
        ...


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


def state_key(budget: Budget, starts_at: datetime) -> bytes:
    """Return where Redis holds what is spent and reserved of *budget* in the period that began at *starts_at*."""
    started = int(starts_at.timestamp())
    return b"q:{%b}:$:%b:%d" % (budget.organization_id.encode(), budget.id.encode(), started)


def seed_call(budget: Budget, starts_at: datetime, standing: Standing, now: datetime) -> ScriptCall:
    """Return the command that tells Redis what PostgreSQL knows. It changes nothing where Redis knows already."""
    ends_at = period_bounds(budget.period, now)[1] if budget.period != "total" else now + timedelta(days=365)
    kept = min(ends_at + timedelta(days=_STATE_DAYS_MORE), now + timedelta(days=_STATE_DAYS_MAX)) - now
    held = [b"%d" % part if isinstance(part, int) else part.encode() for pair in standing.held for part in pair]
    arguments = (b"%d" % (kept // timedelta(milliseconds=1)), b"%d" % standing.spent_nano_usd, *held)
    return ScriptCall(ScriptShape(SEED_SCRIPT, keys=(), fixed=()), (state_key(budget, starts_at),), arguments)


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
