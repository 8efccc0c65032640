"""The twin's own routes under `/_twin/`: what a test in process can do to it, over HTTP. They need no key."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec

from metering.billing.twin.app import Twin
from metering.billing.twin.errors import StripeError
from metering.billing.twin.faults import FaultPlan
from metering.billing.twin.fields import Fields, decode_form
from metering.billing.twin.options import Mischief
from metering.billing.twin.outbox import Delivery
from metering.billing.twin.wire import Reply, Request, json_reply

PREFIX = "/_twin/"


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far to move the twin's clock."""

    advance_seconds: int


class Payment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which session is paid, and with which card."""

    session: str
    token: str = "pm_card_visa"  # noqa: S105 - a test card's name


def answer_control(twin: Twin, request: Request) -> Reply:
    """Do what a route under `/_twin/` says. Errors: 400 for a body that cannot be read, 404 for an unknown route."""
    if request.method == "GET" and request.path.startswith(f"{PREFIX}requests/"):
        return _read_request(twin, request)
    act = _ACTS.get((request.method, request.path.removeprefix(PREFIX)))
    if act is None:
        return json_reply(404, {"error": {"message": f"No such route. There are: {_listed()}."}})
    try:
        return json_reply(200, act(twin, request))
    except msgspec.ValidationError as error:
        return json_reply(400, {"error": {"message": str(error)}})
    except msgspec.DecodeError:
        return json_reply(400, {"error": {"message": "The body is not JSON."}})
    except StripeError as error:
        return json_reply(error.status, {"error": {"message": error.message}})


def _listed() -> str:
    return ", ".join(f"{method} {PREFIX}{path}" for method, path in sorted(_ACTS))


def _read_journal(twin: Twin, _: Request) -> Any:
    return {"data": list(twin.journal.entries)}


def _read_request(twin: Twin, request: Request) -> Reply:
    """What an error's `request_log_url` leads to."""
    wanted = request.path.rpartition("/")[2]
    found = next((entry for entry in twin.journal.entries if entry.request_id == wanted), None)
    return (
        json_reply(200, found) if found else json_reply(404, {"error": {"message": "The journal has no such request."}})
    )


def _clear_journal(twin: Twin, _: Request) -> Any:
    twin.journal.entries.clear()
    return {"data": []}


def _read_faults(twin: Twin, _: Request) -> Any:
    return {"data": [{"plan": fault.plan, "seen": fault.seen, "met": fault.met} for fault in twin.faults.planned]}


def _add_fault(twin: Twin, request: Request) -> Any:
    return {"plan": twin.faults.add(msgspec.json.decode(request.body, type=FaultPlan)).plan}


def _clear_faults(twin: Twin, _: Request) -> Any:
    twin.faults.clear()
    return {"data": []}


def _read_webhooks(twin: Twin, _: Request) -> Any:
    outbox = twin.webhooks
    lists = {"waiting": outbox.waiting, "done": outbox.done, "dropped": outbox.dropped}
    shown = {name: [_shown(delivery) for delivery in deliveries] for name, deliveries in lists.items()}
    return shown | {"is_paused": outbox.is_paused, "mischief": outbox.mischief}


def _shown(delivery: Delivery) -> Any:
    names = ("event_id", "type", "url", "due_at", "attempts", "outcomes")
    return {name: getattr(delivery, name) for name in names}


def _set_mischief(twin: Twin, request: Request) -> Any:
    twin.webhooks.set_mischief(msgspec.json.decode(request.body, type=Mischief))
    return {"mischief": twin.webhooks.mischief}


def _pause(twin: Twin, _: Request) -> Any:
    twin.webhooks.is_paused = True
    return {"is_paused": True}


def _resume(twin: Twin, _: Request) -> Any:
    twin.webhooks.is_paused = False
    return {"is_paused": False}


def _settle(twin: Twin, _: Request) -> Any:
    twin.settle()
    return {"settled": True}


def _move_clock(twin: Twin, request: Request) -> Any:
    step = msgspec.json.decode(request.body, type=Step)
    if step.advance_seconds < 0:
        raise StripeError(400, "Time goes forward only.")
    twin.clock.advance(timedelta(seconds=step.advance_seconds))
    twin.tick()
    return _read_clock(twin, request)


def _read_clock(twin: Twin, _: Request) -> Any:
    return {"now": twin.state.wall()}


def _pay(twin: Twin, request: Request) -> Any:
    payment = msgspec.json.decode(request.body, type=Payment)
    return {"paid": twin.complete_checkout(payment.session, payment.token)}


def _total(twin: Twin, request: Request) -> Any:
    fields = Fields(decode_form(request.query))
    span = fields.must_whole("start"), fields.must_whole("end")
    return {"total": twin.meter_total(fields.must("customer"), fields.must("event_name"), *span)}


_ACTS: dict[tuple[str, str], Callable[[Twin, Request], Any]] = {
    ("GET", "journal"): _read_journal,
    ("DELETE", "journal"): _clear_journal,
    ("GET", "faults"): _read_faults,
    ("POST", "faults"): _add_fault,
    ("DELETE", "faults"): _clear_faults,
    ("GET", "webhooks"): _read_webhooks,
    ("POST", "webhooks/mischief"): _set_mischief,
    ("POST", "webhooks/pause"): _pause,
    ("POST", "webhooks/resume"): _resume,
    ("POST", "settle"): _settle,
    ("GET", "clock"): _read_clock,
    ("POST", "clock"): _move_clock,
    ("POST", "pay"): _pay,
    ("GET", "meter_total"): _total,
}
