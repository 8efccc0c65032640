"""Alembic's entry: runs on the connection that `core.migrations` hands over."""

from alembic import context

from core.database import Table
from gateway import tables as gateway_tables
from keys import tables as keys_tables
from metering import tables as metering_tables
from metering.billing import metrics_tables
from metering.billing import tables as billing_tables
from webhooks import tables as webhooks_tables

_ROWS = (
    keys_tables.KeyRow,
    webhooks_tables.WebhookEndpointRow,
    metering_tables.PriceRow,
    billing_tables.SubscriptionRow,
    metrics_tables.DailyMetricsRow,
    gateway_tables.IdempotentAnswerRow,
)
assert all(row.metadata is Table.metadata for row in _ROWS)

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Table.metadata, compare_type=True)
context.run_migrations()
