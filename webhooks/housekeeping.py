"""What is to be done once for all workers: deliveries that nothing is sent of any more, and what is kept no longer."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from core.database import Database, database_now
from core.ids import id_range_start
from core.plain_sql import fetch

_BATCH: Final = 5_000
# Who enables an endpoint waits until its batch is written, so that what is recovered next is not given up. What
# somebody holds is left for the next time.
GIVE_UP: Final = """
WITH disabled AS (
  SELECT id FROM webhook_endpoints e
  WHERE disabled_at IS NOT NULL AND deleted_at IS NULL
    AND EXISTS (SELECT FROM webhook_deliveries p WHERE p.endpoint_id = e.id AND p.state = 'pending')
  FOR SHARE SKIP LOCKED
)
UPDATE webhook_deliveries SET state = 'failed', finished_at = now(),
  last_problem = coalesce(last_problem, 'the endpoint was disabled')
WHERE id IN (
  SELECT d.id FROM disabled e CROSS JOIN LATERAL (
    SELECT id FROM webhook_deliveries p WHERE p.endpoint_id = e.id AND p.state = 'pending' LIMIT $1
    FOR UPDATE SKIP LOCKED
  ) d LIMIT $1
)
RETURNING 1
"""
_DELETE_OF_DELETED: Final = """
WITH gone AS (
  DELETE FROM webhook_deliveries WHERE id IN (
    SELECT d.id FROM webhook_endpoints e
    CROSS JOIN LATERAL (SELECT id FROM webhook_deliveries p WHERE p.endpoint_id = e.id LIMIT $1) d
    WHERE e.deleted_at IS NOT NULL LIMIT $1
  ) RETURNING id
), attempts AS (
  DELETE FROM webhook_attempts WHERE delivery_id IN (SELECT id FROM gone)
)
SELECT id FROM gone
"""
# An hour later nobody can still be making deliveries for it.
_DELETE_ENDPOINTS: Final = """
DELETE FROM webhook_endpoints e
WHERE e.deleted_at < now() - interval '1 hour'
  AND NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.endpoint_id = e.id)
"""
_DELETE_SECRETS: Final = "DELETE FROM webhook_secrets WHERE not_after < now()"
_DELETE_ATTEMPTS: Final = """
DELETE FROM webhook_attempts WHERE (delivery_id, id) IN (
  SELECT delivery_id, id FROM webhook_attempts WHERE delivery_id < $1 ORDER BY delivery_id LIMIT $2
) RETURNING 1
"""
_DELETE_DELIVERIES: Final = """
DELETE FROM webhook_deliveries WHERE id IN (
  SELECT id FROM webhook_deliveries WHERE id < $1 ORDER BY id LIMIT $2
) RETURNING 1
"""
_DELETE_EVENTS: Final = """
DELETE FROM webhook_events WHERE id IN (
  SELECT id FROM webhook_events WHERE id < $1 ORDER BY id LIMIT $2
) RETURNING 1
"""


async def give_up_on_disabled(database: Database) -> int:
    """End the deliveries that disabled endpoints were still due; return how many. They can be recovered."""
    return await _in_batches(database, GIVE_UP)


async def delete_old(database: Database, retention: timedelta) -> int:
    """Delete what is older than *retention*, and what is left of deleted endpoints; return how many rows."""
    async with database.transaction() as session:
        # Not by this machine's clock: one that is ahead would delete everything.
        before = await database_now(session) - retention
    count = await _in_batches(database, _DELETE_OF_DELETED)
    for statement, prefix in ((_DELETE_ATTEMPTS, "dlv"), (_DELETE_DELIVERIES, "dlv"), (_DELETE_EVENTS, "evt")):
        count += await _in_batches(database, statement, id_range_start(prefix, before))
    async with database.transaction() as session:
        await fetch(session, _DELETE_SECRETS)
        await fetch(session, _DELETE_ENDPOINTS)
    return count


async def _in_batches(database: Database, statement: str, *arguments: object) -> int:
    """Run *statement* until it finds less than it may, each time in a transaction of its own."""
    whole = 0
    while True:
        async with database.transaction() as session:
            count = len(await fetch(session, statement, *arguments, _BATCH))
        whole += count
        if count < _BATCH:
            return whole
