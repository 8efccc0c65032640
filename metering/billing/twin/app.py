"""The twin: requests in, replies out, without waiting for anything. The server's shell adds sockets and time."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from typing import Any

import msgspec

from core.clock import Clock
from metering.billing.twin.engine import cycle, intake
from metering.billing.twin.engine.agenda import WALL
from metering.billing.twin.errors import Executed, Object, StripeError, body_of
from metering.billing.twin.expanding import expand
from metering.billing.twin.faults import Fault, Faults
from metering.billing.twin.fields import Fields
from metering.billing.twin.idempotency import IdempotencyKeys
from metering.billing.twin.journal import Entry, Journal
from metering.billing.twin.limits import MeterLocks, RequestRate
from metering.billing.twin.options import TwinOptions
from metering.billing.twin.parameters import refuse_unknown
from metering.billing.twin.resources import checkout, test_clocks
from metering.billing.twin.resources.catalogue import ROUTES
from metering.billing.twin.routing import Call, Route, Router
from metering.billing.twin.shapes import rendered
from metering.billing.twin.shifted_clock import ShiftedClock
from metering.billing.twin.wire import Reply, Request, json_reply
from metering.billing.twin.world import Asked, World

_METER_EVENTS = "/v1/billing/meter_events"


class Ticket(msgspec.Struct, kw_only=True):
    """A request between its admission and its answer: what it holds until then."""

    request: Request
    request_id: str
    fault: Fault | None = None
    # What admission alone could say: a refusal, or a saved answer.
    reply: Reply | None = None
    route: Route | None = None
    call: Call | None = None
    params: Object = {}
    claimed_key: str | None = None
    lock: tuple[str, str] | None = None


class Twin:
    """A stateful stand-in for Stripe: synchronous, and determined by the calls, the clock and the seed."""

    def __init__(self, clock: Clock, options: TwinOptions | None = None) -> None:
        self.options = options or TwinOptions()
        self.clock = ShiftedClock(clock)
        self.state = World(self.clock, self.options)
        self.faults = Faults()
        self.journal = Journal(self.options.journal_max)
        self.webhooks = self.state.outbox
        self._router = Router(ROUTES)
        self._keys = IdempotencyKeys(self.options.idempotency_seconds)
        self._rate = RequestRate(self.clock, self.options.requests_per_second)
        self._stream_rate = RequestRate(self.clock, self.options.stream_requests_per_second)
        self._locks = MeterLocks()

    def tick(self) -> None:
        """Do what became due: periods, retries, expiries, advancing test clocks, error reports."""
        cycle.run(self.state, WALL, self.state.wall())
        test_clocks.finish_advancing(self.state)
        intake.report_failures(self.state, self.state.wall() - self.options.aggregation_lag_seconds)

    def settle(self) -> None:
        """Aggregate everything that was received until now, whatever the lag; report what failed."""
        self.state.usage.settle()
        intake.report_failures(self.state, self.state.wall())

    def meter_total(self, customer: str, event_name: str, start: datetime | int, end: datetime | int) -> int:
        """The meter's number for [start, end) of all accepted events, aggregated or not. Unix seconds or datetimes."""
        meter = intake.meter_named(self.state, event_name)
        if meter is None:
            return 0
        return self.state.usage.total(self.state.rule_of(meter), customer, _seconds(start), _seconds(end))

    def complete_checkout(self, session_id: str, token: str = "pm_card_visa") -> bool:  # noqa: S107 - a test card's name
        """Pay a checkout session as its page does. Returns whether the card paid."""
        return checkout.complete(self.state, self.state.find("checkout.session", session_id), token)

    def call(self, request: Request) -> Reply:
        """Admit and answer in one go: for tests of the logic alone."""
        return self.answer(self.admit(request))

    def admit(self, request: Request) -> Ticket:
        """Check key, rate, route, idempotency and locks. What the ticket holds is given back by `answer`."""
        self.tick()
        ticket = Ticket(request=request, request_id=self.state.make_id("req"))
        ticket.fault = self.faults.take(request.method, request.path)
        try:
            self._admit(ticket)
        except StripeError as error:
            if ticket.claimed_key:
                self._keys.release(ticket.claimed_key)
                ticket.claimed_key = None
            ticket.reply = self._refusal(ticket, error)
        return ticket

    def _admit(self, ticket: Ticket) -> None:
        request = ticket.request
        found = self._router.find(request.method, request.path)
        is_stream = found is not None and found[0].access == "session_token"
        if not is_stream:
            self._check_key(request)
        (self._stream_rate if is_stream else self._rate).take()
        if found is None:
            message = f"Unrecognized request URL ({request.method}: {request.path})."
            raise StripeError(404, message, code=None)
        ticket.route, names = found
        ticket.params = request.params()
        refuse_unknown(ticket.route, ticket.params)
        ticket.call = Call(names=names, fields=Fields(ticket.params), url=request.path, bearer=request.bearer)
        key = request.headers.get("idempotency-key")
        if key and request.method == "POST":
            fingerprint = f"{request.path} {msgspec.json.encode(ticket.params, order='sorted').decode()}"
            ticket.reply = self._keys.claim(key, fingerprint, self.state.wall())
            ticket.claimed_key = key if ticket.reply is None else None
        if ticket.reply is None and request.method == "POST" and request.path == _METER_EVENTS:
            ticket.lock = self._locks.claim(ticket.params)

    def _check_key(self, request: Request) -> None:
        key = request.bearer or _basic_user(request)
        if not key:
            raise StripeError(401, "You did not provide an API key.")
        if key != self.options.api_key:
            raise StripeError(401, f"Invalid API Key provided: {key[:8]}***")

    def answer(self, ticket: Ticket) -> Reply:
        """Do the work of an admitted request, or repeat what was saved for it, and write the journal."""
        try:
            reply = self._replayed(ticket, ticket.reply) if ticket.reply is not None else self._work(ticket)
        except BaseException:
            if ticket.claimed_key:
                self._keys.release(ticket.claimed_key)
            raise
        finally:
            if ticket.lock is not None:
                self._locks.release(ticket.lock)
        self._write(ticket, reply)
        return reply

    def withdraw(self, ticket: Ticket) -> None:
        """Give back what *ticket* holds without doing its work: the connection is reset instead."""
        if ticket.lock is not None:
            self._locks.release(ticket.lock)
        if ticket.claimed_key:
            self._keys.release(ticket.claimed_key)
        self._write(ticket, Reply(status=0))

    def _replayed(self, ticket: Ticket, saved: Reply) -> Reply:
        """A saved answer says so, and which request it first answered; a refusal is passed on as it is."""
        if saved.headers.get("request-id") == ticket.request_id:
            return saved
        more = {"idempotent-replayed": "true", "original-request": saved.headers["request-id"]}
        return Reply(
            status=saved.status, headers=saved.headers | more | {"request-id": ticket.request_id}, body=saved.body
        )

    def _work(self, ticket: Ticket) -> Reply:
        kind = ticket.fault.plan.kind if ticket.fault else ""
        failure = Executed(500, "An unknown error occurred.", kind="api_error")
        if kind == "error_before_commit":
            reply, is_saved = self._refusal(ticket, failure), bool(ticket.fault and ticket.fault.plan.is_saved)
        else:
            reply, is_saved = self._done(ticket)
            if kind == "error_after_commit":
                reply, is_saved = self._refusal(ticket, failure), True
        if ticket.claimed_key:
            # v2 runs failed work again instead of repeating its error.
            if is_saved and (reply.status < 400 or not ticket.request.path.startswith("/v2/")):
                self._keys.save(ticket.claimed_key, reply)
            else:
                self._keys.release(ticket.claimed_key)
        return reply

    def _done(self, ticket: Ticket) -> tuple[Reply, bool]:
        """The answer of the route, and whether an idempotency key keeps it."""
        assert ticket.route is not None
        assert ticket.call is not None
        self.state.asked = Asked(ticket.request_id, ticket.request.headers.get("idempotency-key"))
        try:
            made: Object = rendered(ticket.route.answer(self.state, ticket.call), older=self.options.older_shapes)
            expand(self.state, made, ticket.call.fields.strings("expand"))
            return json_reply(200, made, self._headers(ticket)), True
        except StripeError as error:
            return self._refusal(ticket, error), error.is_saved
        finally:
            self.state.asked = Asked()

    def _headers(self, ticket: Ticket) -> dict[str, str]:
        headers = {"request-id": ticket.request_id, "stripe-version": self.options.api_version}
        if key := ticket.request.headers.get("idempotency-key"):
            headers["idempotency-key"] = key
        return headers

    def _refusal(self, ticket: Ticket, error: StripeError) -> Reply:
        headers = self._headers(ticket)
        if error.should_retry is not None:
            headers["stripe-should-retry"] = str(error.should_retry).lower()
        log_url = f"{self.state.base_url}/_twin/requests"
        return json_reply(error.status, body_of(error, ticket.request_id, log_url), headers)

    def _write(self, ticket: Ticket, reply: Reply) -> None:
        fault = ticket.fault.plan.kind if ticket.fault else None
        answer: Any = msgspec.json.decode(reply.body) if reply.body else None
        self.journal.write(
            Entry(
                at=self.state.wall(),
                request_id=ticket.request_id,
                method=ticket.request.method,
                path=ticket.request.path,
                route=ticket.route.path if ticket.route else "",
                params=ticket.params,
                idempotency_key=ticket.request.headers.get("idempotency-key"),
                status=reply.status,
                answer=answer,
                is_replayed="idempotent-replayed" in reply.headers,
                fault=fault,
            )
        )


def _basic_user(request: Request) -> str:
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[0]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _seconds(at: datetime | int) -> int:
    return at if isinstance(at, int) else int(at.timestamp())
