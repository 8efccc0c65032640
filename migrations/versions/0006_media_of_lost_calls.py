"""media_of_lost_calls.

Revision: 0006, after 0005.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_COLUMNS = ("images", "audio_seconds")


def upgrade() -> None:
    for name in _COLUMNS:
        op.add_column("usage_intents", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    for name in _COLUMNS:
        op.drop_column("usage_intents", name)
