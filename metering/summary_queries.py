"""The one statement behind usage and costs. It reads `spend_windows` along its primary key, and never the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import BigInteger, ColumnElement, DateTime, Interval, Select, Text, any_, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import InstrumentedAttribute

from core.ids import OrganizationId
from metering.tables import SpendWindowRow
from metering.usage import UNIT_NAMES

GroupField = Literal["project_id", "key_id", "model", "service_tier", "is_batch"]
SUM_NAMES: Final = ("requests", "unpriced_requests", "cost_nano_usd", "charge_nano_usd", *UNIT_NAMES)
BATCH_TIER: Final = "batch"
HOUR_SECONDS: Final = 3600
_MINUTE_SECONDS: Final = 60
_HOUR: Final = timedelta(seconds=HOUR_SECONDS)


class Buckets(msgspec.Struct, frozen=True):
    """*count* stretches of time of one *width*, one after the other.

    Whole hours are answered from sums of hours, which are kept for good; anything finer from sums of minutes, which are
    kept for days.
    """

    starts_at: datetime
    width: timedelta
    count: int

    @property
    def ends_at(self) -> datetime:
        """The first instant that is not in them."""
        return self.starts_at + self.width * self.count

    @property
    def window_seconds(self) -> int:
        """Which sums make up these buckets."""
        epoch = datetime.fromtimestamp(0, UTC)
        are_hours = not self.width % _HOUR and not (self.starts_at - epoch) % _HOUR
        return HOUR_SECONDS if are_hours else _MINUTE_SECONDS


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which usage, and how it is told apart. An empty filter lets everything through, but no *operations* none."""

    buckets: Buckets
    operations: tuple[str, ...] | None = None
    """Names from `inference.endpoints`; None: all."""
    project_ids: tuple[str, ...] = ()
    key_ids: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    is_batch: bool | None = None
    group_by: tuple[GroupField, ...] = ()


def select_sums(query: UsageQuery, *, organization_id: OrganizationId, rows_max: int) -> Select[Any]:
    """Return the statement: `bucket_at`, what is grouped by, then SUM_NAMES; in the order of time, then of groups."""
    buckets = query.buckets
    # The width and the origin are values of ours, so grouping by the label is grouping by this very expression.
    bucket_at = func.date_bin(
        bindparam(None, buckets.width, Interval()),
        SpendWindowRow.starts_at,
        bindparam(None, buckets.starts_at, DateTime(timezone=True)),
    ).label("bucket_at")
    groups = [_group(name).label(f"by_{name}") for name in query.group_by]
    sums = [cast(func.sum(getattr(SpendWindowRow, name)), BigInteger).label(f"sum_{name}") for name in SUM_NAMES]
    labels = ["bucket_at", *(group.name for group in groups)]
    return (
        select(bucket_at, *groups, *sums)
        .where(SpendWindowRow.organization_id == organization_id, *_conditions(query))
        .group_by(*labels)
        .order_by(*labels)
        .limit(rows_max)
    )


def is_one_of(column: InstrumentedAttribute[str], chosen: Sequence[str]) -> ColumnElement[bool]:
    """Return the condition, with one parameter whatever the number of values: the statement stays the same."""
    return column == any_(cast(list(chosen), ARRAY(Text)))


def _group(name: GroupField) -> ColumnElement[Any]:
    return SpendWindowRow.service_tier == BATCH_TIER if name == "is_batch" else getattr(SpendWindowRow, name)


def _conditions(query: UsageQuery) -> list[ColumnElement[bool]]:
    row, buckets = SpendWindowRow, query.buckets
    conditions = [
        row.seconds == buckets.window_seconds,
        row.starts_at >= buckets.starts_at,
        row.starts_at < buckets.ends_at,
    ]
    if query.operations is not None:
        conditions.append(is_one_of(row.operation, query.operations))
    conditions += [
        is_one_of(column, chosen)
        for column, chosen in (
            (row.project_id, query.project_ids),
            (row.key_id, query.key_ids),
            (row.model, query.models),
        )
        if chosen
    ]
    if query.is_batch is not None:
        conditions.append(row.service_tier == BATCH_TIER if query.is_batch else row.service_tier != BATCH_TIER)
    return conditions
