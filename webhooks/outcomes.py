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
# taken in the end was taken, whatever a worker that had lost the endpoint wrote before.
_RECORD: Final = """
WITH made AS (
  SELECT * FROM unnest(
    $1::text[], $2::text[], $3::text[], $4::int2[], $5::text[], $6::int4[], $7::bytea[], $8::timestamptz[], $9::text[],
    $10::float8[], $11::int2[]
  ) AS m (
    id, delivery_id, organization_id, status, problem, duration_ms, response_body, started_at, state, pause_seconds,
    step
  )
), kept AS (
  INSERT INTO webhook_attempts (
    id, delivery_id, organization_id, status, problem, duration_ms, response_body, started_at
  )
  SELECT id, delivery_id, organization_id, status, problem, duration_ms, response_body, started_at FROM made
  ORDER BY delivery_id
  ON CONFLICT (delivery_id, id) DO NOTHING
  RETURNING delivery_id, id
)
UPDATE webhook_deliveries d SET
  state = m.state, step = m.step, attempts = d.attempts + 1, last_status = m.status, last_problem = m.problem,
  due_at = now() + make_interval(secs => m.pause_seconds),
  finished_at = CASE WHEN m.state <> 'pending' THEN now() END
FROM kept JOIN made m USING (delivery_id, id)
WHERE d.id = kept.delivery_id AND (d.state = 'pending' OR m.state = 'succeeded')
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


async def record(fetch: Fetch, recorded: list[Recorded]) -> None:
    """Write attempts, and what follows from them. The same ones may be written again. Errors: those of DOWN."""
    await fetch(
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
