"""Meters, and the sums of what they counted."""

from __future__ import annotations

from metering.billing.twin.engine.lines import Span
from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.listing import only, page
from metering.billing.twin.routing import Call, get, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

EVENT_NAME_LENGTH_MAX = 100
_STEP_SECONDS = {"hour": 3_600, "day": 86_400}
_MINUTE_SECONDS = 60


def create_meter(world: World, call: Call) -> Object:
    """Create a meter. Errors: 400 if an active meter has its event name."""
    fields = call.fields
    name = fields.must("event_name")
    if len(name) > EVENT_NAME_LENGTH_MAX:
        raise invalid("event_name", f"Event names have at most {EVENT_NAME_LENGTH_MAX} characters.")
    if any(one["event_name"] == name and one["status"] == "active" for one in world.tables["billing.meter"].values()):
        raise invalid(
            "event_name", f"An active meter with the event name '{name}' already exists.", "resource_already_exists"
        )
    aggregation = fields.inner("default_aggregation")
    aggregation.must("formula")
    mapping = fields.inner("customer_mapping")
    made = blank(
        "billing.meter",
        id=world.make_id("mtr"),
        created=world.wall(),
        updated=world.wall(),
        customer_mapping={
            "event_payload_key": mapping.string("event_payload_key") or "stripe_customer_id",
            "type": "by_id",
        },
        default_aggregation={"formula": aggregation.one_of("formula", "sum", "count", "last")},
        display_name=fields.must("display_name"),
        event_name=name,
        event_time_window=fields.one_of("event_time_window", "hour", "day"),
        status="active",
        status_transitions={"deactivated_at": None},
        value_settings={"event_payload_key": fields.inner("value_settings").string("event_payload_key") or "value"},
    )
    world.add(made)
    world.emit("billing.meter.created", made)
    return made


def update_meter(world: World, call: Call) -> Object:
    """Change the display name: nothing else of a meter can be changed."""
    held = world.find("billing.meter", call.id)
    held["display_name"] = call.fields.string("display_name") or held["display_name"]
    held["updated"] = world.wall()
    world.emit("billing.meter.updated", held)
    return held


def retrieve_meter(world: World, call: Call) -> Object:
    """One meter."""
    return world.find("billing.meter", call.id)


def list_meters(world: World, call: Call) -> Object:
    """Meters, by `status`."""
    return page(only(world.tables["billing.meter"].values(), call.fields, "status"), call.fields, call.url)


def deactivate_meter(world: World, call: Call) -> Object:
    """Close a meter: it takes no more events."""
    held = world.find("billing.meter", call.id)
    if held["status"] == "inactive":
        raise invalid("id", "This meter is already inactive.", "resource_missing")
    held["status"] = "inactive"
    held["status_transitions"]["deactivated_at"] = held["updated"] = world.wall()
    world.emit("billing.meter.deactivated", held)
    return held


def reactivate_meter(world: World, call: Call) -> Object:
    """Open a closed meter again."""
    held = world.find("billing.meter", call.id)
    held["status"] = "active"
    held["status_transitions"]["deactivated_at"] = None
    world.emit("billing.meter.reactivated", held)
    return held


def list_event_summaries(world: World, call: Call) -> Object:
    """The customer's sums in [start_time, end_time): one, or one for each hour or day that is not empty.

    Errors: 400 unless both times are aligned with minutes (ungrouped), hours or days.
    """
    meter, fields = world.find("billing.meter", call.id), call.fields
    customer = fields.must("customer")
    step = fields.one_of("value_grouping_window", "hour", "day")
    span = Span(fields.must_moment("start_time"), fields.must_moment("end_time"))
    alignment = _STEP_SECONDS[step] if step else _MINUTE_SECONDS
    for name, at in (("start_time", span.start), ("end_time", span.end)):
        if at % alignment:
            raise invalid(name, f"Timestamps must be aligned with {step or 'minute'} boundaries (UTC).")
    if span.start >= span.end:
        raise invalid("end_time", "The end time must be after the start time.")
    if step is None:
        return page([_summary(world, meter, customer, span)], fields, call.url)
    starts = range(span.start, span.end, alignment)
    rows = [
        _summary(world, meter, customer, Span(start, start + alignment))
        for start in _used(world, meter, customer, starts)
    ]
    return page(rows, fields, call.url)


def _used(world: World, meter: Object, customer: str, starts: range) -> list[int]:
    """The windows that hold an event: Stripe lists no empty ones."""
    held = world.usage.timestamps(meter["event_name"], customer)
    return sorted({starts[(at - starts.start) // starts.step] for at in held if starts.start <= at < starts.stop})


def _summary(world: World, meter: Object, customer: str, span: Span) -> Object:
    # The id stays the same from call to call, or paging by cursor would break.
    return blank(
        "billing.meter_event_summary",
        id=f"mtrusg_{meter['id'][4:12]}{span.start}{span.end - span.start}",
        aggregated_value=world.visible_usage(meter, customer, span.start, span.end),
        start_time=span.start,
        end_time=span.end,
        meter=meter["id"],
    )


ROUTES = [
    post("/v1/billing/meters", create_meter),
    get("/v1/billing/meters", list_meters),
    get("/v1/billing/meters/{id}", retrieve_meter),
    post("/v1/billing/meters/{id}", update_meter),
    post("/v1/billing/meters/{id}/deactivate", deactivate_meter),
    post("/v1/billing/meters/{id}/reactivate", reactivate_meter),
    get("/v1/billing/meters/{id}/event_summaries", list_event_summaries),
]
