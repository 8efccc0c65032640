"""Rows of business metrics. All of it can be computed anew from events, and says nothing that they do not."""

from __future__ import annotations

from datetime import date, datetime

from sqlalchemy import BigInteger, Date, DateTime, ForeignKey, Index, Integer, String, Text, func
from sqlalchemy.orm import Mapped, mapped_column

from core.database import Table

_ID = String(40, collation="C")


class DailyMetricsRow(Table):
    """One day, in UTC, of the operator's business. What each number means: docs/business-metrics.md."""

    __tablename__ = "daily_metrics"

    day: Mapped[date] = mapped_column(Date, primary_key=True)
    organizations: Mapped[int] = mapped_column(Integer)
    paying_organizations: Mapped[int] = mapped_column(Integer)
    trialing_organizations: Mapped[int] = mapped_column(Integer)
    mrr_cents: Mapped[int] = mapped_column(BigInteger)
    new_cents: Mapped[int] = mapped_column(BigInteger)
    new_organizations: Mapped[int] = mapped_column(Integer)
    reactivation_cents: Mapped[int] = mapped_column(BigInteger)
    reactivated_organizations: Mapped[int] = mapped_column(Integer)
    expansion_cents: Mapped[int] = mapped_column(BigInteger)
    expanded_organizations: Mapped[int] = mapped_column(Integer)
    contraction_cents: Mapped[int] = mapped_column(BigInteger)
    contracted_organizations: Mapped[int] = mapped_column(Integer)
    churn_cents: Mapped[int] = mapped_column(BigInteger)
    churned_organizations: Mapped[int] = mapped_column(Integer)
    month_ago_organizations: Mapped[int] = mapped_column(Integer)
    """Who paid at the end of the day thirty days before."""
    month_ago_cents: Mapped[int] = mapped_column(BigInteger)
    lost_organizations: Mapped[int] = mapped_column(Integer)
    """Those of them who no longer pay."""
    lost_cents: Mapped[int] = mapped_column(BigInteger)
    """What those of them who pay less, or nothing, pay less."""
    daily_active_organizations: Mapped[int] = mapped_column(Integer)
    weekly_active_organizations: Mapped[int] = mapped_column(Integer)
    monthly_active_organizations: Mapped[int] = mapped_column(Integer)
    usage_revenue_nano_usd: Mapped[int] = mapped_column(BigInteger)
    cost_nano_usd: Mapped[int] = mapped_column(BigInteger)
    computed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class MrrSnapshotRow(Table):
    """What an organization pays a month, at the end of a day on which it pays anything."""

    __tablename__ = "mrr_snapshots"
    __table_args__ = (Index("ix_mrr_snapshots_organization_id", "organization_id", "day"),)

    day: Mapped[date] = mapped_column(Date, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"), primary_key=True)
    mrr_cents: Mapped[int] = mapped_column(BigInteger)
    plan: Mapped[str | None] = mapped_column(Text)
    """The plan of the subscription that most of it is for."""
