"""Monthly recurring revenue: pure functions on what each organization paid a month at the ends of two days.

What comes and goes within a day is no movement: days are compared by their ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, date, datetime
from itertools import groupby
from typing import NamedTuple

import msgspec


class Change(NamedTuple):
    """A row of `subscription_changes`. Of two that took place together, the one with the later id holds."""

    organization_id: str
    subscription_id: str
    occurred_at: datetime
    id: str
    plan: str | None
    status: str
    mrr_cents: int


class Revenue(msgspec.Struct, frozen=True):
    """What an organization pays a month, over all its subscriptions."""

    mrr_cents: int
    plan: str | None
    """Of the subscription that most of it is for."""
    is_trialing: bool
    """Whether a subscription is on trial. Such an organization counts as one on trial while it pays nothing."""


class Movements(msgspec.Struct, frozen=True, kw_only=True):
    """What changed from one day's end to the next: in cents, and in how many organizations."""

    new_cents: int = 0
    new_organizations: int = 0
    reactivation_cents: int = 0
    reactivated_organizations: int = 0
    expansion_cents: int = 0
    expanded_organizations: int = 0
    contraction_cents: int = 0
    contracted_organizations: int = 0
    churn_cents: int = 0
    churned_organizations: int = 0

    @property
    def net_cents(self) -> int:
        """What they add up to."""
        gained = self.new_cents + self.reactivation_cents + self.expansion_cents
        return gained - self.contraction_cents - self.churn_cents


class RevenueUnbalanced(Exception):
    """Movements do not lead from one day's revenue to the next: a bug of ours. Nothing is stored."""


def revenue_of(last_changes: Iterable[Change]) -> dict[str, Revenue]:
    """Return the revenue by organization, from the last change of each subscription."""
    found: dict[str, list[Change]] = {}
    for change in last_changes:
        found.setdefault(change.organization_id, []).append(change)
    return {organization_id: _sum(changes) for organization_id, changes in found.items()}


def _sum(changes: list[Change]) -> Revenue:
    largest = max(changes, key=lambda change: (change.mrr_cents, change.occurred_at, change.id))
    return Revenue(
        sum(change.mrr_cents for change in changes),
        largest.plan,
        any(change.status == "trialing" for change in changes),
    )


def had_revenue(changes: Iterable[Change]) -> bool:
    """Tell whether one organization's *changes* left it with revenue at the end of any day."""
    by_subscription: dict[str, int] = {}
    in_order = sorted(changes, key=lambda change: (change.occurred_at, change.id))
    for _, of_day in groupby(in_order, key=_day):
        for change in of_day:
            by_subscription[change.subscription_id] = change.mrr_cents
        if sum(by_subscription.values()) > 0:
            return True
    return False


def _day(change: Change) -> date:
    return change.occurred_at.astimezone(UTC).date()


def newly_paying(before: Mapping[str, Revenue], after: Mapping[str, Revenue]) -> list[str]:
    """Return the organizations that pay, and paid nothing a day before."""
    return [key for key, revenue in after.items() if revenue.mrr_cents > 0 and not _cents(before, key)]


def movements_between(
    before: Mapping[str, Revenue], after: Mapping[str, Revenue], returning: Collection[str]
) -> Movements:
    """Return what led from one day's end to the next. *returning*: who of the newly paying had paid on an earlier day.

    Errors: RevenueUnbalanced.
    """
    counts = dict.fromkeys(Movements.__struct_fields__, 0)
    for key in before.keys() | after.keys():
        was, now = _cents(before, key), _cents(after, key)
        if was == now:
            continue
        cents, organizations = _names(was, now, is_returning=key in returning)
        counts[cents] += abs(now - was)
        counts[organizations] += 1
    found = Movements(**counts)
    require_balance(total_cents(before), total_cents(after), found)
    return found


def _names(was: int, now: int, *, is_returning: bool) -> tuple[str, str]:
    if was == 0:
        names = ("reactivation_cents", "reactivated_organizations"), ("new_cents", "new_organizations")
        return names[0] if is_returning else names[1]
    if now == 0:
        return "churn_cents", "churned_organizations"
    if now > was:
        return "expansion_cents", "expanded_organizations"
    return "contraction_cents", "contracted_organizations"


def require_balance(before_cents: int, after_cents: int, movements: Movements) -> None:
    """Return if MRR(t) = MRR(t-1) + new + reactivation + expansion - contraction - churn. Errors: RevenueUnbalanced."""
    if before_cents + movements.net_cents != after_cents:
        raise RevenueUnbalanced(f"{before_cents} + {movements.net_cents} cents are not {after_cents}")


def total_cents(revenue: Mapping[str, Revenue]) -> int:
    """Return the sum over all organizations."""
    return sum(one.mrr_cents for one in revenue.values())


def lost_since(month_ago: Mapping[str, Revenue], now: Mapping[str, Revenue]) -> tuple[int, int]:
    """Return how many of those who paid then pay nothing now, and how much less those who pay less pay, in cents."""
    then = {key: revenue.mrr_cents for key, revenue in month_ago.items() if revenue.mrr_cents > 0}
    organizations = sum(not _cents(now, key) for key in then)
    return organizations, sum(max(0, cents - _cents(now, key)) for key, cents in then.items())


def _cents(revenue: Mapping[str, Revenue], key: str) -> int:
    found = revenue.get(key)
    return 0 if found is None else found.mrr_cents
