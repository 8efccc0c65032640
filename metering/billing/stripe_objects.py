"""What we read of Stripe's objects, whichever API version they come in.

Since 2025-03-31 (basil) a period's dates stand on the subscription's items and an invoice names its subscription under
`parent`; before, they stood on the objects themselves. A webhook endpoint keeps the version that it was made with, so
both are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Final, NamedTuple, cast

import msgspec

Json = Mapping[str, Any]
PLAN_METADATA: Final = "aap_plan"
"""The key in a price's metadata that names its plan."""
USAGE_METADATA: Final = "aap_usage"
"""The key in the metadata of the price that bills usage."""
ORGANIZATION_METADATA: Final = "aap_organization"
_MONTHS_OF: Final = {"month": Decimal(1), "year": Decimal(12), "week": Decimal(12) / 52, "day": Decimal(12) / 365}


class MeteredItem(NamedTuple):
    """A subscription's item that bills what a meter counts."""

    id: str
    meter_id: str | None
    price_id: str
    created_at: datetime | None = None


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """A subscription. *plan* is None for one that we did not sell."""

    id: str
    customer_id: str
    organization_id: str | None
    plan: str | None
    plan_item_id: str | None
    price_cents_per_month: int
    plan_price_ids: tuple[str, ...] = ()
    """Of what recurs."""
    metered: tuple[MeteredItem, ...]
    status: str
    started_at: datetime
    period_starts_at: datetime
    period_ends_at: datetime
    trial_ends_at: datetime | None
    cancel_at: datetime | None
    ended_at: datetime | None
    latest_invoice_id: str | None
    is_collection_paused: bool


class UsageLine(msgspec.Struct, frozen=True, kw_only=True):
    """An invoice's line for usage: so many units of a price in a period."""

    price_id: str | None
    subscription_item_id: str | None
    quantity: int
    amount_cents: int
    starts_at: datetime
    ends_at: datetime


class Invoice(msgspec.Struct, frozen=True, kw_only=True):
    """An invoice and its lines that belong to items of a subscription."""

    id: str
    customer_id: str
    subscription_id: str | None
    number: str | None
    status: str
    billing_reason: str | None
    currency: str
    total_cents: int
    paid_cents: int
    due_cents: int
    attempts: int
    """How often a payment was tried."""
    issued_at: datetime
    page_url: str | None
    pdf_url: str | None
    lines: tuple[UsageLine, ...]
    has_more_lines: bool


class Payment(msgspec.Struct, frozen=True, kw_only=True):
    """A payment intent: what was taken, of whom, and for what."""

    id: str
    customer_id: str | None
    status: str
    currency: str
    received_cents: int
    metadata: dict[str, str]


class Checkout(msgspec.Struct, frozen=True, kw_only=True):
    """A checkout session."""

    id: str
    url: str | None
    mode: str
    status: str | None
    customer_id: str | None
    email: str | None
    subscription_id: str | None
    payment_intent_id: str | None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event: what happened to which object. Its copy of the object is not used: it may be out of date."""

    id: str
    type: str
    object_id: str
    occurred_at: datetime


class MeterEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What a meter is to count. *value* is in the meter's unit."""

    event_name: str
    customer_id: str
    identifier: str
    value: int
    occurred_at: datetime

    def payload(self) -> dict[str, str]:
        """Return the customer and the value, as Stripe's meters expect them by default."""
        return {"stripe_customer_id": self.customer_id, "value": str(self.value)}


class MeterErrors(msgspec.Struct, frozen=True, kw_only=True):
    """What Stripe says of events that it took and could not count: how many, why, and when they came."""

    meter_id: str
    codes: tuple[str, ...]
    starts_at: datetime
    ends_at: datetime


def read_subscription(source: Json) -> Subscription:
    """Return what *source* says."""
    items = _items(source)
    # Items may have periods of their own: usage is billed by that of the metered one.
    by_usage = sorted(items, key=lambda item: not _is_metered(item))
    dated = next((item for item in by_usage if item.get("current_period_end") is not None), source)
    plan_item = next((item for item in items if not _is_metered(item)), None)
    metadata = cast("Json", source.get("metadata") or {})
    return Subscription(
        id=source["id"],
        customer_id=id_of(source["customer"]) or "",
        organization_id=metadata.get(ORGANIZATION_METADATA),
        # A price that was made by hand, for one customer, need not name a plan: its subscription may.
        plan=(None if plan_item is None else _plan_of(plan_item)) or metadata.get(PLAN_METADATA),
        plan_item_id=None if plan_item is None else plan_item["id"],
        price_cents_per_month=sum(_cents_per_month(item) for item in items if not _is_metered(item)),
        plan_price_ids=tuple(item["price"]["id"] for item in items if not _is_metered(item)),
        metered=tuple(
            MeteredItem(item["id"], _meter_of(item), item["price"]["id"], _moment_or_none(item.get("created")))
            for item in items
            if _is_metered(item)
        ),
        status=source["status"],
        started_at=_moment(source.get("start_date") or source["created"]),
        period_starts_at=_moment(dated["current_period_start"]),
        period_ends_at=_moment(dated["current_period_end"]),
        trial_ends_at=_moment_or_none(source.get("trial_end")),
        cancel_at=_moment_or_none(source.get("cancel_at"))
        or (_moment(dated["current_period_end"]) if source.get("cancel_at_period_end") else None),
        ended_at=_moment_or_none(source.get("ended_at")),
        latest_invoice_id=id_of(source.get("latest_invoice")),
        is_collection_paused=source.get("pause_collection") is not None,
    )


def read_invoice(source: Json) -> Invoice:
    """Return what *source* says."""
    lines = cast("Json", source.get("lines") or {"data": []})
    return Invoice(
        id=source["id"],
        customer_id=id_of(source.get("customer")) or "",
        subscription_id=subscription_of_invoice(source),
        number=source.get("number"),
        status=source.get("status") or "draft",
        billing_reason=source.get("billing_reason"),
        currency=source["currency"],
        total_cents=source["total"],
        paid_cents=source["amount_paid"],
        due_cents=source["amount_remaining"],
        attempts=source.get("attempt_count") or 0,
        issued_at=_moment(source["created"]),
        page_url=source.get("hosted_invoice_url"),
        pdf_url=source.get("invoice_pdf"),
        lines=tuple(read_line(line) for line in lines["data"]),
        has_more_lines=bool(lines.get("has_more")),
    )


def read_line(line: Json) -> UsageLine:
    """Return what one line says."""
    pricing = cast("Json", line.get("pricing") or {})
    details = cast("Json", pricing.get("price_details") or {})
    parent = cast("Json", line.get("parent") or {})
    item = cast("Json", parent.get("subscription_item_details") or {})
    return UsageLine(
        price_id=id_of(details.get("price")) or id_of(line.get("price")),
        subscription_item_id=item.get("subscription_item") or line.get("subscription_item"),
        quantity=line.get("quantity") or 0,
        amount_cents=line["amount"],
        starts_at=_moment(line["period"]["start"]),
        ends_at=_moment(line["period"]["end"]),
    )


def read_payment(source: Json) -> Payment:
    """Return what *source* says."""
    return Payment(
        id=source["id"],
        customer_id=id_of(source.get("customer")),
        status=source["status"],
        currency=source["currency"],
        received_cents=source.get("amount_received") or 0,
        metadata=dict(source.get("metadata") or {}),
    )


def read_checkout(source: Json) -> Checkout:
    """Return what *source* says."""
    return Checkout(
        id=source["id"],
        url=source.get("url"),
        mode=source["mode"],
        status=source.get("status"),
        customer_id=id_of(source.get("customer")),
        email=cast("Json", source.get("customer_details") or {}).get("email"),
        subscription_id=id_of(source.get("subscription")),
        payment_intent_id=id_of(source.get("payment_intent")),
    )


def read_event(source: Json) -> Event:
    """Return what *source*, a snapshot event or a thin one, is about. Errors: KeyError, TypeError or ValueError."""
    occurred = source["created"]
    if source.get("object") == "v2.core.event":
        related = cast("Json", source.get("related_object") or {})
        moment = datetime.fromisoformat(occurred)
    else:
        related = cast("Json", source["data"]["object"])
        moment = _moment(occurred)
    return Event(id=source["id"], type=source["type"], object_id=_related_id(related), occurred_at=moment)


def _related_id(related: Json) -> str:
    # Some objects, such as a customer's entitlements, have no id of their own; and an upcoming invoice has none yet.
    return related.get("id") or id_of(related.get("customer")) or ""


def subscription_of_invoice(source: Json) -> str | None:
    """Return which subscription an invoice belongs to, in either API shape."""
    parent = cast("Json", source.get("parent") or {})
    details = cast("Json", parent.get("subscription_details") or {})
    return id_of(details.get("subscription")) or id_of(source.get("subscription"))


def id_of(value: object) -> str | None:
    """Return the id of what may be expanded."""
    if isinstance(value, str):
        return value
    return cast("Json", value).get("id") if isinstance(value, Mapping) else None


def _items(source: Json) -> list[Json]:
    return list(cast("Iterable[Json]", cast("Json", source.get("items") or {"data": []})["data"]))


def _is_metered(item: Json) -> bool:
    recurring = cast("Json", item["price"].get("recurring") or {})
    return recurring.get("usage_type") == "metered"


def _meter_of(item: Json) -> str | None:
    return cast("Json", item["price"].get("recurring") or {}).get("meter")


def _plan_of(item: Json) -> str | None:
    return cast("Json", item["price"].get("metadata") or {}).get(PLAN_METADATA)


def _cents_per_month(item: Json) -> int:
    price = item["price"]
    recurring = cast("Json", price.get("recurring") or {})
    months = _MONTHS_OF.get(recurring.get("interval", ""), Decimal(1)) * (recurring.get("interval_count") or 1)
    cents = Decimal(price.get("unit_amount_decimal") or price.get("unit_amount") or 0) * (item.get("quantity") or 1)
    return int((cents / months).quantize(Decimal(1), ROUND_HALF_UP))


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _moment_or_none(seconds: int | None) -> datetime | None:
    return None if seconds is None else _moment(seconds)
