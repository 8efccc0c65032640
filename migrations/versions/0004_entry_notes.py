"""entry_notes.

Revision: 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# The statement by which every entry is made (metering/settle.sql) names its columns and knows of no notes. Who corrects
# by hand says why for the length of a transaction (metering/adjustments.py); else there is nothing to note.
_NOTE = "nullif(current_setting('aap.entry_note', true), '')"


def upgrade() -> None:
    op.add_column("ledger_entries", sa.Column("note", sa.Text(), nullable=True, server_default=sa.text(_NOTE)))


def downgrade() -> None:
    op.drop_column("ledger_entries", "note")
