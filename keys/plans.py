"""What a plan allows an organization, as far as calls are concerned. Prices are `metering/billing/plans.py`'s business.

Three words for three things: a rate limit renews by itself within minutes, a budget is money, an allowance is what a
plan includes in a month. None of the three stands in for another; all hold at once.
"""

from __future__ import annotations

from typing import Final

import msgspec

# Lua counts in doubles, exactly up to 2^53; what has room below it can be held for running calls besides.
PLAN_LIMIT_MAX: Final = 10**15


class PlanLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a plan includes. None is no limit, 0 is nothing at all. Months are calendar months in UTC."""

    chat_requests_per_month: int | None = None
    workflow_executions_per_month: int | None = None
    tokens_per_month: int | None = None
    storage_gigabytes: int | None = None
    concurrent_workflows: int | None = None
    agents: int | None = None


PLAN_LIMITS: Final[tuple[str, ...]] = PlanLimits.__struct_fields__


def no_plans(name: str) -> PlanLimits | None:
    """Return what the plan of that name includes where there are no plans."""
    del name
    return None
