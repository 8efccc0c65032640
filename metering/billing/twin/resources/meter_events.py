"""Meter events one by one (v1), and their adjustments."""

from __future__ import annotations

from metering.billing.twin.engine import intake
from metering.billing.twin.engine.intake import Reported
from metering.billing.twin.errors import Executed, Object, invalid
from metering.billing.twin.fields import Fields
from metering.billing.twin.options import DAY_SECONDS
from metering.billing.twin.routing import Call, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

CANCEL_SECONDS_MAX = DAY_SECONDS


def create_meter_event(world: World, call: Call) -> Object:
    """Take in one meter event. Aggregation is later, and so is the news that its customer does not exist.

    Errors: 400 for an unknown event name, a bad value, a time outside the window, a used identifier.
    """
    reported = reported_in(world, call.fields)
    meter = _active_meter(world, reported.event_name)
    customer = intake.customer_in(meter, reported)
    if problem := intake.problem_of_value(meter, reported):
        raise invalid("payload", problem.message, problem.code)
    if problem := intake.problem_of_time(world, customer, reported):
        raise invalid("timestamp", problem.message, problem.code)
    intake.refuse_duplicate(world, reported.identifier)
    usage = intake.take(world, meter, reported)
    return blank(
        "billing.meter_event",
        created=world.wall(),
        event_name=reported.event_name,
        identifier=reported.identifier,
        payload=reported.payload,
        timestamp=usage.timestamp if usage else (reported.timestamp or world.wall()),
    )


def reported_in(world: World, fields: Fields) -> Reported:
    """The event that the parameters describe. Without an identifier, Stripe makes one."""
    if not fields.has("payload"):
        fields.must("payload")
    identifier = intake.check_identifier(fields.string("identifier") or world.make_id("twin"))
    return Reported(fields.must("event_name"), dict(fields.pairs("payload")), identifier, fields.moment("timestamp"))


def _active_meter(world: World, event_name: str) -> Object:
    meter = intake.meter_named(world, event_name)
    if meter is None:
        message = f"No active meter found for event name '{event_name}'."
        raise invalid("event_name", message, "resource_missing")
    if meter["status"] != "active":
        raise invalid("event_name", f"The meter for event name '{event_name}' is archived.", "archived_meter")
    return meter


def create_adjustment(world: World, call: Call) -> Object:
    """Cancel a meter event by its identifier. Errors: 400 once it is older than 24 hours, 404 if it is unknown."""
    fields = call.fields
    fields.one_of("type", "cancel")
    name, identifier = fields.must("event_name"), fields.inner("cancel").must("identifier")
    usage = world.usage.find(identifier)
    if usage is None or usage.event_name != name:
        raise Executed(404, f"No such meter event: '{identifier}'", code="resource_missing", param="cancel[identifier]")
    if world.wall() - usage.received_at > CANCEL_SECONDS_MAX:
        message = "Meter events can only be cancelled within 24 hours of being received."
        raise Executed(400, message, param="cancel[identifier]")
    if usage.is_cancelled:
        raise Executed(400, f"The meter event '{identifier}' is already cancelled.", param="cancel[identifier]")
    usage.is_cancelled = True
    kind = "billing.meter_event_adjustment"
    return blank(kind, cancel={"identifier": identifier}, event_name=name, status="pending", type="cancel")


ROUTES = [
    post("/v1/billing/meter_events", create_meter_event),
    post("/v1/billing/meter_event_adjustments", create_adjustment),
]
