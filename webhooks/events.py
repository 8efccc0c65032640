"""What customers' servers can be told: one Struct for each type of event, with a schema and an example.

A body is the same bytes at every attempt: `{"id", "object": "event", "type", "created_at", "timestamp", "data"}`,
which is the form of Standard Webhooks (`type`, `timestamp`, `data`) and that of OpenAI's webhooks in one. Amounts are
text, in US dollars, exact; times are Unix seconds. What was asked or answered is never part of an event.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Literal

import msgspec


class EventData(msgspec.Struct, frozen=True, kw_only=True):
    """The data of an event; each kind names its type."""

    type: ClassVar[str]


class ChatCompleted(EventData, frozen=True, kw_only=True):
    """A call of a model has ended, however it ended. Sent only to endpoints that name this type."""

    type = "chat.completed"

    request_id: str
    project_id: str
    key_id: str
    model: str
    operation: str
    """As in the ledger: chat, text_completion, embeddings and so on."""
    status: int
    outcome: str
    is_estimated: bool
    """Whether the provider did not say what was used."""
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    charge_usd: str
    started_at: int
    duration_ms: int


class _KeyData(EventData, frozen=True, kw_only=True):
    id: str
    project_id: str
    name: str
    hint: str
    """How the key is shown: its first and last characters."""
    expires_at: int | None


class KeyCreated(_KeyData, frozen=True, kw_only=True):
    """An API key was made."""

    type = "key.created"


class KeyRotated(_KeyData, frozen=True, kw_only=True):
    """An API key has a new secret; the older one ends at *old_secret_ends_at*."""

    type = "key.rotated"

    old_secret_ends_at: int


class KeyRevoked(_KeyData, frozen=True, kw_only=True):
    """An API key was ended for good."""

    type = "key.revoked"


class KeyExpiring(_KeyData, frozen=True, kw_only=True):
    """An API key ends within a week."""

    type = "key.expiring"


class KeyLeaked(_KeyData, frozen=True, kw_only=True):
    """An API key was ended because its secret was found where it does not belong."""

    type = "key.leaked"

    found_at: str
    """Where, as whoever reported it wrote."""


class BudgetThresholdReached(EventData, frozen=True, kw_only=True):
    """Spending has crossed 50, 80 or 100 % of a budget in its present period."""

    type = "budget.threshold_reached"

    budget_id: str
    scope: Literal["organization", "project", "key"]
    scope_id: str
    period: Literal["day", "week", "month", "total"]
    period_start: int
    threshold_percent: int
    spent_usd: str
    limit_usd: str
    is_hard: bool


class LimitThresholdReached(EventData, frozen=True, kw_only=True):
    """The use of what the plan includes has crossed 80 or 100 % this month."""

    type = "limit.threshold_reached"

    unit: str
    threshold_percent: int
    used: int
    limit: int
    period_start: int
    renews_at: int


class SubscriptionUpdated(EventData, frozen=True, kw_only=True):
    """The organization's subscription has another status, plan or end."""

    type = "subscription.updated"

    id: str
    plan: str | None
    status: str
    current_period_start: int
    current_period_end: int
    trial_end: int | None
    cancel_at: int | None


class _InvoiceData(EventData, frozen=True, kw_only=True):
    id: str
    number: str | None
    currency: str
    total_cents: int
    paid_cents: int
    due_cents: int
    page_url: str | None


class InvoicePaid(_InvoiceData, frozen=True, kw_only=True):
    """An invoice was paid."""

    type = "invoice.paid"


class InvoicePaymentFailed(_InvoiceData, frozen=True, kw_only=True):
    """An invoice could not be paid; it is tried again, and calls are refused after the days of grace."""

    type = "invoice.payment_failed"


class EndpointFailing(EventData, frozen=True, kw_only=True):
    """An endpoint has not taken anything for a while, and will be disabled. Sent to the organization's others."""

    type = "webhook.endpoint.failing"

    endpoint_id: str
    description: str
    failing_since: int
    disabled_after: int
    problem: str


DisabledReason = Literal["gone", "failing", "owner", "operator"]


class EndpointDisabled(EventData, frozen=True, kw_only=True):
    """An endpoint was disabled. Sent to the organization's others."""

    type = "webhook.endpoint.disabled"

    endpoint_id: str
    description: str
    reason: DisabledReason


class Ping(EventData, frozen=True, kw_only=True):
    """A test. Sent to one endpoint when somebody asks for it."""

    type = "ping"

    message: str


class EventType(msgspec.Struct, frozen=True, kw_only=True):
    """A type of event as it is shown."""

    name: str
    description: str
    must_be_named: bool
    """Whether `*` leaves it out: there is one for every call."""
    schema: dict[str, Any]
    example: dict[str, Any]


def _with(example: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**example, **changes}


_KEY: Final[dict[str, Any]] = {
    "id": "key_01m8n6ad37ed983qs2nkvabbxt",
    "project_id": "proj_01m8n6ad2vf6t9h3b2r7k5d8wq",
    "name": "application",
    "hint": "sk-aap-3fGh...9xQz",
    "expires_at": None,
}
_INVOICE: Final[dict[str, Any]] = {
    "id": "in_1SPrX2LkdIwHu7ix",
    "number": "7GX4PL6C-0002",
    "currency": "usd",
    "total_cents": 9905,
    "paid_cents": 9905,
    "due_cents": 0,
    "page_url": "https://invoice.stripe.com/i/acct_1/test_1",
}
_EXAMPLES: Final[tuple[EventData, ...]] = (
    ChatCompleted(
        request_id="req_01m8n6ad5se8wvd4k3jz7tq0bn",
        project_id=_KEY["project_id"],
        key_id=_KEY["id"],
        model="gpt-4o-mini",
        operation="chat",
        status=200,
        outcome="done",
        is_estimated=False,
        input_tokens=120,
        cached_input_tokens=0,
        output_tokens=48,
        reasoning_tokens=0,
        charge_usd="0.0000468",
        started_at=1_767_225_600,
        duration_ms=812,
    ),
    KeyCreated(**_KEY),
    KeyRotated(**_KEY, old_secret_ends_at=1_767_312_000),
    KeyRevoked(**_KEY),
    KeyExpiring(**_with(_KEY, expires_at=1_767_830_400)),
    KeyLeaked(**_KEY, found_at="a public repository"),
    BudgetThresholdReached(
        budget_id="bud_01m8n6ad4kq0y5xw8r3f7c2hst",
        scope="project",
        scope_id=_KEY["project_id"],
        period="month",
        period_start=1_767_225_600,
        threshold_percent=80,
        spent_usd="80.2",
        limit_usd="100",
        is_hard=True,
    ),
    LimitThresholdReached(
        unit="chat_requests",
        threshold_percent=80,
        used=80_012,
        limit=100_000,
        period_start=1_767_225_600,
        renews_at=1_769_904_000,
    ),
    SubscriptionUpdated(
        id="sub_1SPrX2LkdIwHu7ix",
        plan="pro",
        status="active",
        current_period_start=1_767_225_600,
        current_period_end=1_769_904_000,
        trial_end=None,
        cancel_at=None,
    ),
    InvoicePaid(**_INVOICE),
    InvoicePaymentFailed(**_with(_INVOICE, paid_cents=0, due_cents=9905)),
    EndpointFailing(
        endpoint_id="whe_01m8n6ad6b3v0q8y5n2wkxr7ht",
        description="orders",
        failing_since=1_767_225_600,
        disabled_after=1_767_657_600,
        problem="answered 500",
    ),
    EndpointDisabled(endpoint_id="whe_01m8n6ad6b3v0q8y5n2wkxr7ht", description="orders", reason="failing"),
    Ping(message="Hello from your gateway."),
)
EXAMPLES: Final = {example.type: example for example in _EXAMPLES}
"""An example of the data of every type."""
EVERYTHING: Final = "*"
MUST_BE_NAMED: Final = frozenset({ChatCompleted.type})
"""Types of which there are so many that `*` does not mean them."""
UNASKED: Final = frozenset({Ping.type})
"""Types that nobody has to choose: they go to whom they were asked for."""
_EXAMPLE_ID: Final = "evt_01m8n6ad7xk2c4t9z8w5f3hbqv"
_EXAMPLE_TIME: Final = datetime(2026, 1, 1, tzinfo=UTC)


def catalogue() -> list[EventType]:
    """Return every type of event, with the schema of its data and a whole body as an example."""
    return [
        EventType(
            name=example.type,
            description=(type(example).__doc__ or "").strip(),
            must_be_named=example.type in MUST_BE_NAMED,
            schema=_schema(type(example)),
            example=msgspec.json.decode(
                body_of(_EXAMPLE_ID, example.type, _EXAMPLE_TIME, msgspec.json.encode(example)), type=dict[str, Any]
            ),
        )
        for example in _EXAMPLES
    ]


def wants(event_types: Sequence[str], name: str) -> bool:
    """Tell whether an endpoint with *event_types* is sent events called *name*."""
    return name in UNASKED or name in event_types or (EVERYTHING in event_types and name not in MUST_BE_NAMED)


def body_of(event_id: str, name: str, created_at: datetime, data: bytes) -> bytes:
    """Return an event as it is signed and sent, around *data*, which is JSON and stays byte for byte."""
    moment = created_at.astimezone(UTC)
    timestamp = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return (
        f'{{"id":"{event_id}","object":"event","type":"{name}","created_at":{int(moment.timestamp())},'
        f'"timestamp":"{timestamp}","data":'
    ).encode() + b"%b}" % data


def _schema(data: type[EventData]) -> dict[str, Any]:
    schema, components = msgspec.json.schema_components([data], ref_template="#/$defs/{name}")
    return {**components[data.__name__]} if len(components) == 1 else {**schema[0], "$defs": components}
