"""What business metrics are read from: of all organizations, since they are the operator's."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple

from sqlalchemy import Select, func, select, true
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.ext.asyncio import AsyncSession

from keys.tables import OrganizationRow
from metering.billing.mrr import Change, Revenue, had_revenue, revenue_of
from metering.billing.tables import SubscriptionChangeRow
from metering.tables import SpendWindowRow

_HOUR_SECONDS = 3_600


class Activity(NamedTuple):
    """What all organizations used on a day, and how many of them used anything."""

    organizations: int
    usage_revenue_nano_usd: int
    cost_nano_usd: int
    daily: int
    weekly: int
    monthly: int


def start_of(day: date) -> datetime:
    """Return the first instant of *day*, in UTC. The end of a day is the start of the next, and not in it."""
    return datetime.combine(day, time(), UTC)


async def revenue_at(session: AsyncSession, moment: datetime) -> dict[str, Revenue]:
    """Return what each organization pays a month just before *moment*: the last changes of its subscriptions."""
    row = SubscriptionChangeRow
    subscription = (row.organization_id, row.subscription_id)
    statement = (
        _changes()
        .where(row.occurred_at < moment)
        .ext(distinct_on(*subscription))
        .order_by(*subscription, row.occurred_at.desc(), row.id.desc())
    )
    return revenue_of(Change(*found) for found in await session.execute(statement))


async def paid_before(session: AsyncSession, organization_ids: Collection[str], moment: datetime) -> set[str]:
    """Return which of the organizations had revenue at the end of any day before *moment*."""
    row = SubscriptionChangeRow
    statement = _changes().where(row.organization_id.in_(organization_ids), row.occurred_at < moment)
    changes: dict[str, list[Change]] = {}
    for found in await session.execute(statement):
        change = Change(*found)
        changes.setdefault(change.organization_id, []).append(change)
    return {key for key, history in changes.items() if had_revenue(history)}


async def activity_on(session: AsyncSession, day: date) -> Activity:
    """Return what was used on *day*, and who was active then, in the seven and in the thirty days up to it."""
    organization, row = OrganizationRow, SpendWindowRow
    begin, end = start_of(day), start_of(day + timedelta(days=1))
    today, this_week = row.starts_at >= begin, row.starts_at >= end - timedelta(days=7)
    # One stretch of the primary key for each organization: the table has every hour that there ever was.
    used = (
        select(
            func.sum(row.charge_nano_usd).filter(today).label("charge"),
            func.sum(row.cost_nano_usd).filter(today).label("cost"),
            func.sum(row.requests).filter(today).label("daily"),
            func.sum(row.requests).filter(this_week).label("weekly"),
            func.sum(row.requests).label("monthly"),
        )
        .where(
            row.organization_id == organization.id,
            row.seconds == _HOUR_SECONDS,
            row.starts_at >= end - timedelta(days=30),
            row.starts_at < end,
        )
        .lateral()
    )
    columns = used.c
    statement = (
        select(
            func.count().filter(organization.created_at < end),
            func.sum(columns.charge),
            func.sum(columns.cost),
            func.count().filter(columns.daily > 0),
            func.count().filter(columns.weekly > 0),
            func.count().filter(columns.monthly > 0),
        )
        .select_from(organization)
        .join(used, true())
    )
    return Activity(*(int(value or 0) for value in (await session.execute(statement)).one()))


def _changes() -> Select[str, str, datetime, str, str | None, str, int]:
    row = SubscriptionChangeRow
    return select(
        row.organization_id, row.subscription_id, row.occurred_at, row.id, row.plan, row.status, row.mrr_cents
    )
