"""Meter events on their way in: what is refused at once, and what is found out only afterwards."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from metering.billing.twin.engine.usage import Usage
from metering.billing.twin.errors import Executed, Object, invalid
from metering.billing.twin.options import DAY_SECONDS
from metering.billing.twin.reports import Failure, summarised
from metering.billing.twin.world import World, iso

PAST_SECONDS_MAX = 35 * DAY_SECONDS
FUTURE_SECONDS_MAX = 5 * 60
IDENTIFIER_LENGTH_MAX = 100
# Stripe adds up in doubles: more digits would not survive.
DIGITS_MAX = 15
_WHOLE = re.compile(r"[+-]?\d+")


class Problem(NamedTuple):
    """Why an event cannot be counted: Stripe's reason code, and words."""

    code: str
    message: str


class Reported(NamedTuple):
    """A meter event as a caller sent it, by either API."""

    event_name: str
    payload: dict[str, Any]
    identifier: str
    timestamp: int | None


def meter_named(world: World, event_name: str) -> Object | None:
    """The meter of that event name: an active one, or else a closed one."""
    found = [one for one in world.tables["billing.meter"].values() if one["event_name"] == event_name]
    return min(found, key=lambda one: one["status"] != "active", default=None)


def customer_in(meter: Object, reported: Reported) -> str:
    """The customer that the payload names; empty if it names none."""
    return str(reported.payload.get(meter["customer_mapping"]["event_payload_key"], ""))


def problem_of_value(meter: Object, reported: Reported) -> Problem | None:
    """What is wrong with the value, if anything: whole numbers of at most fifteen digits."""
    if meter["default_aggregation"]["formula"] == "count":
        return None
    key = meter["value_settings"]["event_payload_key"]
    value = str(reported.payload.get(key, ""))
    if not _WHOLE.fullmatch(value):
        return Problem("meter_event_invalid_value", f"The payload's '{key}' must be a whole number, not '{value}'.")
    if len(value.lstrip("+-").lstrip("0")) > DIGITS_MAX:
        message = f"The payload's '{key}' has more than {DIGITS_MAX} significant digits: {value}."
        return Problem("meter_event_value_too_many_digits", message)
    return None


def problem_of_time(world: World, customer: str, reported: Reported) -> Problem | None:
    """What is wrong with the timestamp, if anything: 35 days back, five minutes ahead, on the customer's clock."""
    if reported.timestamp is None:
        return None
    age = world.now(customer) - reported.timestamp
    if age > PAST_SECONDS_MAX:
        message = "The timestamp must be within the past 35 calendar days."
        return Problem("timestamp_too_far_in_past", message)
    if -age > FUTURE_SECONDS_MAX:
        return Problem("timestamp_in_future", "The timestamp must not be more than 5 minutes in the future.")
    return None


def refuse_duplicate(world: World, identifier: str) -> None:
    """Errors: 400, not to be retried, if the identifier was used within its window."""
    if is_duplicate(world, identifier):
        raise Executed(
            400,
            f"An event already exists with identifier {identifier}.",
            code=world.options.duplicate_identifier_code,
            param="identifier",
            should_retry=False,
        )


def is_duplicate(world: World, identifier: str) -> bool:
    """Whether the identifier was used within its window, which is exact here and "at least" at Stripe."""
    held = world.usage.find(identifier)
    window = world.options.identifier_window_seconds
    return held is not None and (window is None or world.wall() - held.received_at < window)


def take(world: World, meter: Object, reported: Reported) -> Usage | None:
    """Count an event that was accepted, or note why it cannot be counted. None in the latter case."""
    customer = customer_in(meter, reported)
    if problem := _problem_of_customer(world, meter, customer):
        fail(world, meter["id"], reported, problem)
        return None
    key = meter["value_settings"]["event_payload_key"]
    is_counted = meter["default_aggregation"]["formula"] == "count"
    usage = Usage(
        identifier=reported.identifier,
        event_name=reported.event_name,
        customer=customer,
        timestamp=world.now(customer) if reported.timestamp is None else reported.timestamp,
        value=0 if is_counted else int(reported.payload[key]),
        received_at=world.wall(),
    )
    world.usage.take(usage)
    return usage


def _problem_of_customer(world: World, meter: Object, customer: str) -> Problem | None:
    if not customer:
        key = meter["customer_mapping"]["event_payload_key"]
        return Problem("meter_event_no_customer_defined", f"The payload has no '{key}'.")
    held = world.tables["customer"].get(customer)
    if held is None or held.get("_is_deleted"):
        return Problem("meter_event_customer_not_found", f"No such customer: '{customer}'.")
    return None


def fail(world: World, meter: str, reported: Reported, problem: Problem) -> None:
    """Note a failure for the next error report."""
    world.reports.add(
        Failure(
            meter=meter, code=problem.code, identifier=reported.identifier, message=problem.message, at=world.wall()
        )
    )


def check_identifier(identifier: str) -> str:
    """Errors: 400 for an identifier that is too long."""
    if len(identifier) > IDENTIFIER_LENGTH_MAX:
        raise invalid("identifier", f"Identifiers have at most {IDENTIFIER_LENGTH_MAX} characters.")
    return identifier


def report_failures(world: World, until: int) -> None:
    """Tell of the failures up to *until* (Unix seconds) by thin events, one per meter."""
    for meter, failures in world.reports.take_until(until).items():
        body: Object = {
            "developer_message_summary": "There is 1 invalid event"
            if len(failures) == 1
            else f"There are {len(failures)} invalid events",
            "reason": summarised(failures),
            "validation_start": iso(min(one.at for one in failures)),
            "validation_end": iso(max(one.at for one in failures) + 1),
        }
        if meter:
            world.emit_thin("v1.billing.meter.error_report_triggered", world.tables["billing.meter"][meter], body)
        else:
            world.emit_thin("v1.billing.meter.no_meter_found", None, body)
