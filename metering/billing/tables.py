"""Rows of billing: who is whose customer at Stripe, what Stripe was told of usage, and what it told us.

Customers' usage is in nano-USD, as in the ledger; what a meter counts in its own unit; invoices in cents, as at Stripe.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    Numeric,
    SmallInteger,
    String,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TSTZMULTIRANGE, Range
from sqlalchemy.orm import Mapped, mapped_column

from core.database import Table

_ID = String(40, collation="C")
_STRIPE_ID = String(255, collation="C")
_WORD = String(24, collation="C")
_METER = String(100, collation="C")
_WHEN = DateTime(timezone=True)


class BillingCustomerRow(Table):
    """An organization's account for billing: its customer at Stripe, and how it pays."""

    __tablename__ = "billing_customers"

    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"), primary_key=True)
    stripe_customer_id: Mapped[str | None] = mapped_column(_STRIPE_ID, unique=True)
    """None until Stripe has answered: the row is made first, so that two who ask make one customer."""
    email: Mapped[str | None] = mapped_column(Text)
    wallet_opened_at: Mapped[datetime | None] = mapped_column(_WHEN)
    """Usage from then on may be drawn from prepaid credit."""
    top_up_below_cents: Mapped[int | None] = mapped_column(BigInteger)
    checkout_ids: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    """Pages to buy a plan that may be open: they are closed before another one is opened."""
    top_up_cents: Mapped[int | None] = mapped_column(BigInteger)
    """Charge the card so much whenever less than *top_up_below_cents* is left. None: never by itself."""
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class SubscriptionRow(Table):
    """A subscription as Stripe last described it. Written by `apply` alone, from an object that was read anew."""

    __tablename__ = "subscriptions"
    __table_args__ = (Index("ix_subscriptions_organization_id", "organization_id", "started_at"),)

    id: Mapped[str] = mapped_column(_STRIPE_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    plan: Mapped[str] = mapped_column(Text)
    """The plan's name in aap.toml, as the price's metadata has it."""
    status: Mapped[str] = mapped_column(_WORD)
    price_cents_per_month: Mapped[int] = mapped_column(BigInteger)
    """What recurs, without usage; a yearly price counts a twelfth."""
    plan_item_id: Mapped[str | None] = mapped_column(_STRIPE_ID)
    usage_item_id: Mapped[str | None] = mapped_column(_STRIPE_ID)
    """The item that bills usage; None where usage is not billed."""
    usage_price_ids: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    """Every price that usage was ever billed at: an invoice's line of an item that is gone names its price only."""
    plan_price_ids: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    """Every price that ever recurred."""
    usage_price_id: Mapped[str | None] = mapped_column(_STRIPE_ID)
    """The price that usage is billed at, or was last."""
    usage_billed_since: Mapped[datetime | None] = mapped_column(_WHEN)
    """When the item that bills usage was put on, by Stripe's clock."""
    has_dropped_usage: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    """It is to have a usage item, and has none: another subscription bills the usage, or did until now."""
    has_forgotten_usage: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    """Nothing of what its item had counted was billed as we took it off."""
    usage_problem: Mapped[str | None] = mapped_column(Text)
    """What is wrong with how it bills usage, for the operator; None: nothing."""
    accepted_usage_problem: Mapped[str | None] = mapped_column(Text)
    """What an operator has decided about."""
    started_at: Mapped[datetime] = mapped_column(_WHEN)
    trial_ends_at: Mapped[datetime | None] = mapped_column(_WHEN)
    cancel_at: Mapped[datetime | None] = mapped_column(_WHEN)
    ended_at: Mapped[datetime | None] = mapped_column(_WHEN)
    past_due_since: Mapped[datetime | None] = mapped_column(_WHEN)
    is_grace_over: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    """What follows from the end of the days of grace was done: what an operator has done since stays."""
    period_starts_at: Mapped[datetime] = mapped_column(_WHEN)
    period_ends_at: Mapped[datetime] = mapped_column(_WHEN)
    read_at: Mapped[datetime] = mapped_column(_WHEN)
    """When the request for the object that is written here was sent. An older reading never replaces a newer one."""


class BillingPeriodRow(Table):
    """One period of a subscription. Usage goes to the period that it falls into, until its invoice is final."""

    __tablename__ = "billing_periods"
    __table_args__ = (Index("ix_billing_periods_organization_id", "organization_id", "starts_at"),)

    subscription_id: Mapped[str] = mapped_column(_STRIPE_ID, primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(_WHEN, primary_key=True)
    ends_at: Mapped[datetime] = mapped_column(_WHEN)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    is_metered: Mapped[bool] = mapped_column(Boolean)
    """Whether usage is billed in it; else its price includes it. A period in which that changes is two rows."""
    is_handed_over: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    """Another subscription bills its usage: what that one does not cover goes to the next invoice."""
    is_trial: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    is_closed: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    """Its invoice is final: Stripe counts nothing more for it."""
    accepted_micro_usd: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """What was reported for it and is on no invoice, and that an operator has decided about."""


class InvoiceRow(Table):
    """An invoice as Stripe last described it."""

    __tablename__ = "invoices"
    __table_args__ = (Index("ix_invoices_organization_id", "organization_id", "issued_at"),)

    id: Mapped[str] = mapped_column(_STRIPE_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    subscription_id: Mapped[str | None] = mapped_column(_STRIPE_ID)
    number: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str] = mapped_column(_WORD)
    currency: Mapped[str] = mapped_column(String(3))
    total_cents: Mapped[int] = mapped_column(BigInteger)
    paid_cents: Mapped[int] = mapped_column(BigInteger)
    due_cents: Mapped[int] = mapped_column(BigInteger)
    usage_micro_usd: Mapped[int | None] = mapped_column(BigInteger)
    """The quantity of the line that bills usage; None where there is no such line."""
    has_other_lines: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    """There are lines of neither the plan nor usage: what bills usage is then for a person to read."""
    accepted_micro_usd: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """What was reported and is not billed by it, and that an operator has decided about."""
    usage_starts_at: Mapped[datetime | None] = mapped_column(_WHEN)
    usage_ends_at: Mapped[datetime | None] = mapped_column(_WHEN)
    usage_spans: Mapped[Sequence[Range[datetime]] | None] = mapped_column(TSTZMULTIRANGE)
    """The times that its lines of usage are of: another subscription may have billed what is between them."""
    page_url: Mapped[str | None] = mapped_column(Text)
    pdf_url: Mapped[str | None] = mapped_column(Text)
    issued_at: Mapped[datetime] = mapped_column(_WHEN)
    read_at: Mapped[datetime] = mapped_column(_WHEN)


class MeterCursorRow(Table):
    """How far one meter of one organization is reported. Whoever holds the lease is its only writer."""

    __tablename__ = "meter_cursors"

    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"), primary_key=True)
    meter: Mapped[str] = mapped_column(_METER, primary_key=True)
    remainder: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """What was planned and is less than one unit of the meter: carried into the next report, never lost."""
    next_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    is_flush_due: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    """An invoice waits: report what there is, also of the present hour."""
    scanned_at: Mapped[datetime | None] = mapped_column(_WHEN)
    """When all windows were last looked through, not only those of the last days."""
    failures: Mapped[int] = mapped_column(Integer, server_default="0")
    leased_until: Mapped[datetime | None] = mapped_column(_WHEN)
    leased_by: Mapped[str | None] = mapped_column(_ID)
    parked_for: Mapped[str | None] = mapped_column(Text)
    """Why nothing is sent, such as a customer that Stripe does not know. An operator's command goes on."""


class MeterWindowRow(Table):
    """How much of a window's usage is planned into reports. A window is an hour, cut where a billing period begins."""

    __tablename__ = "meter_windows"

    organization_id: Mapped[str] = mapped_column(_ID, primary_key=True)
    meter: Mapped[str] = mapped_column(_METER, primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(_WHEN, primary_key=True)
    planned: Mapped[int] = mapped_column(BigInteger)
    """In the ledger's unit: nano-USD, or tokens."""
    revisions: Mapped[int] = mapped_column(Integer)


class MeterReportRow(Table):
    """The outbox towards Stripe: one meter event. Its identifier and value never change once it is written."""

    __tablename__ = "meter_reports"
    __table_args__ = (
        UniqueConstraint("organization_id", "meter", "window_starts_at", "revision", name="uq_meter_reports_revision"),
        Index("ix_meter_reports_event_at", "organization_id", "meter", "event_at"),
        Index("ix_meter_reports_last_sent_at", "last_sent_at"),
        Index(
            "ix_meter_reports_open",
            "organization_id",
            "meter",
            postgresql_where=text("state IN ('new', 'sent', 'unknown')"),
        ),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    meter: Mapped[str] = mapped_column(_METER)
    window_starts_at: Mapped[datetime] = mapped_column(_WHEN)
    """Which usage it is: the window's."""
    revision: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(_WORD)
    """usage | carried (told as of a later time than the usage's) | moved (taken back out of a final invoice's period,
    which did not bill it) | repair (makes Stripe's sum of an hour ours)"""
    follows: Mapped[str | None] = mapped_column(_ID)
    """The refused report that a carried one takes the place of."""
    event_at: Mapped[datetime] = mapped_column(_WHEN)
    """The time that Stripe is told. Another than the window's where that is closed."""
    value: Mapped[int] = mapped_column(BigInteger)
    """In the meter's unit; below zero where a correction took back what was reported."""
    drawn: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """What the wallet paid of the same usage, in the meter's unit; Stripe is not told of it."""
    identifier: Mapped[str] = mapped_column(String(100, collation="C"), unique=True)
    state: Mapped[str] = mapped_column(_WORD)
    """new | sent (outcome open) | unknown (too old to resend) | acked | checked | refused | settled (by the wallet)"""
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    first_sent_at: Mapped[datetime | None] = mapped_column(_WHEN)
    last_sent_at: Mapped[datetime | None] = mapped_column(_WHEN)
    acked_at: Mapped[datetime | None] = mapped_column(_WHEN)
    problem: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class UncollectedUsageRow(Table):
    """Usage of a billed window that no invoice takes any more: its period's is final, and there is no later one."""

    __tablename__ = "uncollected_usage"

    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"), primary_key=True)
    meter: Mapped[str] = mapped_column(_METER, primary_key=True)
    window_starts_at: Mapped[datetime] = mapped_column(_WHEN, primary_key=True)
    amount: Mapped[int] = mapped_column(BigInteger)
    """In the ledger's unit: nano-USD, or tokens."""
    seen_at: Mapped[datetime] = mapped_column(_WHEN)
    accepted_at: Mapped[datetime | None] = mapped_column(_WHEN)
    """When an operator decided about it: it counts as planned since."""


OPEN_STATES: Final = ("new", "sent")
"""Of reports that are still to be sent, or sent again."""
COUNTED_STATES: Final = ("acked", "unknown", "checked")
"""Of reports that may be in Stripe's sums."""


class MeterCheckRow(Table):
    """An hour of a meter in which Stripe's sum is, or was, not ours."""

    __tablename__ = "meter_checks"
    __table_args__ = (Index("ix_meter_checks_state", "state", "checked_at"),)

    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"), primary_key=True)
    meter: Mapped[str] = mapped_column(_METER, primary_key=True)
    hour: Mapped[datetime] = mapped_column(_WHEN, primary_key=True)
    ours: Mapped[int] = mapped_column(BigInteger)
    theirs: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(_WORD)
    """waiting (seen once) | suspect (an error was reported) | repaired | alert (closed: a person decides) | agrees |
    accepted (a person has decided, about these two numbers)"""
    seen_at: Mapped[datetime] = mapped_column(_WHEN)
    """Since when the two numbers are as they are."""
    checked_at: Mapped[datetime] = mapped_column(_WHEN)


class StripeEventRow(Table):
    """The inbox: an event that Stripe signed, stored once, applied later."""

    __tablename__ = "stripe_events"
    __table_args__ = (Index("ix_stripe_events_due", "due_at", postgresql_where=text("state = 'new'")),)

    id: Mapped[str] = mapped_column(_STRIPE_ID, primary_key=True)
    type: Mapped[str] = mapped_column(Text)
    object_id: Mapped[str] = mapped_column(_STRIPE_ID)
    """What is read anew when it is applied. Its content is not kept: it may be out of date, and is a customer's."""
    occurred_at: Mapped[datetime] = mapped_column(_WHEN)
    state: Mapped[str] = mapped_column(_WORD, server_default="new")
    """new | applied | ignored | dead"""
    attempts: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    due_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    problem: Mapped[str | None] = mapped_column(Text)
    source: Mapped[str] = mapped_column(_WORD)
    """webhook | catch_up"""
    received_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    applied_at: Mapped[datetime | None] = mapped_column(_WHEN)


class StripeMarkRow(Table):
    """What is remembered about Stripe from one round of a worker to the next."""

    __tablename__ = "stripe_marks"

    name: Mapped[str] = mapped_column(_WORD, primary_key=True)
    value: Mapped[dict[str, object]] = mapped_column(JSONB)
    marked_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class WalletTransferRow(Table):
    """One movement of prepaid credit. Its postings add up to nothing; *source* makes it happen once."""

    __tablename__ = "wallet_transfers"
    __table_args__ = (Index("ix_wallet_transfers_organization_id", "organization_id", "id"),)

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    kind: Mapped[str] = mapped_column(_WORD)
    """top_up | usage | refund | adjustment"""
    source: Mapped[str] = mapped_column(_STRIPE_ID, unique=True)
    """What it is for: a payment at Stripe, a meter report, or an operator's own reference."""
    note: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class WalletPostingRow(Table):
    """One side of a transfer. Append-only; a trigger refuses a transfer whose postings do not add up to nothing."""

    __tablename__ = "wallet_postings"
    __table_args__ = (Index("ix_wallet_postings_account", "organization_id", "account"),)

    transfer_id: Mapped[str] = mapped_column(_ID, ForeignKey("wallet_transfers.id"), primary_key=True)
    account: Mapped[str] = mapped_column(_WORD, primary_key=True)
    """credit (what the organization has) | payments (what Stripe took) | usage (what was used) | adjustments"""
    organization_id: Mapped[str] = mapped_column(_ID)
    nano_usd: Mapped[int] = mapped_column(Numeric(30, 0))


class TopUpRow(Table):
    """A charge of the card for prepaid credit that we asked for ourselves."""

    __tablename__ = "top_ups"
    __table_args__ = (
        # One at a time: two that are open together would charge a customer twice for one low balance.
        Index("uq_top_ups_open", "organization_id", unique=True, postgresql_where=text("state = 'open'")),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    """Also the idempotency key at Stripe."""
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    cents: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(_WORD, server_default="open")
    """open | paid | failed"""
    payment_method_id: Mapped[str | None] = mapped_column(_STRIPE_ID)
    """Which card is charged: the same at every try, since a retry that asks for something else is refused."""
    payment_intent_id: Mapped[str | None] = mapped_column(_STRIPE_ID, unique=True)
    problem: Mapped[str | None] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    ended_at: Mapped[datetime | None] = mapped_column(_WHEN)


class SubscriptionChangeRow(Table):
    """What an organization pays a month, each time that changed. Append-only; business metrics are made of it."""

    __tablename__ = "subscription_changes"
    __table_args__ = (Index("ix_subscription_changes_organization_id", "organization_id", "occurred_at"),)

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    subscription_id: Mapped[str] = mapped_column(_STRIPE_ID)
    plan: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str] = mapped_column(_WORD)
    mrr_cents: Mapped[int] = mapped_column(BigInteger)
    """What recurs a month from then on, of this subscription; 0 while it is on trial, unpaid or ended."""
    occurred_at: Mapped[datetime] = mapped_column(_WHEN)
    """When Stripe says that it changed."""
    booked_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())


class EmailRow(Table):
    """A mail to be sent. *reason* makes it one: what has been written down twice is sent once."""

    __tablename__ = "emails"
    __table_args__ = (
        UniqueConstraint("organization_id", "kind", "reason", name="uq_emails_reason"),
        Index("ix_emails_due", "due_at", postgresql_where=text("state = 'new'")),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(_ID, ForeignKey("organizations.id"))
    kind: Mapped[str] = mapped_column(_WORD)
    """payment_failed | payment_recovered | top_up_failed | limit_near | trial_ending"""
    reason: Mapped[str] = mapped_column(_STRIPE_ID)
    facts: Mapped[dict[str, object]] = mapped_column(JSONB)
    """What the text is filled in with."""
    state: Mapped[str] = mapped_column(_WORD, server_default="new")
    """new | sent | dead"""
    attempts: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    due_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    problem: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(_WHEN, server_default=func.now())
    sent_at: Mapped[datetime | None] = mapped_column(_WHEN)
