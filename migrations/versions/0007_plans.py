"""plans.

Revision: 0007, after 0006.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_ID = sa.String(40, collation="C")
_WHEN = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("organizations", sa.Column("plan", _ID, nullable=True))
    op.add_column("organizations", sa.Column("status", sa.String(16), nullable=False, server_default="active"))
    op.add_column("organizations", sa.Column("status_reason", sa.Text(), nullable=True))
    op.create_table(
        "allowance_events",
        sa.Column("organization_id", _ID, nullable=False),
        sa.Column("unit", sa.Text(collation="C"), nullable=False),
        sa.Column("starts_at", _WHEN, nullable=False),
        sa.Column("threshold_percent", sa.SmallInteger(), nullable=False),
        sa.Column("used", sa.BigInteger(), nullable=False),
        sa.Column("limit", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _WHEN, nullable=False, server_default=sa.func.now()),
        sa.PrimaryKeyConstraint(
            "organization_id", "unit", "starts_at", "threshold_percent", name=op.f("pk_allowance_events")
        ),
    )


def downgrade() -> None:
    op.drop_table("allowance_events")
    for name in ("status_reason", "status", "plan"):
        op.drop_column("organizations", name)
