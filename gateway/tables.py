"""Rows of the HTTP edge: answers that are kept to be given again."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import DateTime, Index, LargeBinary, SmallInteger, String, Text, func
from sqlalchemy.orm import Mapped, mapped_column

from core.database import Table

_ID = String(40, collation="C")
_WHEN = DateTime(timezone=True)


class IdempotentAnswerRow(Table):
    """The answer to the first request with an Idempotency-Key of one API key, or the claim of who is working on it."""

    __tablename__ = "idempotent_answers"
    __table_args__ = (Index("ix_idempotent_answers_expires_at", "expires_at"),)

    key_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)
    """SHA-256 of what the caller sent, in hexadecimal."""
    organization_id: Mapped[str] = mapped_column(_ID)
    request_digest: Mapped[bytes] = mapped_column(LargeBinary)
    """SHA-256 of route and body."""
    request_id: Mapped[str] = mapped_column(_ID)
    gateway_id: Mapped[str] = mapped_column(_ID)
    state: Mapped[str] = mapped_column(String(12, collation="C"))
    """running | done | too_large"""
    status: Mapped[int | None] = mapped_column(SmallInteger)
    content_type: Mapped[str | None] = mapped_column(Text)
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    claimed_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(_WHEN)
