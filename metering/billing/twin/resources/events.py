"""Events, and who is told of them: endpoints for snapshots, destinations for thin ones."""

from __future__ import annotations

from metering.billing.twin.errors import Object, invalid, missing, not_found, part
from metering.billing.twin.fields import Fields, merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.options import DAY_SECONDS
from metering.billing.twin.routing import Call, delete, get, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World, iso

# stripe-python: EventListParams.types.
_TYPES_MAX = 20
_DESTINATION = "v2.core.event_destination"


def retrieve_event(world: World, call: Call) -> Object:
    """One snapshot event of the past 30 days."""
    event = world.find("event", call.id)
    if not _is_kept(world, event):
        raise not_found("event", call.id)
    return event


def _is_kept(world: World, event: Object) -> bool:
    return bool(world.wall() - event["_at"] <= world.options.event_retention_days * DAY_SECONDS)


def list_events(world: World, call: Call) -> Object:
    """Snapshot events, newest first, by `type`, `types` and `created`."""
    fields = call.fields
    types = fields.strings("types")
    if len(types) > _TYPES_MAX:
        raise invalid("types", f"You can list at most {_TYPES_MAX} types.")
    found = only(world.tables["event"].values(), fields, "type")
    return page(
        [one for one in found if _is_kept(world, one) and (not types or one["type"] in types)], fields, call.url
    )


def create_endpoint(world: World, call: Call) -> Object:
    """Register a URL for snapshot events. Only this answer tells the secret."""
    fields = call.fields
    events = fields.strings("enabled_events")
    if not events:
        raise missing("enabled_events")
    made = add_endpoint(world, fields.must("url"), events)
    made["description"] = fields.string("description")
    made["metadata"] = merge_metadata({}, fields)
    return made | {"secret": made["_secret"]}


def add_endpoint(world: World, url: str, enabled_events: list[str]) -> Object:
    """Have snapshot events sent to *url*."""
    secret = world.options.webhook_secret or world.make_id("whsec")
    made = blank(
        "webhook_endpoint",
        id=world.make_id("we"),
        created=world.wall(),
        enabled_events=enabled_events,
        url=url,
        _secret=secret,
    )
    return world.add(made)


def retrieve_endpoint(world: World, call: Call) -> Object:
    """One endpoint, without its secret."""
    return world.find("webhook_endpoint", call.id)


def update_endpoint(world: World, call: Call) -> Object:
    """Change the URL, the events, or whether it is disabled."""
    held, fields = world.find("webhook_endpoint", call.id), call.fields
    held["url"] = fields.string("url") or held["url"]
    held["enabled_events"] = fields.strings("enabled_events") or held["enabled_events"]
    if (is_disabled := fields.flag("disabled")) is not None:
        held["status"] = "disabled" if is_disabled else "enabled"
    held["metadata"] = merge_metadata(held["metadata"], fields)
    return held


def list_endpoints(world: World, call: Call) -> Object:
    """All endpoints."""
    return page(only(world.tables["webhook_endpoint"].values(), call.fields), call.fields, call.url)


def delete_endpoint(world: World, call: Call) -> Object:
    """Forget an endpoint."""
    world.find("webhook_endpoint", call.id)
    del world.tables["webhook_endpoint"][call.id]
    return {"id": call.id, "object": "webhook_endpoint", "deleted": True}


def create_destination(world: World, call: Call) -> Object:
    """Register a URL for thin events. The secret is told if `include` asks for it."""
    fields = call.fields
    if fields.string("type") != "webhook_endpoint":
        raise invalid("type", "This twin has destinations of type `webhook_endpoint` only.")
    for name in ("name", "event_payload"):
        fields.must(name)
    url = fields.inner("webhook_endpoint").must("url")
    made = add_destination(world, url, fields.strings("enabled_events"), fields)
    return _destination_answer(made, fields.strings("include"))


def add_destination(world: World, url: str, enabled_events: list[str], fields: Fields | None = None) -> Object:
    """Have thin events sent to *url*."""
    asked = fields or Fields({})
    now = iso(world.wall())
    identity = world.make_id("ed_test")
    made: Object = {
        "id": identity,
        "object": _DESTINATION,
        "created": now,
        "updated": now,
        "livemode": False,
        "description": asked.string("description") or "",
        "enabled_events": enabled_events,
        "events_from": ["self"],
        "event_payload": asked.string("event_payload") or "thin",
        "name": asked.string("name") or "twin",
        "metadata": merge_metadata({}, asked),
        "snapshot_api_version": None,
        "status": "enabled",
        "status_details": None,
        "type": "webhook_endpoint",
        "amazon_eventbridge": None,
        "_url": url,
        "_secret": world.options.webhook_secret or world.make_id("whsec"),
    }
    world.tables[_DESTINATION][identity] = made
    return made


def _destination_answer(held: Object, include: list[str]) -> Object:
    shown = {
        "url": held["_url"] if "webhook_endpoint.url" in include else None,
        "signing_secret": held["_secret"] if "webhook_endpoint.signing_secret" in include else None,
    }
    return held | {"webhook_endpoint": shown}


def retrieve_destination(world: World, call: Call) -> Object:
    """One destination."""
    held = world.find(_DESTINATION, call.id)
    return _destination_answer(held, call.fields.strings("include"))


def list_destinations(world: World, call: Call) -> Object:
    """All destinations, as the v2 API lists."""
    include = call.fields.strings("include")
    held = world.tables[_DESTINATION].values()
    return _v2_page([_destination_answer(one, include) for one in held])


def delete_destination(world: World, call: Call) -> Object:
    """Forget a destination."""
    world.find(_DESTINATION, call.id)
    del world.tables[_DESTINATION][call.id]
    return {"id": call.id, "object": _DESTINATION, "deleted": True}


def retrieve_thin_event(world: World, call: Call) -> Object:
    """One thin event with its data."""
    return world.find("v2.core.event", call.id)


def list_thin_events(world: World, call: Call) -> Object:
    """Thin events, newest first, by `object_id`."""
    wanted = call.fields.string("object_id")
    found = [
        one
        for one in reversed(world.tables["v2.core.event"].values())
        if wanted is None or part(one, "related_object").get("id") == wanted
    ]
    return _v2_page(found)


def _v2_page(found: list[Object]) -> Object:
    return {"data": found, "next_page_url": None, "previous_page_url": None}


ROUTES = [
    get("/v1/events", list_events),
    get("/v1/events/{id}", retrieve_event),
    post("/v1/webhook_endpoints", create_endpoint),
    get("/v1/webhook_endpoints", list_endpoints),
    get("/v1/webhook_endpoints/{id}", retrieve_endpoint),
    post("/v1/webhook_endpoints/{id}", update_endpoint),
    delete("/v1/webhook_endpoints/{id}", delete_endpoint),
    post("/v2/core/event_destinations", create_destination),
    get("/v2/core/event_destinations", list_destinations),
    get("/v2/core/event_destinations/{id}", retrieve_destination),
    delete("/v2/core/event_destinations/{id}", delete_destination),
    get("/v2/core/events", list_thin_events),
    get("/v2/core/events/{id}", retrieve_thin_event),
]
