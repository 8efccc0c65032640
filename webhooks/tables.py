"""Rows of webhooks: endpoints, their secrets, what happened, and what was sent of it to whom."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    Boolean,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON
from sqlalchemy.orm import Mapped, mapped_column

from core.database import Table

_ID = String(40, collation="C")
_NAME = String(64, collation="C")
_WHEN = DateTime(timezone=True)
_FALSE = text("false")


class WebhookEndpointRow(Table):
    """An address of a customer's that events are sent to, and how it has been doing."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("ix_webhook_endpoints_organization_id", "organization_id", "id"),)

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    url: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text, server_default="")
    event_types: Mapped[list[str]] = mapped_column(ARRAY(Text))
    """Names of `webhooks.events`, or the one entry `*`: all but those that have to be named."""
    filter: Mapped[str | None] = mapped_column(Text)
    """A JMESPath expression on an event's data; what it is not true of is not sent."""
    sealed_headers: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Headers of the customer's own, as sealed JSON: they often hold credentials."""
    requests_per_second: Mapped[int | None] = mapped_column(Integer)
    is_secret_revealable: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    disabled_at: Mapped[datetime | None] = mapped_column(_WHEN)
    disabled_reason: Mapped[str | None] = mapped_column(_NAME)
    """owner | operator | gone | failing"""
    deleted_at: Mapped[datetime | None] = mapped_column(_WHEN)
    """Its deliveries and then the row itself are deleted by a worker."""
    failing_since: Mapped[datetime | None] = mapped_column(_WHEN)
    """The first failure since the last success."""
    consecutive_failures: Mapped[int] = mapped_column(Integer, server_default="0")
    warned_percent: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    """How far into the time after which it is disabled its owner was last told."""
    resting_until: Mapped[datetime | None] = mapped_column(_WHEN)
    """Nothing is sent before: the circuit is open, or it asked for less."""
    last_success_at: Mapped[datetime | None] = mapped_column(_WHEN)
    last_problem: Mapped[str | None] = mapped_column(Text)
    worker_id: Mapped[str | None] = mapped_column(_ID)
    """Who sends to it: one worker at a time, for as long as it is heard of (`webhook_workers`)."""
    taken_at: Mapped[datetime | None] = mapped_column(_WHEN)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    enabled_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    """Since when it counts how it is doing: when it was made, enabled, or given another address."""
    updated_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    """When its owner, or who disabled it, last changed how it is sent to."""


class WebhookSecretRow(Table):
    """A signing secret, sealed. There is one without an end; during a rotation, another that ends."""

    __tablename__ = "webhook_secrets"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    endpoint_id: Mapped[str] = mapped_column(_ID, ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), index=True)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    not_after: Mapped[datetime | None] = mapped_column(_WHEN)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class WebhookEventRow(Table):
    """Something that happened, written in the same transaction."""

    __tablename__ = "webhook_events"
    __table_args__ = (
        Index("ix_webhook_events_organization_id", "organization_id", "id"),
        Index("ix_webhook_events_waiting", "organization_id", "id", postgresql_where=text("NOT is_fanned_out")),
        Index("ix_webhook_events_trouble", "created_at", postgresql_where=text("type LIKE 'webhook.endpoint.%'")),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID)
    type: Mapped[str] = mapped_column(_NAME)
    data: Mapped[object] = mapped_column(JSON)
    """As text, not as a value: what is signed is the same bytes at every attempt."""
    endpoint_id: Mapped[str | None] = mapped_column(_ID)
    """Whom it is for, where it is for one endpoint alone."""
    is_fanned_out: Mapped[bool] = mapped_column(Boolean, server_default=_FALSE)
    """Whether the deliveries that it is due are there."""
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class WebhookDeliveryRow(Table):
    """What one endpoint is due of one event. Its id is made of both, so that there is never a second one."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "endpoint_id", "due_at", postgresql_where=text("state = 'pending'")),
        Index("ix_webhook_deliveries_endpoint_id", "endpoint_id", "id"),
        Index("ix_webhook_deliveries_failed", "endpoint_id", "id", postgresql_where=text("state = 'failed'")),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID)
    endpoint_id: Mapped[str] = mapped_column(_ID)
    event_id: Mapped[str] = mapped_column(_ID)
    event_type: Mapped[str] = mapped_column(_NAME)
    state: Mapped[str] = mapped_column(String(12, collation="C"), server_default="pending")
    """pending | succeeded | failed"""
    step: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    """How many attempts of the present schedule were made; a resend begins it anew."""
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    due_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    requested_at: Mapped[datetime | None] = mapped_column(_WHEN)
    """When its owner last asked for it to be sent again."""
    last_status: Mapped[int | None] = mapped_column(SmallInteger)
    last_problem: Mapped[str | None] = mapped_column(Text)
    finished_at: Mapped[datetime | None] = mapped_column(_WHEN)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class WebhookAttemptRow(Table):
    """One try to deliver, and what was answered, as far as it is kept. Append-only."""

    __tablename__ = "webhook_attempts"

    delivery_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID)
    status: Mapped[int | None] = mapped_column(SmallInteger)
    problem: Mapped[str | None] = mapped_column(Text)
    duration_ms: Mapped[int] = mapped_column(Integer)
    response_body: Mapped[bytes | None] = mapped_column(LargeBinary)
    started_at: Mapped[datetime] = mapped_column(_WHEN)


class WebhookWorkerRow(Table):
    """A worker that was heard of not long ago. Who is not, has lost its endpoints to whoever asks next."""

    __tablename__ = "webhook_workers"

    worker_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    seen_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
