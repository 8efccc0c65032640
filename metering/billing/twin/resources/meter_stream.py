"""Meter events by the hundred (v2): a session of fifteen minutes, and a stream that checks nothing at once."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from metering.billing.twin.engine import intake
from metering.billing.twin.engine.intake import Problem, Reported
from metering.billing.twin.errors import Object, StripeError, invalid
from metering.billing.twin.fields import Fields
from metering.billing.twin.routing import Call, post
from metering.billing.twin.world import World, iso

SESSION_SECONDS = 15 * 60
EVENTS_MAX = 100


def create_session(world: World, call: Call) -> Object:
    """Open a session: its token is the stream's bearer for fifteen minutes."""
    del call
    now = world.wall()
    token = world.make_id("token")
    made: Object = {
        "id": world.make_id("mes"),
        "object": "v2.billing.meter_event_session",
        "authentication_token": token,
        "created": iso(now),
        "expires_at": iso(now + SESSION_SECONDS),
        "livemode": False,
        "_expires_at": now + SESSION_SECONDS,
    }
    world.tables["stream_token"][token] = made
    return made


def create_stream(world: World, call: Call) -> Object:
    """Accept up to a hundred events. Whatever is wrong with one is told by a thin event later.

    Errors: 401 for an expired session, 400 for more than a hundred events or a body that is no list of events.
    """
    session = world.tables["stream_token"].get(call.bearer)
    if session is None or session["_expires_at"] <= world.wall():
        message = "The meter event session has expired. Create a new one."
        raise StripeError(401, message, code="billing_meter_event_session_expired", kind="temporary_session_expired")
    rows = call.fields.rows("events")
    if len(rows) > EVENTS_MAX:
        raise invalid("events", f"At most {EVENTS_MAX} events fit in one request.", "too_many_events")
    for reported in [_reported_in(world, row) for row in rows]:
        _take(world, reported)
    return {}


def _reported_in(world: World, row: Fields) -> Reported:
    identifier = intake.check_identifier(row.string("identifier") or world.make_id("twin"))
    payload: dict[str, Any] = dict(row.pairs("payload"))
    return Reported(row.must("event_name"), payload, identifier, _seconds(row))


def _seconds(row: Fields) -> int | None:
    text = row.string("timestamp")
    if text is None:
        return None
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except ValueError:
        raise invalid(row.name_of("timestamp"), f"Invalid timestamp: {text}") from None


def _take(world: World, reported: Reported) -> None:
    meter = intake.meter_named(world, reported.event_name)
    if meter is None:
        intake.fail(world, "", reported, Problem("no_meter", f"No meter for event name '{reported.event_name}'."))
        return
    customer = intake.customer_in(meter, reported)
    problem = (
        Problem("archived_meter", "The meter is archived.")
        if meter["status"] != "active"
        else intake.problem_of_value(meter, reported) or intake.problem_of_time(world, customer, reported)
    )
    if problem:
        intake.fail(world, meter["id"], reported, problem)
    elif not intake.is_duplicate(world, reported.identifier):
        intake.take(world, meter, reported)


ROUTES = [
    post("/v2/billing/meter_event_session", create_session),
    post("/v2/billing/meter_event_stream", create_stream, access="session_token"),
]
