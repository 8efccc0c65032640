"""usage_items.

Revision: 0011, after 0010.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_FALSE = sa.text("false")


def upgrade() -> None:
    text = sa.Text()
    op.add_column("billing_periods", sa.Column("is_handed_over", sa.Boolean(), server_default=_FALSE, nullable=False))
    op.add_column(
        "billing_periods", sa.Column("accepted_micro_usd", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column("subscriptions", sa.Column("usage_price_id", sa.String(length=255, collation="C"), nullable=True))
    op.add_column("subscriptions", sa.Column("usage_billed_since", sa.DateTime(timezone=True), nullable=True))
    op.add_column(
        "subscriptions", sa.Column("has_forgotten_usage", sa.Boolean(), server_default=_FALSE, nullable=False)
    )
    op.add_column("subscriptions", sa.Column("usage_problem", text, nullable=True))
    op.add_column("subscriptions", sa.Column("accepted_usage_problem", text, nullable=True))
    op.add_column(
        "billing_customers",
        sa.Column("checkout_ids", postgresql.ARRAY(text), server_default="{}", nullable=False),
    )
    op.execute("UPDATE billing_customers SET checkout_ids = ARRAY[checkout_id::text] WHERE checkout_id IS NOT NULL")
    op.drop_column("billing_customers", "checkout_id")
    op.add_column("invoices", sa.Column("usage_spans", postgresql.TSTZMULTIRANGE(), nullable=True))
    op.execute(
        "UPDATE invoices SET usage_spans = tstzmultirange(tstzrange(usage_starts_at, usage_ends_at))"
        " WHERE usage_starts_at IS NOT NULL"
    )


def downgrade() -> None:
    op.drop_column("invoices", "usage_spans")
    op.add_column("billing_customers", sa.Column("checkout_id", sa.String(length=255, collation="C"), nullable=True))
    op.execute("UPDATE billing_customers SET checkout_id = checkout_ids[array_upper(checkout_ids, 1)]")
    op.drop_column("billing_customers", "checkout_ids")
    for name in (
        "accepted_usage_problem",
        "usage_problem",
        "has_forgotten_usage",
        "usage_billed_since",
        "usage_price_id",
    ):
        op.drop_column("subscriptions", name)
    op.drop_column("billing_periods", "accepted_micro_usd")
    op.drop_column("billing_periods", "is_handed_over")
