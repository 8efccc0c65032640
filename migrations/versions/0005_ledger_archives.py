"""ledger_archives.

Revision: 0005, after 0004.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# A month is dropped only as it was archived: what has come since must be archived too. That it was dropped is written
# down in the same transaction. Readers go on meanwhile; to detach the month, entries are held up for a moment, which is
# not worth waiting for while somebody reads for long: another time will do.
_DROP_MONTH = """
CREATE FUNCTION drop_ledger_month(
  name text, archive_id text, month timestamptz, rows_archived bigint, digest text
) RETURNS boolean LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE rows_now bigint;
BEGIN
  EXECUTE format('LOCK TABLE %I IN SHARE ROW EXCLUSIVE MODE', name);
  EXECUTE format('SELECT count(*) FROM %I', name) INTO rows_now;
  IF rows_now <> rows_archived THEN
    RETURN false;
  END IF;
  EXECUTE format('ALTER TABLE ledger_entries DETACH PARTITION %I', name);
  EXECUTE format('DROP TABLE %I', name);
  INSERT INTO ledger_archives (id, month, entries, digest) VALUES (archive_id, month, rows_archived, digest);
  RETURN true;
EXCEPTION WHEN lock_not_available OR undefined_table THEN
  RETURN false;
END
$$
"""
_DROP_MONTH_BEFORE = """
CREATE FUNCTION drop_ledger_month(month regclass, rows_archived bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE rows_now bigint;
BEGIN
  EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', month);
  EXECUTE format('SELECT count(*) FROM %s', month) INTO rows_now;
  IF rows_now = rows_archived THEN
    EXECUTE format('ALTER TABLE ledger_entries DETACH PARTITION %s', month);
    EXECUTE format('DROP TABLE %s', month);
  END IF;
END
$$
"""


def upgrade() -> None:
    op.create_table(
        "ledger_archives",
        sa.Column("id", sa.String(length=40, collation="C"), nullable=False),
        sa.Column("month", sa.DateTime(timezone=True), nullable=False),
        sa.Column("entries", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("archived_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger_archives")),
    )
    op.execute("DROP FUNCTION drop_ledger_month(regclass, bigint)")
    op.execute(_DROP_MONTH)


def downgrade() -> None:
    op.execute("DROP FUNCTION drop_ledger_month(text, text, timestamptz, bigint, text)")
    op.execute(_DROP_MONTH_BEFORE)
    op.drop_table("ledger_archives")
