"""What the routes of webhooks take and give, in the style of OpenAI's administration API. Times are Unix seconds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from core.errors import Invalid
from webhooks.deliveries import AttemptView, DeliveryDetails, DeliveryView, State
from webhooks.endpoints import EndpointChange, EndpointView, NewEndpoint
from webhooks.resend import Replay
from webhooks.signing import parse_secret

Url = Annotated[str, Meta(max_length=2_000, description="An https:// address on the public internet.")]
Description = Annotated[str, Meta(max_length=500)]
EventTypes = Annotated[
    list[Annotated[str, Meta(max_length=64)]],
    Meta(max_length=50, description="Types of events, or `*`: all but those that must be named."),
]
Filter = Annotated[str, Meta(max_length=1_000, description="JMESPath on an event's `data`; what is true is sent.")]
Headers = Annotated[dict[str, str], Meta(description="Sent with every webhook; never shown again.")]
Rate = Annotated[int, Meta(ge=1, le=1_000, description="Deliveries a second at most.")]
Secret = Annotated[str, Meta(max_length=128, description="whsec_ and 24 to 64 bytes in base64.")]
Moment = Annotated[int, Meta(ge=0, le=253_402_300_799)]


class EndpointForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new endpoint."""

    url: Url
    description: Description = ""
    event_types: EventTypes = msgspec.field(default_factory=lambda: ["*"])
    filter: Filter | None = None
    headers: Headers = {}
    requests_per_second: Rate | None = None
    secret: Secret | None = None
    is_secret_revealable: bool = True

    def wanted(self) -> NewEndpoint:
        """Return what it asks for. Errors: Invalid."""
        return NewEndpoint(
            url=self.url,
            description=self.description,
            event_types=self.event_types,
            filter=self.filter,
            headers=self.headers,
            requests_per_second=self.requests_per_second,
            secret=secret_of(self.secret),
            is_secret_revealable=self.is_secret_revealable,
        )


class EndpointChangeForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be different; what is left out stays as it is."""

    url: Url | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    event_types: EventTypes | UnsetType = UNSET
    filter: Filter | UnsetType | None = UNSET
    headers: Headers | UnsetType = UNSET
    requests_per_second: Rate | UnsetType | None = UNSET
    is_secret_revealable: bool | UnsetType = UNSET

    def wanted(self) -> EndpointChange:
        """Return what it asks for."""
        return EndpointChange(**msgspec.structs.asdict(self))


class SecretForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another signing secret."""

    secret: Secret | None = None


class RecoverForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Send again what was not taken since a moment."""

    since: Moment
    dry_run: Annotated[bool, Meta(description="Only count.")] = False


class ReplayForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Send again what was sent, whatever came of it."""

    since: Moment
    until: Moment | None = None
    event_types: EventTypes = []
    state: State | None = None
    dry_run: Annotated[bool, Meta(description="Only count.")] = False

    def wanted(self) -> Replay:
        """Return what it asks for."""
        return Replay(
            since=moment_of(self.since),
            until=None if self.until is None else moment_of(self.until),
            event_types=self.event_types,
            state=self.state,
        )


class EndpointObject(Struct, frozen=True, kw_only=True):
    """An endpoint. Of its headers, the names; its secret is shown by a route of its own."""

    id: str
    url: str
    description: str
    event_types: list[str]
    filter: str | None
    header_names: list[str] | None
    """None: it has headers, and the operator's key for them is gone; they can be given anew."""
    requests_per_second: int | None
    is_secret_revealable: bool
    status: str
    disabled_at: int | None
    disabled_reason: str | None
    failing_since: int | None
    last_success_at: int | None
    last_problem: str | None
    created_at: int
    object: Literal["webhook_endpoint"] = "webhook_endpoint"


class NewEndpointObject(EndpointObject, frozen=True, kw_only=True):
    """An endpoint with its signing secret, as it was just made."""

    secret: str


class EndpointPage(Struct, frozen=True):
    """Endpoints, newest first."""

    data: list[EndpointObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class DeletedObject(Struct, frozen=True, kw_only=True):
    """What was deleted."""

    id: str
    deleted: bool = True
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"


class SecretObject(Struct, frozen=True, kw_only=True):
    """A signing secret. *older_secret_ends_at*: until then the one before signs, too."""

    secret: str
    older_secret_ends_at: int | None = None
    object: Literal["webhook_endpoint.secret"] = "webhook_endpoint.secret"


class OverlapObject(Struct, frozen=True, kw_only=True):
    """Whether there was an older secret that was ended."""

    ended: bool
    object: Literal["webhook_endpoint.overlap"] = "webhook_endpoint.overlap"


class TestObject(Struct, frozen=True, kw_only=True):
    """The event that is sent as a test."""

    event_id: str
    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"


class CountObject(Struct, frozen=True, kw_only=True):
    """How many deliveries are sent again, or would be."""

    count: int
    dry_run: bool
    object: Literal["webhook_delivery.count"] = "webhook_delivery.count"


class DeliveryObject(Struct, frozen=True, kw_only=True):
    """What an endpoint is due, or was sent, of an event."""

    id: str
    endpoint_id: str
    event_id: str
    event_type: str
    state: str
    attempt_count: int
    next_attempt_at: int | None
    last_status: int | None
    last_problem: str | None
    finished_at: int | None
    created_at: int
    object: Literal["webhook_delivery"] = "webhook_delivery"


class AttemptObject(Struct, frozen=True, kw_only=True):
    """One try. *response_body* is the beginning of what was answered, 16 kB at most."""

    id: str
    status: int | None
    problem: str | None
    duration_ms: int
    response_body: str | None
    started_at: int
    object: Literal["webhook_delivery.attempt"] = "webhook_delivery.attempt"


class DeliveryDetailsObject(DeliveryObject, frozen=True, kw_only=True):
    """A delivery with its event as it is sent (null: kept no longer), and every try, oldest first."""

    event: dict[str, Any] | None
    attempts: list[AttemptObject]


class DeliveryPage(Struct, frozen=True):
    """Deliveries, newest event first."""

    data: list[DeliveryObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class EventTypeObject(Struct, frozen=True, kw_only=True):
    """A type of event: JSON Schema of its data, and a whole event as an example."""

    name: str
    description: str
    must_be_named: bool
    schema: dict[str, Any]
    example: dict[str, Any]
    object: Literal["webhook_event_type"] = "webhook_event_type"


class EventTypeList(Struct, frozen=True):
    """Every type of event."""

    data: list[EventTypeObject]
    object: Literal["list"] = "list"


class PublishedKeys(Struct, frozen=True):
    """A JSON Web Key Set (RFC 7517) of ed25519 keys (RFC 8037), the newest first."""

    keys: list[dict[str, Any]]


def secret_of(text: str | None) -> bytes | None:
    """Return the secret that somebody brings. Errors: Invalid, which does not repeat it."""
    if text is None:
        return None
    try:
        return parse_secret(text)
    except ValueError as error:
        raise Invalid(f"Invalid 'secret': {error}.", param="secret") from None


def moment_of(seconds: int) -> datetime:
    """Return the moment that Unix seconds name."""
    return datetime.fromtimestamp(seconds, UTC)


def endpoint_object(view: EndpointView) -> EndpointObject:
    """Return an endpoint as it is shown."""
    return EndpointObject(**_endpoint_fields(view))


def new_endpoint_object(view: EndpointView, secret: str) -> NewEndpointObject:
    """Return an endpoint that was just made."""
    return NewEndpointObject(**_endpoint_fields(view), secret=secret)


def delivery_object(view: DeliveryView) -> DeliveryObject:
    """Return a delivery as it is shown."""
    return DeliveryObject(**_delivery_fields(view))


def details_object(details: DeliveryDetails) -> DeliveryDetailsObject:
    """Return a delivery with all that is known of it."""
    attempts = [_attempt_object(one) for one in details.attempts]
    return DeliveryDetailsObject(**_delivery_fields(details.delivery), event=details.event, attempts=attempts)


def _endpoint_fields(view: EndpointView) -> dict[str, Any]:
    return {
        "id": view.id,
        "url": view.url,
        "description": view.description,
        "event_types": view.event_types,
        "filter": view.filter,
        "header_names": view.header_names,
        "requests_per_second": view.requests_per_second,
        "is_secret_revealable": view.is_secret_revealable,
        "status": view.status,
        "disabled_at": _seconds(view.disabled_at),
        "disabled_reason": view.disabled_reason,
        "failing_since": _seconds(view.failing_since),
        "last_success_at": _seconds(view.last_success_at),
        "last_problem": view.last_problem,
        "created_at": _seconds(view.created_at),
    }


def _delivery_fields(view: DeliveryView) -> dict[str, Any]:
    return {
        "id": view.id,
        "endpoint_id": view.endpoint_id,
        "event_id": view.event_id,
        "event_type": view.event_type,
        "state": view.state,
        "attempt_count": view.attempts,
        "next_attempt_at": _seconds(view.due_at) if view.state == "pending" else None,
        "last_status": view.last_status,
        "last_problem": view.last_problem,
        "finished_at": _seconds(view.finished_at),
        "created_at": _seconds(view.created_at),
    }


def _attempt_object(view: AttemptView) -> AttemptObject:
    return AttemptObject(
        id=view.id,
        status=view.status,
        problem=view.problem,
        duration_ms=view.duration_ms,
        response_body=view.response_body,
        started_at=int(view.started_at.timestamp()),
    )


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
