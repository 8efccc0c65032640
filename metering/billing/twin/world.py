"""The state of a twin: its objects, its timelines, its usage, and what it has to tell the world."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from datetime import UTC, datetime

import msgspec

from core.clock import Clock
from metering.billing.twin.engine.agenda import WALL, Agenda
from metering.billing.twin.engine.usage import MeterRule, UsageBook
from metering.billing.twin.errors import Object, invalid, not_found
from metering.billing.twin.options import DAY_SECONDS, TwinOptions
from metering.billing.twin.outbox import Outbox
from metering.billing.twin.reports import Reports
from metering.billing.twin.shapes import blank, rendered

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 24


class Asked(msgspec.Struct, frozen=True):
    """The request that is being answered: events name it."""

    id: str | None = None
    idempotency_key: str | None = None


class World:
    """Everything that a twin knows. Deterministic: the same seed, clock and calls give the same world."""

    def __init__(self, clock: Clock, options: TwinOptions) -> None:
        self.clock = clock
        self.options = options
        self.base_url = "http://127.0.0.1"
        self.tables: dict[str, dict[str, Object]] = defaultdict(dict)
        self.agenda = Agenda()
        self.usage = UsageBook()
        self.reports = Reports()
        self.outbox = Outbox(options)
        self.asked = Asked()
        self._ids_made = 0
        self._acting_at: dict[str, int] = {}

    # Time

    def wall(self) -> int:
        """The twin's own time in Unix seconds."""
        return int(self.clock.now().timestamp())

    def timeline_of(self, customer: str | None) -> str:
        """The test clock of *customer*, or the wall."""
        held = self.tables["customer"].get(customer or "", {})
        return held.get("test_clock") or WALL

    def time_on(self, timeline: str) -> int:
        """Unix seconds on *timeline*; during a planned act, the second for which it was planned."""
        if timeline in self._acting_at:
            return self._acting_at[timeline]
        if timeline == WALL:
            return self.wall()
        return int(self.tables["test_helpers.test_clock"][timeline]["frozen_time"])

    def now(self, customer: str | None = None) -> int:
        """Unix seconds as *customer* lives them."""
        return self.time_on(self.timeline_of(customer))

    def act_at(self, timeline: str, at: int | None) -> None:
        """Set the second that *timeline* shows while a planned act runs; None ends it."""
        if at is None:
            self._acting_at.pop(timeline, None)
        else:
            self._acting_at[timeline] = at

    def plan(self, customer: str, at: int, act: str, identity: str) -> None:
        """Have *act* done on the timeline of *customer*."""
        self.agenda.plan(self.timeline_of(customer), at, act, identity)

    # Objects

    def make_id(self, prefix: str) -> str:
        """A new id, drawn from the seed and the number of ids so far."""
        self._ids_made += 1
        digest = hashlib.blake2b(f"{self.options.seed}:{self._ids_made}".encode(), digest_size=24).digest()
        return f"{prefix}_" + "".join(_ALPHABET[byte % 62] for byte in digest[:_ID_LENGTH])

    def add(self, made: Object) -> Object:
        """Keep a new object."""
        self.tables[made["object"]][made["id"]] = made
        return made

    def find(self, kind: str, identity: str, param: str = "id") -> Object:
        """The object of that id. Errors: 404 resource_missing, naming *param*."""
        found = self.tables[kind].get(identity)
        if found is None or found.get("_is_deleted"):
            raise not_found(kind, identity, param)
        return found

    def refer(self, kind: str, identity: str | None, param: str) -> Object:
        """The object that a parameter names. Errors: 400 resource_missing, as Stripe answers for bodies."""
        found = self.tables[kind].get(identity or "")
        if found is None or found.get("_is_deleted"):
            name = kind.rsplit(".", 1)[-1].replace("_", " ")
            raise invalid(param, f"No such {name}: '{identity}'", "resource_missing")
        return found

    # Usage

    def rule_of(self, meter: Object) -> MeterRule:
        """How *meter* counts."""
        return MeterRule(
            event_name=meter["event_name"],
            formula=meter["default_aggregation"]["formula"],
            event_time_window=meter["event_time_window"],
        )

    def visible_usage(self, meter: Object, customer: str, start: int, end: int) -> int:
        """What a summary or an invoice sees of [start, end) now, the aggregation's lag considered."""
        visible_at = self.wall() - self.options.aggregation_lag_seconds
        return self.usage.total(self.rule_of(meter), customer, start, end, visible_at=visible_at)

    # Events

    def emit(self, kind: str, subject: Object, previous: Object | None = None) -> Object:
        """Record a snapshot event about *subject* and queue it for the endpoints that asked for it."""
        snapshot = rendered(subject, older=self.options.older_shapes)
        event = blank(
            "event",
            id=self.make_id("evt"),
            api_version=self.options.api_version,
            created=self.now(_customer_of(subject)),
            data={"object": snapshot} | ({"previous_attributes": previous} if previous is not None else {}),
            request={"id": self.asked.id, "idempotency_key": self.asked.idempotency_key},
            type=kind,
            _at=self.wall(),
        )
        self.add(event)
        self._forget_old_events()
        listening = [endpoint for endpoint in self.tables["webhook_endpoint"].values() if _listens(endpoint, kind)]
        event["pending_webhooks"] = len(listening)
        for endpoint in listening:
            self.outbox.send(rendered(event), endpoint["url"], endpoint["_secret"], self.wall())
        return event

    def _forget_old_events(self) -> None:
        events, kept_since = self.tables["event"], self.wall() - self.options.event_retention_days * DAY_SECONDS
        while events and (oldest := next(iter(events.values())))["_at"] < kept_since:
            del events[oldest["id"]]

    def emit_thin(self, kind: str, related: Object | None, body: Object) -> Object:
        """Record a thin event: endpoints get a reference, `GET /v2/core/events/{id}` the *body*."""
        event: Object = {
            "id": self.make_id("evt"),
            "object": "v2.core.event",
            "type": kind,
            "created": iso(self.wall()),
            "livemode": False,
            "context": None,
            "reason": None,
            "changes": None,
            "snapshot_event": None,
        }
        if related is not None:
            url = f"/v1/billing/meters/{related['id']}"
            event["related_object"] = {"id": related["id"], "type": related["object"], "url": url}
        self.tables["v2.core.event"][event["id"]] = event | {"data": body, "_at": self.wall()}
        for destination in self.tables["v2.core.event_destination"].values():
            if kind in destination["enabled_events"] or "*" in destination["enabled_events"]:
                self.outbox.send(event, destination["_url"], destination["_secret"], self.wall())
        return event


def iso(seconds: int) -> str:
    """A time as the v2 API writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _customer_of(subject: Object) -> str | None:
    if subject["object"] == "customer":
        return str(subject["id"])
    customer = subject.get("customer")
    return customer if isinstance(customer, str) else None


def _listens(endpoint: Object, kind: str) -> bool:
    wanted: list[str] = endpoint["enabled_events"]
    return endpoint["status"] == "enabled" and ("*" in wanted or kind in wanted)
