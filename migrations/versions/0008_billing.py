"""billing.

Revision: 0008, after 0007.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# Credit that comes from nowhere, or goes there, is refused at commit, whoever writes it.
_BALANCED = """
CREATE FUNCTION refuse_unbalanced_transfer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (SELECT sum(nano_usd) FROM wallet_postings WHERE transfer_id = NEW.transfer_id) <> 0 THEN
    RAISE EXCEPTION 'the postings of % do not add up to nothing', NEW.transfer_id USING ERRCODE = 'check_violation';
  END IF;
  RETURN NULL;
END
$$
"""
_APPEND_ONLY = ("wallet_transfers", "wallet_postings", "subscription_changes")


def upgrade() -> None:
    op.create_table(
        "meter_windows",
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("meter", sa.String(length=100, collation="C"), nullable=False),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("planned", sa.BigInteger(), nullable=False),
        sa.Column("revisions", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "meter", "starts_at", name=op.f("pk_meter_windows")),
    )
    op.create_table(
        "stripe_events",
        sa.Column("id", sa.String(length=255, collation="C"), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("object_id", sa.String(length=255, collation="C"), nullable=False),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.String(length=24, collation="C"), server_default="new", nullable=False),
        sa.Column("attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("source", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("applied_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stripe_events")),
    )
    op.create_index(
        "ix_stripe_events_due", "stripe_events", ["due_at"], unique=False, postgresql_where=sa.text("state = 'new'")
    )
    op.create_table(
        "stripe_marks",
        sa.Column("name", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("value", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("marked_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_stripe_marks")),
    )
    op.create_table(
        "billing_customers",
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("stripe_customer_id", sa.String(length=255, collation="C"), nullable=True),
        sa.Column("email", sa.Text(), nullable=True),
        sa.Column("wallet_opened_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("top_up_below_cents", sa.BigInteger(), nullable=True),
        sa.Column("top_up_cents", sa.BigInteger(), nullable=True),
        sa.Column("checkout_id", sa.String(length=255, collation="C"), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_billing_customers_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("organization_id", name=op.f("pk_billing_customers")),
        sa.UniqueConstraint("stripe_customer_id", name=op.f("uq_billing_customers_stripe_customer_id")),
    )
    op.create_table(
        "billing_periods",
        sa.Column("subscription_id", sa.String(length=255, collation="C"), nullable=False),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("is_metered", sa.Boolean(), nullable=False),
        sa.Column("is_trial", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("is_closed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_billing_periods_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("subscription_id", "starts_at", name=op.f("pk_billing_periods")),
    )
    op.create_index(
        "ix_billing_periods_organization_id", "billing_periods", ["organization_id", "starts_at"], unique=False
    )
    op.create_table(
        "emails",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("kind", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("reason", sa.String(length=255, collation="C"), nullable=False),
        sa.Column("facts", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.String(length=24, collation="C"), server_default="new", nullable=False),
        sa.Column("attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_emails_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_emails")),
        sa.UniqueConstraint("organization_id", "kind", "reason", name="uq_emails_reason"),
    )
    op.create_index("ix_emails_due", "emails", ["due_at"], unique=False, postgresql_where=sa.text("state = 'new'"))
    op.create_table(
        "invoices",
        sa.Column("id", sa.String(length=255, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("subscription_id", sa.String(length=255, collation="C"), nullable=True),
        sa.Column("number", sa.Text(), nullable=True),
        sa.Column("status", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("total_cents", sa.BigInteger(), nullable=False),
        sa.Column("paid_cents", sa.BigInteger(), nullable=False),
        sa.Column("due_cents", sa.BigInteger(), nullable=False),
        sa.Column("usage_micro_usd", sa.BigInteger(), nullable=True),
        sa.Column("accepted_micro_usd", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("has_other_lines", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("usage_starts_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("usage_ends_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("page_url", sa.Text(), nullable=True),
        sa.Column("pdf_url", sa.Text(), nullable=True),
        sa.Column("issued_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("read_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_invoices_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invoices")),
    )
    op.create_index("ix_invoices_organization_id", "invoices", ["organization_id", "issued_at"], unique=False)
    op.create_table(
        "meter_checks",
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("meter", sa.String(length=100, collation="C"), nullable=False),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ours", sa.BigInteger(), nullable=False),
        sa.Column("theirs", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_meter_checks_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("organization_id", "meter", "hour", name=op.f("pk_meter_checks")),
    )
    op.create_index("ix_meter_checks_state", "meter_checks", ["state", "checked_at"], unique=False)
    op.create_table(
        "meter_cursors",
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("meter", sa.String(length=100, collation="C"), nullable=False),
        sa.Column("remainder", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("is_flush_due", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("scanned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("leased_by", sa.String(length=40, collation="C"), nullable=True),
        sa.Column("parked_for", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_meter_cursors_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("organization_id", "meter", name=op.f("pk_meter_cursors")),
    )
    op.create_table(
        "meter_reports",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("meter", sa.String(length=100, collation="C"), nullable=False),
        sa.Column("window_starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("follows", sa.String(length=40, collation="C"), nullable=True),
        sa.Column("event_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.Column("drawn", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("identifier", sa.String(length=100, collation="C"), nullable=False),
        sa.Column("state", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("first_sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("acked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_meter_reports_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_meter_reports")),
        sa.UniqueConstraint("identifier", name=op.f("uq_meter_reports_identifier")),
        sa.UniqueConstraint(
            "organization_id", "meter", "window_starts_at", "revision", name="uq_meter_reports_revision"
        ),
    )
    op.create_index("ix_meter_reports_last_sent_at", "meter_reports", ["last_sent_at"], unique=False)
    op.create_index(
        "ix_meter_reports_event_at", "meter_reports", ["organization_id", "meter", "event_at"], unique=False
    )
    op.create_index(
        "ix_meter_reports_open",
        "meter_reports",
        ["organization_id", "meter"],
        unique=False,
        postgresql_where=sa.text("state IN ('new', 'sent', 'unknown')"),
    )
    op.create_table(
        "subscription_changes",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("subscription_id", sa.String(length=255, collation="C"), nullable=False),
        sa.Column("plan", sa.Text(), nullable=True),
        sa.Column("status", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("mrr_cents", sa.BigInteger(), nullable=False),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("booked_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["organizations.id"],
            name=op.f("fk_subscription_changes_organization_id_organizations"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subscription_changes")),
    )
    op.create_index(
        "ix_subscription_changes_organization_id",
        "subscription_changes",
        ["organization_id", "occurred_at"],
        unique=False,
    )
    op.create_table(
        "subscriptions",
        sa.Column("id", sa.String(length=255, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("price_cents_per_month", sa.BigInteger(), nullable=False),
        sa.Column("plan_item_id", sa.String(length=255, collation="C"), nullable=True),
        sa.Column("usage_item_id", sa.String(length=255, collation="C"), nullable=True),
        sa.Column("usage_price_ids", sa.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("plan_price_ids", sa.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("has_dropped_usage", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("trial_ends_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("past_due_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("is_grace_over", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("period_starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("period_ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("read_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_subscriptions_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subscriptions")),
    )
    op.create_index(
        "ix_subscriptions_organization_id", "subscriptions", ["organization_id", "started_at"], unique=False
    )
    op.create_table(
        "top_ups",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("cents", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=24, collation="C"), server_default="open", nullable=False),
        sa.Column("payment_method_id", sa.String(length=255, collation="C"), nullable=True),
        sa.Column("payment_intent_id", sa.String(length=255, collation="C"), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_top_ups_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_top_ups")),
        sa.UniqueConstraint("payment_intent_id", name=op.f("uq_top_ups_payment_intent_id")),
    )
    op.create_index(
        "uq_top_ups_open", "top_ups", ["organization_id"], unique=True, postgresql_where=sa.text("state = 'open'")
    )
    op.create_table(
        "uncollected_usage",
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("meter", sa.String(length=100, collation="C"), nullable=False),
        sa.Column("window_starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("accepted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_uncollected_usage_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("organization_id", "meter", "window_starts_at", name=op.f("pk_uncollected_usage")),
    )
    op.create_table(
        "wallet_transfers",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("kind", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("source", sa.String(length=255, collation="C"), nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_wallet_transfers_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_wallet_transfers")),
        sa.UniqueConstraint("source", name=op.f("uq_wallet_transfers_source")),
    )
    op.create_index("ix_wallet_transfers_organization_id", "wallet_transfers", ["organization_id", "id"], unique=False)
    op.create_table(
        "wallet_postings",
        sa.Column("transfer_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("account", sa.String(length=24, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("nano_usd", sa.Numeric(precision=30, scale=0), nullable=False),
        sa.ForeignKeyConstraint(
            ["transfer_id"], ["wallet_transfers.id"], name=op.f("fk_wallet_postings_transfer_id_wallet_transfers")
        ),
        sa.PrimaryKeyConstraint("transfer_id", "account", name=op.f("pk_wallet_postings")),
    )
    op.create_index("ix_wallet_postings_account", "wallet_postings", ["organization_id", "account"], unique=False)
    op.execute(_BALANCED)
    op.execute(
        "CREATE CONSTRAINT TRIGGER wallet_postings_balanced AFTER INSERT ON wallet_postings"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_unbalanced_transfer()"
    )
    for table in _APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table}"
            " FOR EACH ROW EXECUTE FUNCTION refuse_change()"
        )


def downgrade() -> None:
    op.drop_index("ix_wallet_postings_account", table_name="wallet_postings")
    op.drop_table("wallet_postings")
    op.drop_index("ix_wallet_transfers_organization_id", table_name="wallet_transfers")
    op.drop_table("wallet_transfers")
    op.drop_table("uncollected_usage")
    op.drop_index("uq_top_ups_open", table_name="top_ups", postgresql_where=sa.text("state = 'open'"))
    op.drop_table("top_ups")
    op.drop_index("ix_subscriptions_organization_id", table_name="subscriptions")
    op.drop_table("subscriptions")
    op.drop_index("ix_subscription_changes_organization_id", table_name="subscription_changes")
    op.drop_table("subscription_changes")
    op.drop_index(
        "ix_meter_reports_open",
        table_name="meter_reports",
        postgresql_where=sa.text("state IN ('new', 'sent', 'unknown')"),
    )
    op.drop_index("ix_meter_reports_last_sent_at", table_name="meter_reports")
    op.drop_index("ix_meter_reports_event_at", table_name="meter_reports")
    op.drop_table("meter_reports")
    op.drop_table("meter_cursors")
    op.drop_index("ix_meter_checks_state", table_name="meter_checks")
    op.drop_table("meter_checks")
    op.drop_index("ix_invoices_organization_id", table_name="invoices")
    op.drop_table("invoices")
    op.drop_index("ix_emails_due", table_name="emails", postgresql_where=sa.text("state = 'new'"))
    op.drop_table("emails")
    op.drop_index("ix_billing_periods_organization_id", table_name="billing_periods")
    op.drop_table("billing_periods")
    op.drop_table("billing_customers")
    op.drop_table("stripe_marks")
    op.drop_index("ix_stripe_events_due", table_name="stripe_events", postgresql_where=sa.text("state = 'new'"))
    op.drop_table("stripe_events")
    op.drop_table("meter_windows")
    op.execute("DROP FUNCTION refuse_unbalanced_transfer()")
