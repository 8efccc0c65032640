"""When each key was last used, written once a minute a process: no write on the hot path."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import text

from core.database import Database
from core.ids import KeyId

# Accurate to a minute: "is this key still used?" needs no more.
FLUSH_SECONDS = 60.0
_UPDATE = text(
    """
    UPDATE api_keys SET last_used_at = mark.used_at
    FROM unnest(CAST(:ids AS text[]), CAST(:times AS timestamptz[])) AS mark (id, used_at)
    WHERE api_keys.id = mark.id AND (api_keys.last_used_at IS NULL OR api_keys.last_used_at < mark.used_at)
    """
)


async def flush(database: Database, last_used: dict[KeyId, float]) -> int:
    """Write and empty *last_used* (epoch seconds by key); return how many. PostgreSQL down: kept for the next time."""
    if not last_used:
        return 0
    marks = dict(last_used)
    last_used.clear()
    try:
        async with database.transaction() as session:
            # In the order of the ids: two gateways that write the same rows must not wait for each other.
            ids = sorted(marks)
            times = [datetime.fromtimestamp(marks[key_id], UTC) for key_id in ids]
            await session.execute(_UPDATE, {"ids": ids, "times": times})
    except Exception:
        for key_id, moment in marks.items():
            last_used.setdefault(key_id, moment)
        raise
    return len(marks)
