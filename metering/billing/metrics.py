"""Business metrics by day: recurring revenue and its movements, churn, who is active, what usage brought and cost.

Everything comes from our own events, and from nothing that is overwritten: a day that is over can be computed again at
any time, with the same result unless an event of that day or an earlier one was booked since. PostgreSQL down: nothing
is stored, and the next round does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import msgspec
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import Database
from core.errors import Conflict, Invalid
from metering.billing.metric_queries import activity_on, paid_before, revenue_at, start_of
from metering.billing.metrics_tables import DailyMetricsRow, MrrSnapshotRow
from metering.billing.mrr import Revenue, lost_since, movements_between, newly_paying, total_cents
from metering.billing.tables import SubscriptionChangeRow

DAYS_KEPT_RIGHT: Final = 35
"""So far back a worker finds days that are missing, or that a later booking made wrong."""
_MONTH: Final = timedelta(days=30)
_DAY: Final = timedelta(days=1)
_SETTLED_AFTER: Final = timedelta(hours=1)
"""A call belongs to the day on which it began, and is in the ledger once it has ended."""
_BOOKING_SECONDS: Final = timedelta(minutes=10)
"""What was booked while a day was computed may have become visible later."""
_INSERTED_AT_ONCE: Final = 2_000


class MetricsBusy(Conflict):
    """Another process computes metrics just now."""

    code = "metrics_busy"

    def __init__(self) -> None:
        super().__init__("Metrics are being computed just now. Please try again.")


class DayNotOver(Invalid):
    """A day that is not over has no metrics yet."""

    code = "day_not_over"

    def __init__(self, day: date) -> None:
        super().__init__(f"{day} is not over yet, in UTC.")


class DailyMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """A day's metrics. None: there is nothing to divide by. Shares are in basis points, hundredths of a percent."""

    day: date
    organizations: int
    paying_organizations: int
    trialing_organizations: int
    mrr_cents: int
    new_cents: int
    new_organizations: int
    reactivation_cents: int
    reactivated_organizations: int
    expansion_cents: int
    expanded_organizations: int
    contraction_cents: int
    contracted_organizations: int
    churn_cents: int
    churned_organizations: int
    month_ago_organizations: int
    month_ago_cents: int
    lost_organizations: int
    lost_cents: int
    customer_churn_basis_points: int | None
    revenue_churn_basis_points: int | None
    arpu_cents: int | None
    clv_cents: int | None
    daily_active_organizations: int
    weekly_active_organizations: int
    monthly_active_organizations: int
    usage_revenue_nano_usd: int
    cost_nano_usd: int
    gross_margin_nano_usd: int
    gross_margin_basis_points: int | None
    computed_at: datetime


async def list_metrics(session: AsyncSession, first: date, last: date) -> list[DailyMetrics]:
    """Return the days from *first* to *last*, both included, that have been computed."""
    row = DailyMetricsRow
    rows = await session.scalars(select(row).where(row.day >= first, row.day <= last).order_by(row.day))
    return [metrics_of(found) for found in rows]


def metrics_of(row: DailyMetricsRow) -> DailyMetrics:
    """Return a stored day with what follows from it."""
    stored: dict[str, Any] = {column.name: getattr(row, column.name) for column in DailyMetricsRow.__table__.columns}
    revenue, cost = row.usage_revenue_nano_usd, row.cost_nano_usd
    return DailyMetrics(
        **stored,
        customer_churn_basis_points=_rounded(row.lost_organizations * 10_000, row.month_ago_organizations),
        revenue_churn_basis_points=_rounded(row.lost_cents * 10_000, row.month_ago_cents),
        arpu_cents=_rounded(row.mrr_cents, row.paying_organizations),
        # ARPU / churn rate, rounded once.
        clv_cents=_rounded(
            row.mrr_cents * row.month_ago_organizations, row.paying_organizations * row.lost_organizations
        ),
        gross_margin_nano_usd=revenue - cost,
        gross_margin_basis_points=_rounded((revenue - cost) * 10_000, revenue),
    )


def _rounded(numerator: int, denominator: int) -> int | None:
    """Return the quotient as the nearest whole number, halves up; None for one by nothing."""
    return None if denominator <= 0 else (2 * numerator + denominator) // (2 * denominator)


async def compute(database: Database, clock: Clock, first: date, last: date) -> int:
    """Compute the days from *first* to *last*, both included, and all later ones that are stored; return how many.

    Later ones begin where these end, and are made to fit. All or nothing is stored. Errors: DayNotOver; MetricsBusy;
    RevenueUnbalanced; those of `core.database.DOWN`.
    """
    if last >= clock.now().astimezone(UTC).date():
        raise DayNotOver(last)
    async with database.transaction() as session:
        # All days see the same events, so that each begins where the one before it ends.
        await session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        if not await session.scalar(text("SELECT pg_try_advisory_xact_lock(hashtext('daily_metrics'))")):
            raise MetricsBusy
        last = max(last, await session.scalar(select(func.max(DailyMetricsRow.day))) or last)
        before = await revenue_at(session, start_of(first))
        days = (last - first) // _DAY + 1
        for number in range(days):
            before = await _compute_day(session, first + number * _DAY, before)
    return max(days, 0)


async def _compute_day(session: AsyncSession, day: date, before: Mapping[str, Revenue]) -> dict[str, Revenue]:
    """Compute and store one day; return what everybody pays at its end."""
    after = await revenue_at(session, start_of(day + _DAY))
    month_ago = await revenue_at(session, start_of(day + _DAY - _MONTH))
    returning = await paid_before(session, newly_paying(before, after), start_of(day))
    movements = movements_between(before, after, returning)
    activity = await activity_on(session, day)
    lost_organizations, lost_cents = lost_since(month_ago, after)
    values: dict[str, Any] = {
        **msgspec.structs.asdict(movements),
        "day": day,
        "organizations": activity.organizations,
        "paying_organizations": _paying(after),
        "trialing_organizations": sum(one.is_trialing and not one.mrr_cents for one in after.values()),
        "mrr_cents": total_cents(after),
        "month_ago_organizations": _paying(month_ago),
        "month_ago_cents": total_cents(month_ago),
        "lost_organizations": lost_organizations,
        "lost_cents": lost_cents,
        "daily_active_organizations": activity.daily,
        "weekly_active_organizations": activity.weekly,
        "monthly_active_organizations": activity.monthly,
        "usage_revenue_nano_usd": activity.usage_revenue_nano_usd,
        "cost_nano_usd": activity.cost_nano_usd,
        "computed_at": func.now(),
    }
    await session.execute(
        upsert(DailyMetricsRow).values(values).on_conflict_do_update(index_elements=[DailyMetricsRow.day], set_=values)
    )
    await _keep_snapshot(session, day, after)
    return after


def _paying(revenue: Mapping[str, Revenue]) -> int:
    return sum(one.mrr_cents > 0 for one in revenue.values())


async def _keep_snapshot(session: AsyncSession, day: date, revenue: Mapping[str, Revenue]) -> None:
    await session.execute(delete(MrrSnapshotRow).where(MrrSnapshotRow.day == day))
    rows = [
        {"day": day, "organization_id": key, "mrr_cents": one.mrr_cents, "plan": one.plan}
        for key, one in revenue.items()
        if one.mrr_cents > 0
    ]
    for start in range(0, len(rows), _INSERTED_AT_ONCE):
        await session.execute(insert(MrrSnapshotRow), rows[start : start + _INSERTED_AT_ONCE])


async def first_due(session: AsyncSession, now: datetime) -> date | None:
    """Return the earliest of the last days that is missing, or that a later booking made wrong; None if all stand.

    Yesterday is due an hour after its end, when all but the longest calls have ended that began in it.
    """
    newest = newest_due(now)
    oldest = newest - (DAYS_KEPT_RIGHT - 1) * _DAY
    row, change = DailyMetricsRow, SubscriptionChangeRow
    computed: dict[date, datetime] = dict(
        (await session.execute(select(row.day, row.computed_at).where(row.day >= oldest, row.day <= newest))).all()
    )
    missing = [day for number in range(DAYS_KEPT_RIGHT) if (day := oldest + number * _DAY) not in computed]
    booked = await session.execute(
        select(change.occurred_at, change.booked_at).where(
            change.booked_at >= min(computed.values(), default=now) - _BOOKING_SECONDS,
            change.occurred_at < start_of(newest + _DAY),
        )
    )
    wrong = [
        day
        for occurred_at, booked_at in booked
        if (day := max(occurred_at.astimezone(UTC).date(), oldest)) in computed
        and booked_at >= computed[day] - _BOOKING_SECONDS
    ]
    return min([*wrong, *missing], default=None)


def newest_due(now: datetime) -> date:
    """Return the last day whose usage is settled."""
    return (now - _SETTLED_AFTER).astimezone(UTC).date() - _DAY


async def compute_due(database: Database, clock: Clock) -> int:
    """Compute what is missing or wrong of the last days; return how many days that were. Errors: as `compute`."""
    now = clock.now()
    async with database.transaction() as session:
        first = await first_due(session, now)
    if first is None:
        return 0
    try:
        return await compute(database, clock, first, newest_due(now))
    except MetricsBusy:
        return 0
