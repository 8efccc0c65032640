"""Rows of tenants, keys and limits. Every tenant's row carries its organization."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Boolean, DateTime, ForeignKey, Identity, Index, LargeBinary, String, Text, func
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from core.database import Table

_ID = String(40, collation="C")
_WHEN = DateTime(timezone=True)


class OrganizationRow(Table):
    """A customer of the operator."""

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    disconnect_policy: Mapped[str] = mapped_column(String(8), server_default="drain")
    plan: Mapped[str | None] = mapped_column(String(40, collation="C"))
    """A name of `[plans]` in aap.toml. NULL: nothing but limits and budgets holds, as for the operator's own."""
    status: Mapped[str] = mapped_column(String(16), server_default="active")
    """active | suspended"""
    status_reason: Mapped[str | None] = mapped_column(Text)
    """A name of `keys.errors.SUSPENSION_REASONS`, or what the operator wrote, which only operators are shown."""
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class ProjectRow(Table):
    """A part of an organization that keys belong to."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"), index=True)
    name: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class KeyRow(Table):
    """An API key's record. It outlives its secrets: rotation adds a secret and keeps the id."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"), index=True)
    project_id: Mapped[str] = mapped_column(_ID, ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(Text)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    models: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    ip_networks: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    expires_at: Mapped[datetime | None] = mapped_column(_WHEN)
    disabled_at: Mapped[datetime | None] = mapped_column(_WHEN)
    last_used_at: Mapped[datetime | None] = mapped_column(_WHEN)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class KeySecretRow(Table):
    """One secret of a key: its fingerprint, never the secret."""

    __tablename__ = "api_key_secrets"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    key_id: Mapped[str] = mapped_column(_ID, ForeignKey("api_keys.id"), index=True)
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    pepper_id: Mapped[str] = mapped_column(String(16))
    hint: Mapped[str] = mapped_column(String(32))
    not_after: Mapped[datetime | None] = mapped_column(_WHEN)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class RateLimitRow(Table):
    """Limits of one scope. NULL means: no limit of that kind here (the defaults of aap.toml apply)."""

    __tablename__ = "rate_limits"

    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"), primary_key=True)
    scope: Mapped[str] = mapped_column(String(16), primary_key=True)
    scope_id: Mapped[str] = mapped_column(Text, primary_key=True)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    requests_per_day: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_day: Mapped[int | None] = mapped_column(BigInteger)
    concurrent_requests: Mapped[int | None] = mapped_column(BigInteger)


class BudgetRow(Table):
    """The most that an organization, project or key may be charged in a period."""

    __tablename__ = "budgets"
    __table_args__ = (Index("uq_budgets_scope", "organization_id", "scope", "scope_id", "period", unique=True),)

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    scope: Mapped[str] = mapped_column(String(16))
    """organization | project | key"""
    scope_id: Mapped[str] = mapped_column(_ID)
    period: Mapped[str] = mapped_column(String(8))
    """day | week | month | total; in UTC, weeks from Monday"""
    limit_nano_usd: Mapped[int] = mapped_column(BigInteger)
    is_hard: Mapped[bool] = mapped_column(Boolean)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class KeyChangeRow(Table):
    """What changed about keys, in commit order: gateways that missed a message read on from the last one they saw."""

    __tablename__ = "key_changes"
    __table_args__ = (Index("ix_key_changes_changed_at", "changed_at"),)

    sequence: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    key_id: Mapped[str | None] = mapped_column(_ID)
    changed_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
