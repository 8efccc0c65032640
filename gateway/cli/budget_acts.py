"""What `aap budgets` does."""

from __future__ import annotations

from datetime import datetime

import msgspec

from core.clock import SystemClock
from core.ids import OrganizationId
from core.money import NanoUsd, parse_usd, usd_text
from gateway.cli.common import fail
from gateway.cli.stores import Stores, chosen_organization, on_stores, owner_of
from keys.dimensions import BudgetPeriod, SettableScope
from keys.revocation import KeyChange, Propagation, announce
from metering import budgets
from metering.budgets import BudgetStanding


class BudgetRow(msgspec.Struct, frozen=True):
    """A budget as it is shown. *budget* is its own id, *id* that of its organization, project or key."""

    budget: str
    scope: str
    id: str
    period: str
    limit_usd: str
    spent_usd: str
    kind: str
    renewed_at: datetime | None


class Changed(BudgetRow, frozen=True):
    """A budget as it is after a change, and which gateways know of that."""

    propagation: Propagation


class EventRow(msgspec.Struct, frozen=True):
    """A threshold that was crossed. Whose budget it was, is not known once that is deleted."""

    created_at: datetime
    budget: str
    scope: str | None
    id: str | None
    period: str | None
    period_began: datetime
    threshold_percent: int
    spent_usd: str
    limit_usd: str


def list_all(org: str | None) -> list[BudgetRow]:
    """Return an organization's budgets."""

    async def act(stores: Stores) -> list[BudgetRow]:
        organization_id = await chosen_organization(stores, org)
        return [_shown(standing) for standing in await _standings(stores, organization_id)]

    return on_stores(act)


def change(
    scope: SettableScope, scope_id: str | None, period: BudgetPeriod, limit_usd: str, *, is_hard: bool, org: str | None
) -> Changed:
    """Make or change a budget, tell the gateways, and return it as it is then, and which of them know."""
    limit = _amount(limit_usd)

    async def act(stores: Stores) -> Changed:
        organization_id = await owner_of(stores, scope, scope_id, org)
        target = scope_id or organization_id
        async with stores.database.transaction() as session:
            sequence = await budgets.set_budget(
                session, (scope, target), period, limit=limit, is_hard=is_hard, organization_id=organization_id
            )
        change = KeyChange(sequence=sequence, organization_id=organization_id, key_id=None)
        propagation = await announce(stores.redis, change)
        row = next(
            _shown(one)
            for one in await _standings(stores, organization_id)
            if (one.budget.scope, one.budget.scope_id, one.budget.period) == (scope, target, period)
        )
        return Changed(**msgspec.structs.asdict(row), propagation=propagation)

    return on_stores(act)


def delete(scope: SettableScope, scope_id: str | None, period: BudgetPeriod, org: str | None) -> Propagation:
    """Delete a budget and tell the gateways; return which of them know."""

    async def act(stores: Stores) -> Propagation:
        organization_id = await owner_of(stores, scope, scope_id, org)
        async with stores.database.transaction() as session:
            sequence = await budgets.delete_budget(
                session, (scope, scope_id or organization_id), period, organization_id=organization_id
            )
        change = KeyChange(sequence=sequence, organization_id=organization_id, key_id=None)
        return await announce(stores.redis, change)

    return on_stores(act)


def events(org: str | None, limit: int) -> list[EventRow]:
    """Return the thresholds that were crossed, newest first."""

    async def act(stores: Stores) -> list[EventRow]:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            rows = await budgets.list_events(session, limit, organization_id=organization_id)
        return [
            EventRow(
                row.created_at,
                row.budget_id,
                row.scope,
                row.scope_id,
                row.period,
                row.starts_at,
                row.threshold_percent,
                usd_text(row.spent_nano_usd),
                usd_text(row.limit_nano_usd),
            )
            for row in rows
        ]

    return on_stores(act)


async def _standings(stores: Stores, organization_id: OrganizationId) -> list[BudgetStanding]:
    async with stores.database.transaction() as session:
        return await budgets.list_standings(session, SystemClock().now(), organization_id=organization_id)


def _amount(text: str) -> NanoUsd:
    try:
        return parse_usd(text.removeprefix("$"))
    except ValueError as error:
        fail(f"--limit: {error}")


def _shown(standing: BudgetStanding) -> BudgetRow:
    budget = standing.budget
    return BudgetRow(
        budget=budget.id,
        scope=budget.scope,
        id=budget.scope_id,
        period=budget.period,
        limit_usd=usd_text(budget.limit_nano_usd),
        spent_usd=usd_text(standing.spent_nano_usd),
        kind="hard" if budget.is_hard else "soft",
        renewed_at=standing.ends_at,
    )
