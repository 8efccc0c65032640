"""plan_prices.

Revision: 0010, after 0009.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("prices", sa.Column("plan", sa.String(length=40, collation="C"), nullable=True))
    op.create_index(
        "ix_prices_plan",
        "prices",
        ["plan", "model", "effective_from"],
        unique=False,
        postgresql_where=sa.text("plan IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_prices_plan", table_name="prices", postgresql_where=sa.text("plan IS NOT NULL"))
    op.drop_column("prices", "plan")
