"""webhooks.

Revision: 0012, after 0011.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "webhook_attempts",
        sa.Column("delivery_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("status", sa.SmallInteger(), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("duration_ms", sa.Integer(), nullable=False),
        sa.Column("response_body", sa.LargeBinary(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("delivery_id", "id", name=op.f("pk_webhook_attempts")),
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("endpoint_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("event_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("event_type", sa.String(length=64, collation="C"), nullable=False),
        sa.Column("state", sa.String(length=12, collation="C"), server_default="pending", nullable=False),
        sa.Column("step", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("last_status", sa.SmallInteger(), nullable=True),
        sa.Column("last_problem", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
    )
    op.create_index(
        "ix_webhook_deliveries_due",
        "webhook_deliveries",
        ["endpoint_id", "due_at"],
        unique=False,
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index("ix_webhook_deliveries_endpoint_id", "webhook_deliveries", ["endpoint_id", "id"], unique=False)
    op.create_index(
        "ix_webhook_deliveries_failed",
        "webhook_deliveries",
        ["endpoint_id", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'failed'"),
    )
    op.create_table(
        "webhook_events",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("type", sa.String(length=64, collation="C"), nullable=False),
        sa.Column("data", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("endpoint_id", sa.String(length=40, collation="C"), nullable=True),
        sa.Column("is_fanned_out", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_events")),
    )
    op.create_index("ix_webhook_events_organization_id", "webhook_events", ["organization_id", "id"], unique=False)
    op.create_index(
        "ix_webhook_events_waiting",
        "webhook_events",
        ["id"],
        unique=False,
        postgresql_where=sa.text("NOT is_fanned_out"),
    )
    op.create_index(
        "ix_webhook_events_trouble",
        "webhook_events",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("type LIKE 'webhook.endpoint.%'"),
    )
    op.create_table(
        "webhook_workers",
        sa.Column("worker_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_webhook_workers")),
    )
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), server_default="", nullable=False),
        sa.Column("event_types", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("filter", sa.Text(), nullable=True),
        sa.Column("sealed_headers", sa.LargeBinary(), nullable=True),
        sa.Column("requests_per_second", sa.Integer(), nullable=True),
        sa.Column("is_secret_revealable", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("disabled_reason", sa.String(length=64, collation="C"), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("failing_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("consecutive_failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("warned_percent", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("resting_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_success_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_problem", sa.Text(), nullable=True),
        sa.Column("worker_id", sa.String(length=40, collation="C"), nullable=True),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("enabled_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_webhook_endpoints_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoints")),
    )
    op.create_index(
        "ix_webhook_endpoints_organization_id", "webhook_endpoints", ["organization_id", "id"], unique=False
    )
    op.create_table(
        "webhook_secrets",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("endpoint_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("not_after", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
            name=op.f("fk_webhook_secrets_endpoint_id_webhook_endpoints"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_webhook_secrets_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_secrets")),
    )
    op.create_index(op.f("ix_webhook_secrets_endpoint_id"), "webhook_secrets", ["endpoint_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_webhook_secrets_endpoint_id"), table_name="webhook_secrets")
    op.drop_table("webhook_secrets")
    op.drop_index("ix_webhook_endpoints_organization_id", table_name="webhook_endpoints")
    op.drop_table("webhook_endpoints")
    op.drop_table("webhook_workers")
    op.drop_index(
        "ix_webhook_events_waiting", table_name="webhook_events", postgresql_where=sa.text("NOT is_fanned_out")
    )
    op.drop_index(
        "ix_webhook_events_trouble",
        table_name="webhook_events",
        postgresql_where=sa.text("type LIKE 'webhook.endpoint.%'"),
    )
    op.drop_index("ix_webhook_events_organization_id", table_name="webhook_events")
    op.drop_table("webhook_events")
    op.drop_index(
        "ix_webhook_deliveries_failed", table_name="webhook_deliveries", postgresql_where=sa.text("state = 'failed'")
    )
    op.drop_index("ix_webhook_deliveries_endpoint_id", table_name="webhook_deliveries")
    op.drop_index(
        "ix_webhook_deliveries_due", table_name="webhook_deliveries", postgresql_where=sa.text("state = 'pending'")
    )
    op.drop_table("webhook_deliveries")
    op.drop_table("webhook_attempts")
