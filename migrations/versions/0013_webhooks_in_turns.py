"""webhooks_in_turns.

Revision: 0013, after 0012.
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_WAITING = sa.text("NOT is_fanned_out")


def upgrade() -> None:
    op.drop_index("ix_webhook_events_waiting", table_name="webhook_events", postgresql_where=_WAITING)
    op.create_index("ix_webhook_events_waiting", "webhook_events", ["organization_id", "id"], postgresql_where=_WAITING)
    op.add_column("webhook_deliveries", sa.Column("requested_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("webhook_deliveries", "requested_at")
    op.drop_index("ix_webhook_events_waiting", table_name="webhook_events", postgresql_where=_WAITING)
    op.create_index("ix_webhook_events_waiting", "webhook_events", ["id"], postgresql_where=_WAITING)
