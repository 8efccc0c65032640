"""What can be set about a twin: limits, lags, mischief. The defaults are Stripe's rules without Stripe's delays."""

from __future__ import annotations

from typing import Literal

import msgspec

DAY_SECONDS = 86_400
API_VERSION = "2026-10-28.endive"


class Mischief(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How badly webhooks travel. Shares are between 0 (never) and 1 (always), drawn from the twin's seed."""

    drop_share: float = 0.0
    duplicate_share: float = 0.0
    # A late one is put before others that wait with it: what Stripe means by "order is not guaranteed".
    reorder_share: float = 0.0
    delay_seconds_max: int = 0


class TwinOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a twin that differs between accounts, tests and habits."""

    api_key: str = "sk_test_twin"
    api_version: str = API_VERSION
    webhook_secret: str | None = None  # None: each endpoint gets its own
    # Ids are drawn from it: two twins with the same seed and the same calls answer the same.
    seed: int = 0
    # The shape before 2025-03-31.basil: period dates on the subscription, invoice.subscription, line.price.
    older_shapes: bool = False
    # How long a meter event stays invisible to summaries and invoices.
    aggregation_lag_seconds: int = 0
    # None keeps identifiers for ever. Stripe promises "at least 24 hours".
    identifier_window_seconds: int | None = DAY_SECONDS
    # Stripe's v1 was seen to refuse duplicates without a code, by their message alone; v2 documents
    # `duplicate_meter_event`. Whoever relies on a code finds out here.
    duplicate_identifier_code: str | None = None
    # None is no limit. Stripe: 25 in a sandbox, 1000 live; 10,000 live for the stream.
    requests_per_second: int | None = None
    stream_requests_per_second: int | None = None
    latency_seconds: float = 0.0
    # How long a drafted invoice waits for late usage. Stripe: one hour, up to 72 by a setting of the account.
    draft_grace_seconds: int = 3_600
    upcoming_days: int = 7
    # Days from one failed attempt to the next; afterwards `after_last_retry` holds.
    payment_retry_days: tuple[int, ...] = (3, 5, 7)
    after_last_retry: Literal["canceled", "unpaid", "past_due"] = "canceled"
    idempotency_seconds: int = DAY_SECONDS
    event_retention_days: int = 30
    webhook_retry_seconds: tuple[int, ...] = (60, 600, 3_600, 21_600)
    webhook_timeout_seconds: float = 10.0
    mischief: Mischief = Mischief()
    # Requests that the journal keeps; the oldest leave.
    journal_max: int = 10_000
