"""Test clocks: time that customers can be put on, and that is moved forward by hand."""

from __future__ import annotations

from metering.billing.twin.engine import cycle
from metering.billing.twin.engine.lines import interval_of
from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.listing import page
from metering.billing.twin.options import DAY_SECONDS
from metering.billing.twin.resources.customers import remove
from metering.billing.twin.routing import Call, delete, get, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

_KIND = "test_helpers.test_clock"
INTERVALS_MAX = 2


def create_clock(world: World, call: Call) -> Object:
    """Create a clock that stands at `frozen_time`."""
    made = blank(
        _KIND,
        id=world.make_id("clock"),
        created=world.wall(),
        deletes_after=world.wall() + 30 * DAY_SECONDS,
        frozen_time=call.fields.must_moment("frozen_time"),
        name=call.fields.string("name"),
    )
    world.add(made)
    world.emit("test_helpers.test_clock.created", made)
    return made


def retrieve_clock(world: World, call: Call) -> Object:
    """One clock."""
    return world.find(_KIND, call.id)


def list_clocks(world: World, call: Call) -> Object:
    """All clocks."""
    return page([one for one in world.tables[_KIND].values() if not one.get("_is_deleted")], call.fields, call.url)


def advance_clock(world: World, call: Call) -> Object:
    """Move the clock forward. It answers at once with `advancing`; what falls due happens afterwards.

    Errors: 400 for going back, for more than two of the shortest price intervals, or while it is advancing.
    """
    clock = world.find(_KIND, call.id)
    target = call.fields.must_moment("frozen_time")
    if clock["status"] != "ready":
        raise invalid("frozen_time", "The test clock is still advancing.", "test_clock_advancing")
    if target <= clock["frozen_time"]:
        raise invalid("frozen_time", "The new frozen time must be later than the current one.")
    limit = _latest(world, clock)
    if limit is not None and target > limit:
        message = f"You can advance by at most {INTERVALS_MAX} intervals of the shortest price at once."
        raise invalid("frozen_time", message)
    clock["status"] = "advancing"
    clock["status_details"] = {"advancing": {"target_frozen_time": target}}
    world.emit("test_helpers.test_clock.advancing", clock)
    return clock


def _latest(world: World, clock: Object) -> int | None:
    intervals = [
        interval_of(item["price"])
        for subscription in world.tables["subscription"].values()
        if subscription["test_clock"] == clock["id"]
        and subscription["status"] not in {"canceled", "incomplete_expired"}
        for item in subscription["items"]["data"]
    ]
    if not intervals:
        return None
    shortest = min(intervals, key=lambda interval: interval.seconds_about)
    return shortest.after(clock["frozen_time"], INTERVALS_MAX)


def finish_advancing(world: World) -> bool:
    """Do what falls due on clocks that were told to advance. Returns whether there were any."""
    moving = [one for one in world.tables[_KIND].values() if one["status"] == "advancing"]
    for clock in moving:
        target = clock["status_details"]["advancing"]["target_frozen_time"]
        cycle.run(world, clock["id"], target)
        clock["frozen_time"] = target
        clock["status"], clock["status_details"] = "ready", {}
        world.emit("test_helpers.test_clock.ready", clock)
    return bool(moving)


def delete_clock(world: World, call: Call) -> Object:
    """Delete the clock with its customers."""
    clock = world.find(_KIND, call.id)
    for customer in list(world.tables["customer"].values()):
        if customer["test_clock"] == clock["id"] and not customer.get("_is_deleted"):
            remove(world, customer)
    clock["_is_deleted"] = True
    world.emit("test_helpers.test_clock.deleted", clock)
    return {"id": clock["id"], "object": _KIND, "deleted": True}


ROUTES = [
    post("/v1/test_helpers/test_clocks", create_clock),
    get("/v1/test_helpers/test_clocks", list_clocks),
    get("/v1/test_helpers/test_clocks/{id}", retrieve_clock),
    post("/v1/test_helpers/test_clocks/{id}/advance", advance_clock),
    delete("/v1/test_helpers/test_clocks/{id}", delete_clock),
]
