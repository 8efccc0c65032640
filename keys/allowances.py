"""Allowances: how much of something an organization's plan includes in a month.

What was used is PostgreSQL's to say (`metering/allowances.py`). Redis holds it as it holds hard budgets, in the same
command as the limits (`keys/quota.lua`): a call is admitted only if it fits into all of them. Other than budgets,
allowances are not money: where a store is down, calls go on, bounded by the rate limits, and are counted afterwards.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal, NamedTuple, get_args

import msgspec

from core.ids import OrganizationId
from keys.budgets import period_bounds
from keys.dimensions import BudgetPeriod
from keys.plans import PlanLimits

AllowanceUnit = Literal["chat_requests", "tokens", "workflow_executions"]
UNITS: Final[tuple[AllowanceUnit, ...]] = get_args(AllowanceUnit)
# What counts as a chat request: `inference.endpoints.Endpoint.operation`, and so `spend_windows.operation`.
CHAT_OPERATIONS: Final = ("chat", "text_completion", "responses")


class Allowance(msgspec.Struct, frozen=True):
    """What an organization may use of *unit* in a calendar month, in UTC."""

    organization_id: OrganizationId
    unit: AllowanceUnit
    limit: int

    @property
    def id(self) -> str:
        """What its state is called in Redis, whatever the plan: another plan goes on with what was used."""
        return f"allow_{self.unit}"

    @property
    def period(self) -> BudgetPeriod:
        """When it is renewed."""
        return "month"


class Counted(NamedTuple):
    """What a call that has ended takes of allowances: what the ledger says of it."""

    requests: int = 0
    tokens: int = 0

    def of(self, unit: AllowanceUnit) -> int:
        """Return what that is in *unit*. One call is one execution, where it is any."""
        return self.tokens if unit == "tokens" else self.requests


NOTHING_COUNTED: Final = Counted()


def allowances_of(limits: PlanLimits | None, organization_id: OrganizationId) -> tuple[Allowance, ...]:
    """Return those limits of a plan that a call may meet: nothing for what is unlimited."""
    if limits is None:
        return ()
    return tuple(
        Allowance(organization_id, unit, limit) for unit in UNITS if (limit := limit_of(limits, unit)) is not None
    )


def limit_of(limits: PlanLimits, unit: AllowanceUnit) -> int | None:
    """Return how much of *unit* a plan includes in a month; None without a limit."""
    return getattr(limits, f"{unit}_per_month")


def month_of(moment: datetime) -> tuple[datetime, datetime]:
    """Return when the month around *moment* began and when it ends, in UTC."""
    return period_bounds("month", moment)
