"""business_metrics.

Revision: 0009, after 0008.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "daily_metrics",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("organizations", sa.Integer(), nullable=False),
        sa.Column("paying_organizations", sa.Integer(), nullable=False),
        sa.Column("trialing_organizations", sa.Integer(), nullable=False),
        sa.Column("mrr_cents", sa.BigInteger(), nullable=False),
        sa.Column("new_cents", sa.BigInteger(), nullable=False),
        sa.Column("new_organizations", sa.Integer(), nullable=False),
        sa.Column("reactivation_cents", sa.BigInteger(), nullable=False),
        sa.Column("reactivated_organizations", sa.Integer(), nullable=False),
        sa.Column("expansion_cents", sa.BigInteger(), nullable=False),
        sa.Column("expanded_organizations", sa.Integer(), nullable=False),
        sa.Column("contraction_cents", sa.BigInteger(), nullable=False),
        sa.Column("contracted_organizations", sa.Integer(), nullable=False),
        sa.Column("churn_cents", sa.BigInteger(), nullable=False),
        sa.Column("churned_organizations", sa.Integer(), nullable=False),
        sa.Column("month_ago_organizations", sa.Integer(), nullable=False),
        sa.Column("month_ago_cents", sa.BigInteger(), nullable=False),
        sa.Column("lost_organizations", sa.Integer(), nullable=False),
        sa.Column("lost_cents", sa.BigInteger(), nullable=False),
        sa.Column("daily_active_organizations", sa.Integer(), nullable=False),
        sa.Column("weekly_active_organizations", sa.Integer(), nullable=False),
        sa.Column("monthly_active_organizations", sa.Integer(), nullable=False),
        sa.Column("usage_revenue_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("cost_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("computed_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("day", name=op.f("pk_daily_metrics")),
    )
    op.create_table(
        "mrr_snapshots",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("organization_id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("mrr_cents", sa.BigInteger(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("fk_mrr_snapshots_organization_id_organizations")
        ),
        sa.PrimaryKeyConstraint("day", "organization_id", name=op.f("pk_mrr_snapshots")),
    )
    op.create_index("ix_mrr_snapshots_organization_id", "mrr_snapshots", ["organization_id", "day"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_mrr_snapshots_organization_id", table_name="mrr_snapshots")
    op.drop_table("mrr_snapshots")
    op.drop_table("daily_metrics")
