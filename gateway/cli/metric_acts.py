"""What `aap metrics` does."""

from __future__ import annotations

from datetime import date
from typing import Final

import msgspec

from core.clock import SystemClock
from core.money import NANO_USD_PER_CENT, usd_text
from gateway.cli.stores import Stores, on_stores
from metering.billing.metrics import DailyMetrics, compute, list_metrics

_STATEMENT_SECONDS_MAX: Final = 600.0


class MetricsRow(msgspec.Struct, frozen=True, kw_only=True):
    """A day as a row of a table: money in US dollars, shares in percent."""

    day: date
    mrr_usd: str
    new_usd: str
    reactivation_usd: str
    expansion_usd: str
    contraction_usd: str
    churn_usd: str
    paying: int
    trialing: int
    customer_churn: str | None
    revenue_churn: str | None
    arpu_usd: str | None
    clv_usd: str | None
    active_day: int
    active_week: int
    active_month: int
    usage_usd: str
    cost_usd: str
    margin: str | None


def days(first: date, last: date, *, recompute: bool) -> list[DailyMetrics]:
    """Return the days from *first* to *last*, both included, computed anew if asked for."""

    async def act(stores: Stores) -> list[DailyMetrics]:
        if recompute:
            await compute(stores.database, SystemClock(), first, last)
        async with stores.database.transaction() as session:
            return await list_metrics(session, first, last)

    return on_stores(act, statement_seconds_max=_STATEMENT_SECONDS_MAX)


def metrics_row(day: DailyMetrics) -> MetricsRow:
    """Return a day as a row of a table."""
    return MetricsRow(
        day=day.day,
        mrr_usd=_dollars(day.mrr_cents),
        new_usd=_dollars(day.new_cents),
        reactivation_usd=_dollars(day.reactivation_cents),
        expansion_usd=_dollars(day.expansion_cents),
        contraction_usd=_dollars(day.contraction_cents),
        churn_usd=_dollars(day.churn_cents),
        paying=day.paying_organizations,
        trialing=day.trialing_organizations,
        customer_churn=_percent(day.customer_churn_basis_points),
        revenue_churn=_percent(day.revenue_churn_basis_points),
        arpu_usd=None if day.arpu_cents is None else _dollars(day.arpu_cents),
        clv_usd=None if day.clv_cents is None else _dollars(day.clv_cents),
        active_day=day.daily_active_organizations,
        active_week=day.weekly_active_organizations,
        active_month=day.monthly_active_organizations,
        usage_usd=usd_text(day.usage_revenue_nano_usd),
        cost_usd=usd_text(day.cost_nano_usd),
        margin=_percent(day.gross_margin_basis_points),
    )


def _dollars(cents: int) -> str:
    return usd_text(cents * NANO_USD_PER_CENT)


def _percent(basis_points: int | None) -> str | None:
    if basis_points is None:
        return None
    sign = "-" if basis_points < 0 else ""
    return f"{sign}{abs(basis_points) // 100}.{abs(basis_points) % 100:02d} %"
