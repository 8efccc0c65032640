"""Alembic's entry: runs on the connection that `core.migrations` hands over."""

from alembic import context

from core.database import Table
from keys import tables as keys_tables
from metering import tables as metering_tables

assert keys_tables.KeyRow.metadata is metering_tables.PriceRow.metadata is Table.metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Table.metadata, compare_type=True)
context.run_migrations()
