"""The inbox: what Stripe tells us is stored once, by its event's id, and applied later by a worker.

An event is believed only if Stripe signed its very bytes within the last five minutes. Of its content no more than what
happened to which object is kept; the object is read anew when the event is applied (`metering/billing/apply.py`), so
that the order in which events come makes no difference. PostgreSQL down: the event is not acknowledged, and Stripe
sends it again for three days; what was missed for longer is found by `catch_up`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import msgspec
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database, database_now
from core.errors import Invalid
from metering.billing.stripe_objects import Event, read_event
from metering.billing.tables import StripeEventRow

BODY_BYTES_MAX: Final = 512 * 1024
"""Stripe's own are below 256 kB."""
KINDS: Final = (
    "checkout.session.completed",
    "checkout.session.async_payment_succeeded",
    "customer.subscription.created",
    "customer.subscription.updated",
    "customer.subscription.deleted",
    "customer.subscription.paused",
    "customer.subscription.resumed",
    "customer.subscription.trial_will_end",
    "customer.subscription.pending_update_applied",
    "customer.subscription.pending_update_expired",
    "invoice.created",
    "invoice.updated",
    "invoice.finalized",
    "invoice.finalization_failed",
    "invoice.paid",
    "invoice.payment_failed",
    "invoice.payment_action_required",
    "invoice.overdue",
    "invoice.voided",
    "invoice.deleted",
    "invoice.marked_uncollectible",
    "payment_intent.succeeded",
    "payment_intent.payment_failed",
)
"""The events that something follows from, for an endpoint at Stripe and for `catch_up`."""
THIN_KINDS: Final = ("v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found")
ATTEMPTS_MAX: Final = 12
_RETRY_MAX: Final = timedelta(hours=1)


class EventUnsigned(Invalid):
    """The signature is not Stripe's, or is too old. Nothing was stored."""

    code = "signature_invalid"

    def __init__(self) -> None:
        super().__init__("Invalid signature.")


class EventUnreadable(Invalid):
    """Signed, and yet no event as we know them."""

    code = "event_invalid"

    def __init__(self) -> None:
        super().__init__("This is not a Stripe event.")


def read_body(body: bytes) -> Event:
    """Return the event in *body*. Errors: EventUnreadable."""
    try:
        source: Any = msgspec.json.decode(body)
        event = read_event(source)
        return msgspec.convert(msgspec.to_builtins(event), Event)
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError):
        raise EventUnreadable from None


async def store(session: AsyncSession, events: Sequence[Event], *, source: str) -> int:
    """Store events that are not stored yet; return how many that are. Those that nothing follows from are left out."""
    rows = [
        {
            "id": event.id,
            "type": event.type,
            "object_id": event.object_id,
            "occurred_at": event.occurred_at,
            "source": source,
        }
        for event in events
        if event.type in KINDS or event.type in THIN_KINDS
    ]
    if not rows:
        return 0
    stored = await session.execute(
        insert(StripeEventRow).values(rows).on_conflict_do_nothing().returning(StripeEventRow.id)
    )
    return len(stored.all())


class Inbox:
    """Takes events in, in an API process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def receive(self, body: bytes) -> bool:
        """Store the event in *body*, whose signature was checked; False where it was stored before.

        Errors: EventUnreadable; those of `core.database.DOWN`.
        """
        event = read_body(body)
        async with self._database.transaction() as session:
            return await store(session, [event], source="webhook") == 1


async def claim(session: AsyncSession, lease: timedelta) -> StripeEventRow | None:
    """Return the event that is due longest, for *lease* the caller's alone. Each claim is an attempt."""
    row = await session.scalar(
        select(StripeEventRow)
        .where(StripeEventRow.state == "new", StripeEventRow.due_at <= func.now())
        .order_by(StripeEventRow.due_at, StripeEventRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if row is None:
        return None
    row.attempts += 1
    row.due_at = await database_now(session) + lease
    return row


async def finish(session: AsyncSession, event_id: str, state: str) -> None:
    """Write down that an event was applied, or that nothing follows from it."""
    await session.execute(
        update(StripeEventRow)
        .where(StripeEventRow.id == event_id)
        .values(state=state, applied_at=func.now(), problem=None)
    )


async def fail(session: AsyncSession, event_id: str, problem: str, *, is_stripes: bool) -> bool:
    """Try an event again later; give it up after ATTEMPTS_MAX, unless the failure was all of Stripe's. True: given up.

    What is given up stays, and an operator can have it tried again (`aap stripe events --replay`).
    """
    row = await session.get(StripeEventRow, event_id, with_for_update=True)
    if row is None or row.state != "new":
        return False
    if is_stripes:
        row.attempts -= 1
    pause = min(timedelta(seconds=2.0 ** min(row.attempts, 16)), _RETRY_MAX)
    row.problem = problem[:500]
    row.due_at = await database_now(session) + pause
    is_given_up = row.attempts >= ATTEMPTS_MAX
    if is_given_up:
        row.state = "dead"
    return is_given_up


async def dismiss(session: AsyncSession, event_id: str) -> bool:
    """Let an event that was given up count no more; False where there is none."""
    found = await session.scalar(
        update(StripeEventRow)
        .where(StripeEventRow.id == event_id, StripeEventRow.state == "dead")
        .values(state="ignored")
        .returning(StripeEventRow.id)
    )
    return found is not None


async def replay(session: AsyncSession, event_id: str | None = None) -> int:
    """Have an event that was given up applied again, or (None) all of them; return how many."""
    statement = update(StripeEventRow).where(StripeEventRow.state == "dead")
    if event_id is not None:
        statement = update(StripeEventRow).where(StripeEventRow.id == event_id)
    rows = await session.execute(
        statement.values(state="new", attempts=0, due_at=func.now()).returning(StripeEventRow.id)
    )
    return len(rows.all())
