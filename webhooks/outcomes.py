"""What came of attempts, written many at once."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

from core.ids import new_id
from webhooks.attempts import Outcome
from webhooks.schedule import pause_after
from webhooks.targets import Fetch

_OURS_PAUSE_SECONDS: Final = 60.0
# Said a second time, because whether the first try was committed is not known, an attempt changes nothing. What was
# taken in the end was taken, whatever a worker that had lost the endpoint wrote before. Deliveries that somebody holds,
# a replay for instance, are left for later: nobody else's attempts wait for them.
_RECORD: Final = """
WITH made AS (
  SELECT * FROM unnest(
    $1::text[], $2::text[], $3::text[], $4::int2[], $5::text[], $6::int4[], $7::bytea[], $8::timestamptz[], $9::text[],
    $10::float8[], $11::int2[]
  ) AS m (
    id, delivery_id, organization_id, status, problem, duration_ms, response_body, started_at, state, pause_seconds,
    step
  )
), free AS (
  SELECT id, state FROM webhook_deliveries WHERE id = ANY ($2::text[]) FOR UPDATE SKIP LOCKED
), kept AS (
  INSERT INTO webhook_attempts (
    id, delivery_id, organization_id, status, problem, duration_ms, response_body, started_at
  )
  SELECT id, delivery_id, organization_id, status, problem, duration_ms, response_body, started_at FROM made
  WHERE delivery_id IN (SELECT id FROM free)
  ORDER BY delivery_id
  ON CONFLICT (delivery_id, id) DO NOTHING
  RETURNING delivery_id, id
), counted AS (
  UPDATE webhook_deliveries d SET
    attempts = d.attempts + 1,
    state = CASE WHEN n.is_news THEN n.state ELSE d.state END,
    step = CASE WHEN n.is_news THEN n.step ELSE d.step END,
    due_at = CASE WHEN n.is_news THEN now() + make_interval(secs => n.pause_seconds) ELSE d.due_at END,
    finished_at = CASE WHEN NOT n.is_news THEN d.finished_at WHEN n.state <> 'pending' THEN now() END,
    last_status = CASE WHEN n.is_news OR d.state = 'failed' THEN n.status ELSE d.last_status END,
    last_problem = CASE WHEN n.is_news OR d.state = 'failed' THEN n.problem ELSE d.last_problem END
  FROM (
    SELECT m.*, f.state = 'pending' OR m.state = 'succeeded' AS is_news
    FROM kept JOIN made m USING (delivery_id, id) JOIN free f ON f.id = kept.delivery_id
  ) AS n
  WHERE d.id = n.delivery_id
)
SELECT id FROM webhook_deliveries WHERE id = ANY ($2::text[]) AND id NOT IN (SELECT id FROM free)
"""


class Due(NamedTuple):
    """A delivery whose time has come."""

    delivery_id: str
    organization_id: str
    endpoint_id: str
    event_id: str
    event_type: str
    step: int
    created_at: datetime
    """Of the event."""
    data: str
    asked_at: datetime
    """When it was first to be sent: when the event happened, or its owner asked for it again."""


class Recorded(NamedTuple):
    """An attempt with what follows from it for its delivery."""

    attempt_id: str
    due: Due
    outcome: Outcome
    state: str
    pause_seconds: float
    """Until the next attempt, counted on PostgreSQL's clock from when this is written."""
    step: int


def conclude(due: Due, outcome: Outcome, *, is_current: bool = True) -> Recorded:
    """Return what an attempt means for its delivery: done, another time, or given up.

    Without *is_current* it was sent to where the endpoint no longer is: that this one is gone ends nothing.
    """
    if outcome.is_ours:
        return Recorded(new_id("wat"), due, outcome, "pending", _OURS_PAUSE_SECONDS, due.step)
    step = due.step + 1
    state, pause = "succeeded", None
    if outcome.problem is not None:
        pause = pause_after(step, retry_after_seconds=outcome.retry_after_seconds)
        state = "failed" if pause is None or (outcome.status == 410 and is_current) else "pending"
    return Recorded(new_id("wat"), due, outcome, state, pause or 0.0, step)


async def record(fetch: Fetch, recorded: list[Recorded]) -> set[str]:
    """Write attempts, and what follows from them; return deliveries that somebody holds, whose are not written.

    The same ones may be written again. Errors: those of DOWN.
    """
    held = await fetch(
        _RECORD,
        [one.attempt_id for one in recorded],
        [one.due.delivery_id for one in recorded],
        [one.due.organization_id for one in recorded],
        [one.outcome.status for one in recorded],
        [one.outcome.problem for one in recorded],
        [one.outcome.duration_ms for one in recorded],
        [one.outcome.response_body for one in recorded],
        [one.outcome.started_at for one in recorded],
        [one.state for one in recorded],
        [one.pause_seconds for one in recorded],
        [one.step for one in recorded],
    )
    return {row["id"] for row in held}
