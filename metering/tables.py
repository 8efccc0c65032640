"""Rows of usage and money. No foreign key leads here from what a customer can delete: that would delete their bill.

What the hot path writes, it writes with SQL of its own (`metering/entries.py`); these classes are the schema and what
everything else reads by.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Boolean, DateTime, ForeignKey, Index, Integer, SmallInteger, String, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from core.database import Table

_ID = String(40, collation="C")
_NAME = Text(collation="C")
_WHEN = DateTime(timezone=True)


class _EntryUnits:
    """`metering.usage.Units`, as columns of one call."""

    input_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    cached_input_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    cache_write_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    cache_write_1h_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    input_audio_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    input_image_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    output_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    reasoning_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    output_audio_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    output_image_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    images: Mapped[int] = mapped_column(Integer, server_default="0")
    audio_seconds: Mapped[int] = mapped_column(Integer, server_default="0")


class _WindowUnits:
    """`metering.usage.Units`, as columns of sums."""

    input_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cached_input_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cache_write_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cache_write_1h_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    input_audio_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    input_image_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    output_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    reasoning_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    output_audio_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    output_image_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    images: Mapped[int] = mapped_column(BigInteger, server_default="0")
    audio_seconds: Mapped[int] = mapped_column(BigInteger, server_default="0")


class PriceRow(Table):
    """One version of one price. Append-only: a newer version has a later *effective_from*, or else a later id.

    *model* is a name of the catalog for a price that the operator set, and the list's own name for an imported one.
    *terms* is a `metering.rating.PriceTerms`.
    """

    __tablename__ = "prices"
    __table_args__ = (
        Index("ix_prices_model", "model", "organization_id", "effective_from"),
        Index("ix_prices_plan", "plan", "model", "effective_from", postgresql_where=text("plan IS NOT NULL")),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    model: Mapped[str] = mapped_column(_NAME)
    organization_id: Mapped[str | None] = mapped_column(_ID, ForeignKey("organizations.id"))
    source: Mapped[str] = mapped_column(String(16))
    """`manual`, `litellm`, or `builtin` for the model that comes with the gateway; of a plan `plan` or `plan_end`."""
    plan: Mapped[str | None] = mapped_column(_ID)
    """A plan of aap.toml whose organizations pay this; written from there. None: for everybody, or *organization_id*.

    Whoever asks for everybody's prices must leave these out.
    """
    source_digest: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the file that it was imported from; None for prices that came from no file."""
    terms: Mapped[dict[str, object]] = mapped_column(JSONB)
    effective_from: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class UsageIntentRow(Table):
    """A call that a provider is working on, or was when its gateway died. The row leaves when the call is settled."""

    __tablename__ = "usage_intents"
    __table_args__ = (
        Index("ix_usage_intents_organization_id", "organization_id"),
        # Room on each page for checkpoints: an update then touches no index. Rows live for seconds; dead ones are swept
        # up by their number, not by their share.
        {
            "postgresql_with": {
                "fillfactor": 60,
                "autovacuum_vacuum_scale_factor": 0,
                "autovacuum_vacuum_threshold": 5000,
            }
        },
    )

    request_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID)
    project_id: Mapped[str] = mapped_column(_ID)
    key_id: Mapped[str] = mapped_column(_ID)
    secret_id: Mapped[str] = mapped_column(_ID)
    gateway_id: Mapped[str] = mapped_column(_ID)
    model: Mapped[str] = mapped_column(_NAME)
    deployment: Mapped[str] = mapped_column(_NAME)
    operation: Mapped[str] = mapped_column(_NAME)
    price_id: Mapped[str | None] = mapped_column(_ID)
    charge_price_id: Mapped[str | None] = mapped_column(_ID)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    """As estimated before anybody has counted."""
    observed_output_tokens: Mapped[int] = mapped_column(Integer, server_default="0")
    images: Mapped[int] = mapped_column(Integer, server_default="0")
    """As asked for."""
    audio_seconds: Mapped[int] = mapped_column(Integer, server_default="0")
    """As estimated by the size of the recording."""
    reserved_nano_usd: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """The most that the call can cost, where a hard budget holds; else 0."""
    started_at: Mapped[datetime] = mapped_column(_WHEN)
    checkpoint_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class GatewayLeaseRow(Table):
    """A gateway that was alive at *seen_at*. Its calls, as far as they run, were checkpointed then."""

    __tablename__ = "gateway_leases"

    gateway_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    seen_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class LedgerEntryRow(_EntryUnits, Table):
    """One call that reached a provider, or a correction of one. Append-only; also the log of requests.

    Partitioned by month of `request_id`, which sorts by time. Corrections have the request id of what they correct.
    """

    __tablename__ = "ledger_entries"
    __table_args__ = (
        Index("ix_ledger_entries_organization_id", "organization_id", "request_id"),
        {"postgresql_partition_by": "RANGE (request_id)"},
    )

    request_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    kind: Mapped[str] = mapped_column(String(12, collation="C"), primary_key=True)
    """usage | adjustment | credit"""
    seq: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID)
    project_id: Mapped[str] = mapped_column(_ID)
    key_id: Mapped[str] = mapped_column(_ID)
    secret_id: Mapped[str] = mapped_column(_ID)
    model: Mapped[str] = mapped_column(_NAME)
    deployment: Mapped[str] = mapped_column(_NAME)
    operation: Mapped[str] = mapped_column(_NAME)
    service_tier: Mapped[str] = mapped_column(_NAME)
    price_id: Mapped[str | None] = mapped_column(_ID)
    """What the cost was rated by. None: unpriced, or nothing was used."""
    charge_price_id: Mapped[str | None] = mapped_column(_ID)
    """What the charge was rated by: the organization's own price, or else the same as the cost's."""
    cost_nano_usd: Mapped[int] = mapped_column(BigInteger)
    """What the provider takes."""
    charge_nano_usd: Mapped[int] = mapped_column(BigInteger)
    """What the organization pays. Budgets count this."""
    reported_cost_nano_usd: Mapped[int | None] = mapped_column(BigInteger)
    """What the provider itself said that the call cost, where it says so."""
    is_unpriced: Mapped[bool] = mapped_column(Boolean)
    """Something was used that has no price: the cost is not known, and stands as 0."""
    quality: Mapped[str] = mapped_column(String(12, collation="C"))
    """exact: as the provider reported | estimated"""
    requests: Mapped[int] = mapped_column(SmallInteger)
    """1 for a call that the provider answered; 0 for one that it refused, and for corrections."""
    status: Mapped[int] = mapped_column(SmallInteger)
    outcome: Mapped[str] = mapped_column(_NAME)
    duration_ms: Mapped[int] = mapped_column(Integer)
    first_byte_ms: Mapped[int | None] = mapped_column(Integer)
    corrects_kind: Mapped[str | None] = mapped_column(String(12, collation="C"))
    corrects_seq: Mapped[int | None] = mapped_column(SmallInteger)
    occurred_at: Mapped[datetime] = mapped_column(_WHEN)
    """When the call began; of a correction, when the corrected call began. Windows go by this."""
    booked_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    note: Mapped[str | None] = mapped_column(
        Text, server_default=text("nullif(current_setting('aap.entry_note', true), '')")
    )
    """Why an operator made it (`metering/adjustments.py`)."""


class LedgerArchiveRow(Table):
    """A file that holds entries of one month, which was dropped for it. *digest* is the file's SHA-256."""

    __tablename__ = "ledger_archives"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    month: Mapped[datetime] = mapped_column(_WHEN)
    entries: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    archived_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class SpendWindowRow(_WindowUnits, Table):
    """The sum of entries of one minute (kept for days) or one hour (kept for good). Written with the entries."""

    __tablename__ = "spend_windows"
    # The present hour's rows are updated many times a second.
    __table_args__ = ({"postgresql_with": {"fillfactor": 50}},)

    organization_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    seconds: Mapped[int] = mapped_column(Integer, primary_key=True)
    """60 or 3600"""
    starts_at: Mapped[datetime] = mapped_column(_WHEN, primary_key=True)
    project_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    key_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    model: Mapped[str] = mapped_column(_NAME, primary_key=True)
    operation: Mapped[str] = mapped_column(_NAME, primary_key=True)
    service_tier: Mapped[str] = mapped_column(_NAME, primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    unpriced_requests: Mapped[int] = mapped_column(BigInteger)
    cost_nano_usd: Mapped[int] = mapped_column(BigInteger)
    charge_nano_usd: Mapped[int] = mapped_column(BigInteger)


class BudgetPeriodRow(Table):
    """What was charged against a budget in one of its periods. Written with the entries."""

    __tablename__ = "budget_periods"

    budget_id: Mapped[str] = mapped_column(_ID, ForeignKey("budgets.id", ondelete="CASCADE"), primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(_WHEN, primary_key=True)
    spent_nano_usd: Mapped[int] = mapped_column(BigInteger)


class BudgetEventRow(Table):
    """A threshold that spending has crossed, once a period: for a webhook and a mail."""

    __tablename__ = "budget_events"
    __table_args__ = (Index("ix_budget_events_organization_id", "organization_id", "created_at"),)

    budget_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(_WHEN, primary_key=True)
    threshold_percent: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID)
    spent_nano_usd: Mapped[int] = mapped_column(BigInteger)
    limit_nano_usd: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class AllowanceEventRow(Table):
    """A threshold that the use of a plan's allowance has crossed, once a month: for a mail."""

    __tablename__ = "allowance_events"

    organization_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    unit: Mapped[str] = mapped_column(_NAME, primary_key=True)
    """chat_requests | tokens | workflow_executions"""
    starts_at: Mapped[datetime] = mapped_column(_WHEN, primary_key=True)
    """When the month began, in UTC."""
    threshold_percent: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    used: Mapped[int] = mapped_column(BigInteger)
    limit: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
