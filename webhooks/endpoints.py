"""Making and changing endpoints. Every change wakes the worker that sends to it (`webhooks/worker.py`).

Functions take a session and never commit. PostgreSQL down: errors of `core.database.DOWN`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec
import structlog
from msgspec import UNSET, UnsetType
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from core.egress import EgressPolicy, EgressRefused, check_url
from core.http1.messages import CLIENT_HEADERS, TOKEN
from core.ids import OrganizationId, new_id
from core.sealing import SealBroken, Sealer
from webhooks.errors import (
    EndpointIsDisabled,
    EndpointUrlInvalid,
    EventTypeUnknown,
    HeaderInvalid,
    TooManyEndpoints,
    WebhookNotFound,
)
from webhooks.events import EVERYTHING, EXAMPLES, UNASKED, DisabledReason, EndpointDisabled, Ping
from webhooks.filters import check_filter
from webhooks.publish import publish, wake
from webhooks.signing_secrets import add_secret
from webhooks.tables import WebhookEndpointRow
from webhooks.vault import open_headers, seal_headers

ENDPOINTS_MAX: Final = 50
HEADERS_MAX: Final = 20
_HEADER_CHARACTERS_MAX: Final = 4_096
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e]*")
_log = structlog.get_logger(__name__)
# Ours to set; `webhook-…` is what receivers verify by.
_OUR_HEADERS: Final = {"content-type", "content-encoding", "accept", "user-agent", *map(bytes.decode, CLIENT_HEADERS)}


class NewEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint is asked to be."""

    url: str
    description: str = ""
    event_types: Sequence[str] = (EVERYTHING,)
    filter: str | None = None
    headers: Mapping[str, str] = {}
    requests_per_second: int | None = None
    secret: bytes | None = None
    """One that its owner has already; by default a fresh one is made."""
    is_secret_revealable: bool = True


class EndpointChange(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be different of an endpoint; what is not given stays."""

    url: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    event_types: Sequence[str] | UnsetType = UNSET
    filter: str | UnsetType | None = UNSET
    headers: Mapping[str, str] | UnsetType = UNSET
    requests_per_second: int | UnsetType | None = UNSET
    is_secret_revealable: bool | UnsetType = UNSET


class EndpointView(msgspec.Struct, frozen=True, kw_only=True):
    """What may be told of an endpoint. Of its headers, the names."""

    id: str
    organization_id: str
    url: str
    description: str
    event_types: list[str]
    filter: str | None
    header_names: list[str] | None
    """None: it has headers, and they cannot be unsealed."""
    requests_per_second: int | None
    is_secret_revealable: bool
    disabled_at: datetime | None
    disabled_reason: str | None
    failing_since: datetime | None
    consecutive_failures: int
    resting_until: datetime | None
    last_success_at: datetime | None
    last_problem: str | None
    created_at: datetime

    @property
    def status(self) -> str:
        """How it is doing: enabled, failing or disabled."""
        if self.disabled_at is not None:
            return "disabled"
        return "failing" if self.failing_since is not None else "enabled"


async def create_endpoint(
    session: AsyncSession, new: NewEndpoint, policy: EgressPolicy, sealer: Sealer, *, organization_id: OrganizationId
) -> tuple[EndpointView, bytes]:
    """Add an endpoint; return it and its signing secret.

    Errors: EndpointUrlInvalid, EventTypeUnknown, FilterInvalid, HeaderInvalid, TooManyEndpoints.
    """
    # One at a time for each organization: of two who count at once, both would find room.
    await session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"webhook_endpoints {organization_id}"))))
    count = await session.scalar(
        select(func.count())
        .select_from(WebhookEndpointRow)
        .where(WebhookEndpointRow.organization_id == organization_id, WebhookEndpointRow.deleted_at.is_(None))
    )
    if (count or 0) >= ENDPOINTS_MAX:
        raise TooManyEndpoints(ENDPOINTS_MAX)
    endpoint_id = new_id("whe")
    row = WebhookEndpointRow(
        id=endpoint_id,
        organization_id=organization_id,
        url=_checked_url(new.url, policy),
        description=new.description,
        event_types=check_types(new.event_types),
        filter=_checked_filter(new.filter),
        sealed_headers=seal_headers(
            sealer, _checked_headers(new.headers), organization_id=organization_id, endpoint_id=endpoint_id
        ),
        requests_per_second=new.requests_per_second,
        is_secret_revealable=new.is_secret_revealable,
    )
    session.add(row)
    await session.flush()
    await session.refresh(row)
    secret = await add_secret(session, endpoint_id, sealer, secret=new.secret, organization_id=organization_id)
    return _view(row, sealer), secret


async def list_endpoints(
    session: AsyncSession, limit: int, sealer: Sealer, *, organization_id: OrganizationId, after: str | None = None
) -> list[EndpointView]:
    """Return endpoints, newest first, from the one after *after* on."""
    query = select(WebhookEndpointRow).where(
        WebhookEndpointRow.organization_id == organization_id, WebhookEndpointRow.deleted_at.is_(None)
    )
    if after is not None:
        query = query.where(WebhookEndpointRow.id < after)
    rows = await session.scalars(query.order_by(WebhookEndpointRow.id.desc()).limit(limit))
    return [_view(row, sealer) for row in rows]


async def get_endpoint(
    session: AsyncSession, endpoint_id: str, sealer: Sealer, *, organization_id: OrganizationId
) -> EndpointView:
    """Return an endpoint. Errors: WebhookNotFound."""
    return _view(await locked_endpoint(session, endpoint_id, organization_id=organization_id, is_read=True), sealer)


async def update_endpoint(
    session: AsyncSession,
    endpoint_id: str,
    change: EndpointChange,
    policy: EgressPolicy,
    sealer: Sealer,
    *,
    organization_id: OrganizationId,
) -> EndpointView:
    """Change an endpoint; what is not sent yet is sent as it is from now on. Errors: as `create_endpoint`."""
    row = await locked_endpoint(session, endpoint_id, organization_id=organization_id)
    if change.url is not UNSET:
        if change.url != row.url:
            _begin_anew(row)
        row.url = _checked_url(change.url, policy)
    if change.event_types is not UNSET:
        row.event_types = check_types(change.event_types)
    if change.filter is not UNSET:
        row.filter = _checked_filter(change.filter)
    if change.headers is not UNSET:
        row.sealed_headers = seal_headers(
            sealer, _checked_headers(change.headers), organization_id=organization_id, endpoint_id=endpoint_id
        )
    if change.description is not UNSET:
        row.description = change.description
    if change.requests_per_second is not UNSET:
        row.requests_per_second = change.requests_per_second
    if change.is_secret_revealable is not UNSET:
        # That it is not shown again is a promise: who could take it back could have it shown.
        row.is_secret_revealable = row.is_secret_revealable and change.is_secret_revealable
    await mark_changed(session, row)
    return _view(row, sealer)


async def delete_endpoint(session: AsyncSession, endpoint_id: str, *, organization_id: OrganizationId) -> None:
    """End an endpoint: nothing is sent to it any more, and a worker deletes what is left. Errors: WebhookNotFound."""
    row = await locked_endpoint(session, endpoint_id, organization_id=organization_id)
    row.deleted_at, row.worker_id = func.now(), None
    await mark_changed(session, row)


async def disable_endpoint(
    session: AsyncSession,
    endpoint_id: str,
    sealer: Sealer,
    reason: DisabledReason = "owner",
    *,
    organization_id: OrganizationId,
) -> EndpointView:
    """Stop sending to an endpoint, and give up what it is still due. Errors: WebhookNotFound."""
    row = await locked_endpoint(session, endpoint_id, organization_id=organization_id)
    if row.disabled_at is None:
        row.disabled_at, row.disabled_reason, row.worker_id = func.now(), reason, None
        disabled = EndpointDisabled(endpoint_id=row.id, description=row.description, reason=reason)
        await publish(session, disabled, organization_id=organization_id)
    await mark_changed(session, row)
    return _view(row, sealer)


async def enable_endpoint(
    session: AsyncSession, endpoint_id: str, sealer: Sealer, *, organization_id: OrganizationId
) -> EndpointView:
    """Send to an endpoint again, from now on, as to one that is well. Errors: WebhookNotFound.

    One that is enabled and rests because it failed is tried at once.
    """
    row = await locked_endpoint(session, endpoint_id, organization_id=organization_id)
    row.disabled_at = row.disabled_reason = None
    _begin_anew(row)
    await mark_changed(session, row)
    return _view(row, sealer)


async def send_test(session: AsyncSession, endpoint_id: str, *, organization_id: OrganizationId) -> str:
    """Have a `ping` sent to an endpoint; return the event's id. Errors: WebhookNotFound, EndpointIsDisabled."""
    row = await locked_endpoint(session, endpoint_id, organization_id=organization_id, is_read=True)
    if row.disabled_at is not None:
        raise EndpointIsDisabled
    ping = Ping(message="Hello from your gateway.")
    return await publish(session, ping, organization_id=organization_id, endpoint_id=endpoint_id)


async def locked_endpoint(
    session: AsyncSession, endpoint_id: str, *, organization_id: OrganizationId, is_read: bool = False
) -> WebhookEndpointRow:
    """Return an endpoint's row, which nobody else changes meanwhile unless it *is_read* only.

    Errors: WebhookNotFound, also for what is somebody else's.
    """
    query = select(WebhookEndpointRow).where(
        WebhookEndpointRow.organization_id == organization_id,
        WebhookEndpointRow.id == endpoint_id,
        WebhookEndpointRow.deleted_at.is_(None),
    )
    # A row that the session has read before is not what it is now.
    query = query.execution_options(populate_existing=True)
    row = await session.scalar(query if is_read else query.with_for_update())
    if row is None:
        raise WebhookNotFound("endpoint")
    return row


async def mark_changed(session: AsyncSession, row: WebhookEndpointRow) -> None:
    """Have the worker that sends to an endpoint look at it anew once this transaction has ended."""
    # Later than any before it, whatever PostgreSQL's clock does: a worker tells by it whether what it has is true.
    row.updated_at = func.greatest(func.clock_timestamp(), row.updated_at + timedelta(microseconds=1))
    await session.flush()
    await session.refresh(row)
    await wake(session, row.id)


def _begin_anew(row: WebhookEndpointRow) -> None:
    """Let nothing be known of how the endpoint does."""
    row.failing_since = row.resting_until = None
    row.consecutive_failures = row.warned_percent = 0
    row.enabled_at = func.greatest(func.clock_timestamp(), row.enabled_at + timedelta(microseconds=1))


def check_types(names: Sequence[str], *, more: Collection[str] = ()) -> list[str]:
    """Return *names* of types, each once, that an endpoint may have. Those of *more* may be there, too.

    Errors: EventTypeUnknown.
    """
    known = [EVERYTHING, *(name for name in EXAMPLES if name not in UNASKED)]
    for name in names if names or more else [""]:
        if name not in known and name not in more:
            raise EventTypeUnknown(name, ", ".join(known))
    return list(dict.fromkeys(names))


def _checked_url(url: str, policy: EgressPolicy) -> str:
    try:
        check_url(url, policy)
    except EgressRefused as error:
        raise EndpointUrlInvalid(str(error)) from None
    return url


def _checked_filter(expression: str | None) -> str | None:
    if expression is not None:
        check_filter(expression)
    return expression


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers that can be sent, their names in lower case. Errors: HeaderInvalid, without a value."""
    checked: dict[str, str] = {}
    for name, value in headers.items():
        lowered = name.lower()
        if not TOKEN.fullmatch(name.encode()):
            raise HeaderInvalid(f"{name[:64]!r} is no name of a header")
        if lowered in _OUR_HEADERS or lowered.startswith("webhook-"):
            raise HeaderInvalid(f"{lowered!r} is set by us")
        if not _HEADER_VALUE.fullmatch(value) or value != value.strip():
            raise HeaderInvalid(f"the value of {lowered!r} is not visible ASCII")
        if lowered in checked:
            raise HeaderInvalid(f"{lowered!r} is there twice")
        checked[lowered] = value
    if len(checked) > HEADERS_MAX or sum(len(n) + len(v) for n, v in checked.items()) > _HEADER_CHARACTERS_MAX:
        raise HeaderInvalid(f"there are more than {HEADERS_MAX}, or more than {_HEADER_CHARACTERS_MAX} characters")
    return checked


def _header_names(row: WebhookEndpointRow, sealer: Sealer) -> list[str] | None:
    try:
        return sorted(open_headers(sealer, row.sealed_headers, organization_id=row.organization_id, endpoint_id=row.id))
    except SealBroken as error:
        # One endpoint's key that is gone hides neither the others nor what is to be mended of it.
        _log.error("webhooks.headers_unreadable", endpoint_id=row.id, error=str(error))
        return None


def _view(row: WebhookEndpointRow, sealer: Sealer) -> EndpointView:
    return EndpointView(
        id=row.id,
        organization_id=row.organization_id,
        url=row.url,
        description=row.description,
        event_types=row.event_types,
        filter=row.filter,
        header_names=_header_names(row, sealer),
        requests_per_second=row.requests_per_second,
        is_secret_revealable=row.is_secret_revealable,
        disabled_at=row.disabled_at,
        disabled_reason=row.disabled_reason,
        failing_since=row.failing_since,
        consecutive_failures=row.consecutive_failures,
        resting_until=row.resting_until,
        last_success_at=row.last_success_at,
        last_problem=row.last_problem,
        created_at=row.created_at,
    )
