"""Stripe: the only file that knows its package. Every call is paced, ends in time, and fails in one of five ways.

Nothing is tried again here: whether a second try is safe depends on what was tried, which only the caller knows. So
there is no idempotency key of ours for meter events either: Stripe would answer a retry with the 500 that it saved, for
a day; their identifier is what makes them happen once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final, TypeVar, cast

import httpx
import msgspec
import stripe
from stripe.params.v2.billing import MeterEventStreamCreateParamsEvent

from core.clock import Clock
from core.http import NamedOrigin, open_client
from core.settings import StripeSettings
from metering.billing import stripe_objects as objects
from metering.billing.errors import (
    StripeKeyRejected,
    StripeNotReached,
    StripeOutcomeUnknown,
    StripeRefused,
    StripeThrottled,
)
from metering.billing.pace import Pace
from metering.billing.stripe_objects import MeterErrors, MeterEvent

_TIMEOUT_SECONDS: Final = 20.0
STREAM_EVENTS_MAX: Final = 100
"""Of one request to the meter event stream (docs.stripe.com/api/v2/billing/meter-event-stream)."""
_PAGE: Final = 100
_KINDS_MAX: Final = 20
"""Of events that one list names (stripe-python: EventListParams.types)."""
_TOLERANCE_SECONDS: Final = 300
"""How old a signature may be: Stripe's own default."""
_NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
_T = TypeVar("_T")


class _GuardedHttp(stripe.HTTPClient):
    """Sends the package's requests by our own client, behind the egress guard."""

    name = "httpx"

    def __init__(self, client: httpx.AsyncClient) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._client = client

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        """Return body, status and headers. Errors: StripeNotReached, StripeOutcomeUnknown."""
        try:
            answer = await self._client.request(method, url, headers=dict(headers), content=post_data or None)
        except _NOT_SENT as error:
            raise StripeNotReached(type(error).__name__) from error
        except httpx.HTTPError as error:
            raise StripeOutcomeUnknown(type(error).__name__) from error
        return answer.content, answer.status_code, answer.headers

    async def close_async(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class StripeApi:
    """What we ask of Stripe. One per process; Errors of every method: those of `metering.billing.errors.StripeFailed`.

    Objects are returned as `stripe_objects` has them, read from the answer to this very call.
    """

    def __init__(self, settings: StripeSettings, clock: Clock, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        """Connect to nothing yet."""
        assert settings.api_key is not None
        trusted = () if settings.url is None else (NamedOrigin.of(settings.url),)
        self._http = _GuardedHttp(open_client(timeout_seconds=timeout_seconds, trusted=trusted, connections_max=64))
        self._addresses: Any = (
            {} if settings.url is None else {"api": settings.url, "meter_events": settings.url, "files": settings.url}
        )
        self._client = self._open(settings.api_key)
        self._pace = Pace(clock, settings.requests_per_second)
        self._clock = clock
        self._stream: tuple[float, stripe.StripeClient] | None = None

    def _open(self, key: str) -> stripe.StripeClient:
        return stripe.StripeClient(key, base_addresses=self._addresses, http_client=self._http, max_network_retries=0)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close_async()

    async def _call(self, act: Callable[[], Awaitable[_T]]) -> _T:
        await self._pace.turn()
        with _translated():
            return await act()

    async def _read(self, act: Callable[[], Awaitable[stripe.StripeObject | stripe.ListObject[Any]]]) -> objects.Json:
        found = await self._call(act)
        return found.to_dict(for_json=True)

    # Customers, and the pages where they pay.

    async def create_customer(
        self, organization_id: str, name: str, *, email: str | None, test_clock: str | None
    ) -> str:
        """Make a customer for the organization."""
        params: stripe.params.CustomerCreateParams = {
            "name": name,
            "metadata": {objects.ORGANIZATION_METADATA: organization_id},
        }
        if email is not None:
            params["email"] = email
        if test_clock is not None:
            params["test_clock"] = test_clock
        # No key of ours: a 500 that Stripe saved under it would be the answer for a day. One too many harms nobody.
        return (await self._read(lambda: self._client.v1.customers.create_async(params)))["id"]

    async def set_address(self, customer_id: str, email: str) -> None:
        """Say where a customer's mails go."""
        await self._call(lambda: self._client.v1.customers.update_async(customer_id, {"email": email}))

    async def payment_method_of(self, customer_id: str) -> str | None:
        """Return the customer's default card, or else the one that was kept last: a checkout makes none the default."""
        found = await self._read(lambda: self._client.v1.customers.retrieve_async(customer_id))
        settings = cast("objects.Json", found.get("invoice_settings") or {})
        default = objects.id_of(settings.get("default_payment_method"))
        if default is not None:
            return default
        service = self._client.v1.customers.payment_methods
        kept = await self._read(lambda: service.list_async(customer_id, {"type": "card", "limit": 1}))
        return kept["data"][0]["id"] if kept["data"] else None

    async def close_checkout(self, session_id: str) -> None:
        """Close a page where nobody has paid yet. Errors: StripeRefused where it is closed already."""
        await self._call(lambda: self._client.v1.checkout.sessions.expire_async(session_id))

    async def create_checkout(self, params: stripe.params.checkout.SessionCreateParams) -> objects.Checkout:
        """Make a page where the customer pays."""
        sessions = self._client.v1.checkout.sessions
        return objects.read_checkout(await self._read(lambda: sessions.create_async(params)))

    async def get_checkout(self, session_id: str) -> objects.Checkout:
        """Return a checkout session."""
        sessions = self._client.v1.checkout.sessions
        return objects.read_checkout(await self._read(lambda: sessions.retrieve_async(session_id)))

    async def create_portal(self, customer_id: str, return_url: str) -> str:
        """Return the address of a page where the customer changes cards and plan, and finds invoices."""
        params: stripe.params.billing_portal.SessionCreateParams = {"customer": customer_id, "return_url": return_url}
        sessions = self._client.v1.billing_portal.sessions
        return (await self._read(lambda: sessions.create_async(params)))["url"]

    async def create_payment(
        self, params: stripe.params.PaymentIntentCreateParams, *, idempotency_key: str
    ) -> objects.Payment:
        """Charge a card while its owner is not there."""
        options: stripe.RequestOptions = {"idempotency_key": idempotency_key}
        intents = self._client.v1.payment_intents
        return objects.read_payment(await self._read(lambda: intents.create_async(params, options)))

    async def get_payment(self, payment_intent_id: str) -> objects.Payment:
        """Return a payment intent."""
        intents = self._client.v1.payment_intents
        return objects.read_payment(await self._read(lambda: intents.retrieve_async(payment_intent_id)))

    async def list_payments(self, customer_id: str, since: datetime) -> list[objects.Payment]:
        """Return a customer's payment intents that were made since then, newest first."""
        params = {"customer": customer_id, "created": {"gte": int(since.timestamp())}}
        service = self._client.v1.payment_intents
        pages = self._pages(lambda page: service.list_async(cast("Any", {**params, **page})))
        return [objects.read_payment(one) async for one in pages]

    # Subscriptions and invoices.

    async def get_subscription(self, subscription_id: str) -> objects.Subscription:
        """Return a subscription as it is now."""
        found = await self._read(lambda: self._client.v1.subscriptions.retrieve_async(subscription_id))
        return objects.read_subscription(found)

    async def list_subscriptions(self, customer_id: str | None) -> AsyncGenerator[objects.Subscription]:
        """Yield all subscriptions of a customer, or of everybody, ended ones too, newest first."""
        service = self._client.v1.subscriptions
        params: dict[str, Any] = (
            {"status": "all"} if customer_id is None else {"status": "all", "customer": customer_id}
        )
        async for one in self._pages(lambda page: service.list_async(cast("Any", {**params, **page}))):
            yield objects.read_subscription(one)

    async def update_subscription(
        self, subscription_id: str, params: stripe.params.SubscriptionUpdateParams
    ) -> objects.Subscription:
        """Change a subscription."""
        subscriptions = self._client.v1.subscriptions
        return objects.read_subscription(await self._read(lambda: subscriptions.update_async(subscription_id, params)))

    async def cancel_subscription(self, subscription_id: str) -> objects.Subscription:
        """End a subscription now, with an invoice for what was used."""
        params: stripe.params.SubscriptionCancelParams = {"invoice_now": True, "prorate": True}
        subscriptions = self._client.v1.subscriptions
        return objects.read_subscription(await self._read(lambda: subscriptions.cancel_async(subscription_id, params)))

    async def get_invoice(self, invoice_id: str) -> objects.Invoice:
        """Return an invoice with all of its lines."""
        found = await self._read(lambda: self._client.v1.invoices.retrieve_async(invoice_id))
        invoice = objects.read_invoice(found)
        if not invoice.has_more_lines:
            return invoice
        lines = [objects.read_line(line) async for line in self._pages(self._lines_of(invoice_id))]
        return msgspec.structs.replace(invoice, lines=tuple(lines), has_more_lines=False)

    def _lines_of(self, invoice_id: str) -> _Lister:
        service = self._client.v1.invoices.line_items
        return lambda page: service.list_async(invoice_id, cast("Any", page))

    async def list_invoices(self, customer_id: str, since: datetime) -> list[objects.Invoice]:
        """Return a customer's invoices that were made since then, newest first."""
        params = {"customer": customer_id, "created": {"gte": int(since.timestamp())}}
        service = self._client.v1.invoices
        pages = self._pages(lambda page: service.list_async(cast("Any", {**params, **page})))
        return [objects.read_invoice(one) async for one in pages]

    # Meters.

    async def send_meter_event(self, event: MeterEvent) -> None:
        """Tell Stripe of usage. Errors: StripeRefused with `is_duplicate` where it was told before."""
        params: stripe.params.billing.MeterEventCreateParams = {
            "event_name": event.event_name,
            "identifier": event.identifier,
            "payload": event.payload(),
            "timestamp": int(event.occurred_at.timestamp()),
        }
        await self._call(lambda: self._client.v1.billing.meter_events.create_async(params))

    async def stream_meter_events(self, events: Sequence[MeterEvent]) -> None:
        """Tell Stripe of the usage of many, who are checked and counted later. STREAM_EVENTS_MAX of them at most."""
        client = await self._streaming()
        batch: list[MeterEventStreamCreateParamsEvent] = [
            {
                "event_name": event.event_name,
                "identifier": event.identifier,
                "payload": event.payload(),
                "timestamp": event.occurred_at.isoformat(),
            }
            for event in events
        ]
        try:
            await self._call(lambda: client.v2.billing.meter_event_stream.create_async({"events": batch}))
        except StripeKeyRejected:
            self._stream = None  # the session's 15 minutes are over: the next call opens another
            raise StripeThrottled("the session has expired", is_lock=False) from None

    async def _streaming(self) -> stripe.StripeClient:
        now = self._clock.monotonic_seconds()
        if self._stream is None or self._stream[0] <= now:
            session = await self._read(self._client.v2.billing.meter_event_session.create_async)
            # Valid for 15 minutes: left earlier, so that no batch comes too late.
            self._stream = (now + 12 * 60, self._open(session["authentication_token"]))
        return self._stream[1]

    async def hourly_sums(
        self, meter_id: str, customer_id: str, starts_at: datetime, ends_at: datetime
    ) -> dict[datetime, int]:
        """Return what a meter counted of a customer by hour; both ends are whole hours. Hours of nothing may lack."""
        params = {
            "customer": customer_id,
            "start_time": int(starts_at.timestamp()),
            "end_time": int(ends_at.timestamp()),
            "value_grouping_window": "hour",
        }
        service = self._client.v1.billing.meters.event_summaries
        pages = self._pages(lambda page: service.list_async(meter_id, cast("Any", {**params, **page})))
        return {
            datetime.fromtimestamp(one["start_time"], starts_at.tzinfo): int(one["aggregated_value"])
            async for one in pages
        }

    async def meter_errors(self, event_id: str) -> MeterErrors:
        """Return what a thin event about a meter says: it names the meter only, and the rest is fetched."""
        found = await self._read(lambda: self._client.v2.core.events.retrieve_async(event_id))
        report = cast("objects.Json", found["data"])
        kinds = cast("list[objects.Json]", report["reason"]["error_types"])
        related = cast("objects.Json", found.get("related_object") or {})
        return MeterErrors(
            meter_id=related.get("id", ""),
            codes=tuple(kind["code"] for kind in kinds),
            starts_at=_moment(report["validation_start"]),
            ends_at=_moment(report["validation_end"]),
        )

    # What happened, and what is for sale.

    async def list_events(self, since: datetime, kinds: Sequence[str]) -> AsyncGenerator[objects.Event]:
        """Yield the events of these kinds since then, newest first of each twenty. Stripe keeps 30 days of them."""
        service = self._client.v1.events
        for start in range(0, len(kinds), _KINDS_MAX):
            asked = {"created": {"gte": int(since.timestamp())}, "types": list(kinds[start : start + _KINDS_MAX])}
            async for one in self._pages(lambda page, asked=asked: service.list_async(cast("Any", {**asked, **page}))):
                yield objects.read_event(one)

    async def list_thin_events(self, since: datetime, kinds: Sequence[str]) -> list[objects.Event]:
        """Return the newest thin events of these kinds since then: one page."""
        asked: Any = {"types": list(kinds), "created": {"gte": since.isoformat()}}
        found = await self._read(lambda: self._client.v2.core.events.list_async(asked))
        return [objects.read_event(one) for one in found["data"]]

    async def list_catalog(self, kind: str) -> list[objects.Json]:
        """Return all `products`, active `prices` or `meters` of the account."""
        listers: dict[str, _Lister] = {
            "products": lambda page: self._client.v1.products.list_async(cast("Any", {"active": True, **page})),
            "prices": lambda page: self._client.v1.prices.list_async(cast("Any", {"active": True, **page})),
            "meters": lambda page: self._client.v1.billing.meters.list_async(cast("Any", page)),
        }
        return [one async for one in self._pages(listers[kind])]

    async def add_to_catalog(self, kind: str, params: Mapping[str, Any], *, idempotency_key: str) -> objects.Json:
        """Make one of `products`, `prices` or `meters`. Prices and meters do not change: others take their place."""
        makers: dict[str, Callable[..., Awaitable[Any]]] = {
            "products": self._client.v1.products.create_async,
            "prices": self._client.v1.prices.create_async,
            "meters": self._client.v1.billing.meters.create_async,
        }
        return await self._read(lambda: makers[kind](params, {"idempotency_key": idempotency_key}))

    async def rename_product(self, product_id: str, name: str) -> None:
        """Give a product another name; it is what invoices show."""
        await self._call(lambda: self._client.v1.products.update_async(product_id, {"name": name}))

    async def _pages(self, lister: _Lister) -> AsyncGenerator[objects.Json]:
        """Yield the objects of a list, page by page."""
        page: dict[str, Any] = {"limit": _PAGE}
        while True:
            found = await self._read(lambda page=page: lister(page))
            for one in found["data"]:
                yield one
            if not found.get("has_more") or not found["data"]:
                return
            page = {"limit": _PAGE, "starting_after": found["data"][-1]["id"]}


_Lister = Callable[[dict[str, Any]], Awaitable["stripe.ListObject[Any]"]]


@contextmanager
def _translated() -> Generator[None]:
    """Turn the package's errors into ours."""
    try:
        yield
    except stripe.RateLimitError as error:
        raise StripeThrottled(str(error), is_lock=_code_of(error) == "lock_timeout") from error
    except (stripe.AuthenticationError, stripe.PermissionError) as error:
        raise StripeKeyRejected(type(error).__name__) from error
    except stripe.StripeError as error:
        status = error.http_status or 0
        # Something else was asked under the same key before, and what became of that is open.
        is_open = isinstance(error, stripe.IdempotencyError)
        if 400 <= status < 500 and status != 409 and not is_open:
            param = getattr(error, "param", None)
            raise StripeRefused(str(error), code=_code_of(error), param=param, status=status) from error
        # 409: another request with the same idempotency key is still at work, so that the outcome is open.
        raise StripeOutcomeUnknown(f"{type(error).__name__} {status}") from error


def is_signed(body: bytes, header: str, secrets: Sequence[str]) -> bool:
    """Tell whether Stripe signed *body*, just as it came, with one of *secrets* within the last five minutes."""
    for secret in secrets:
        try:
            # An empty secret would verify what anybody signs with nothing.
            if secret and cast("Any", stripe.WebhookSignature).verify_header(
                body, header, secret, tolerance=_TOLERANCE_SECONDS
            ):
                return True
        except (stripe.SignatureVerificationError, ValueError, TypeError):
            continue
    return False


def _code_of(error: stripe.StripeError) -> str | None:
    body = cast("dict[str, Any]", error.json_body or {})
    described = body.get("error")
    return cast("dict[str, Any]", described).get("code") if isinstance(described, dict) else error.code


def _moment(value: Any) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)
