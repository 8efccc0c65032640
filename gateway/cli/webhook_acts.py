"""What `aap webhooks` does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import TypeVar

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from core.sealing import SealBroken, Sealer
from gateway.cli.common import fail
from gateway.cli.stores import Stores, chosen_organization, on_stores
from gateway.egress_file import EgressFile
from webhooks import deliveries, endpoints, overview, resend, rotation
from webhooks.deliveries import DeliveryDetails, DeliveryFilter, DeliveryView
from webhooks.endpoints import EndpointChange, EndpointView, NewEndpoint
from webhooks.errors import WebhooksNotConfigured
from webhooks.overview import TroubledEndpoint, WebhookStatus
from webhooks.resend import Replay
from webhooks.signing import parse_secret, secret_text

_SHOWN_MAX = 100
_RESEALED_AT_ONCE = 500
_T = TypeVar("_T")
_Act = Callable[[AsyncSession, Sealer, OrganizationId], Awaitable[_T]]


class StatusShown(msgspec.Struct, frozen=True):
    """How delivering goes, and which endpoints are in trouble."""

    status: WebhookStatus
    troubled: list[TroubledEndpoint]


class MadeEndpoint(msgspec.Struct, frozen=True):
    """An endpoint that was just made, and its secret."""

    endpoint: EndpointView
    secret: str


class NewSecret(msgspec.Struct, frozen=True):
    """A secret, and until when the one before signs, too."""

    secret: str
    older_secret_ends_at: datetime | None = None


class Counted(msgspec.Struct, frozen=True):
    """How many deliveries are sent again, or would be."""

    count: int
    dry_run: bool


class Resealed(msgspec.Struct, frozen=True):
    """How much was sealed anew under the newest key."""

    secrets: int
    headers: int


def status() -> StatusShown:
    """Return how delivering goes."""

    async def act(stores: Stores) -> StatusShown:
        async with stores.database.transaction() as session:
            return StatusShown(await overview.status(session), await overview.troubled(session, _SHOWN_MAX))

    return on_stores(act)


def list_endpoints(org: str | None) -> list[EndpointView]:
    """Return an organization's endpoints."""

    async def act(stores: Stores) -> list[EndpointView]:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            return await endpoints.list_endpoints(session, _SHOWN_MAX, _sealer(stores), organization_id=organization_id)

    return on_stores(_readable(act))


def create(org: str | None, new: NewEndpoint, secret: str | None) -> MadeEndpoint:
    """Make an endpoint."""
    wanted = msgspec.structs.replace(new, secret=_brought(secret))

    async def act(stores: Stores) -> MadeEndpoint:
        organization_id = await chosen_organization(stores, org)
        policy = EgressFile(stores.settings.config_path).policy()
        async with stores.database.transaction() as session:
            view, made = await endpoints.create_endpoint(
                session, wanted, policy, _sealer(stores), organization_id=organization_id
            )
        return MadeEndpoint(view, secret_text(made))

    return on_stores(act)


def update(endpoint_id: str, change: EndpointChange) -> EndpointView:
    """Change an endpoint."""

    async def act(stores: Stores) -> EndpointView:
        policy = EgressFile(stores.settings.config_path).policy()
        async with stores.database.transaction() as session:
            organization_id = await overview.owner_of(session, endpoint_id)
            return await endpoints.update_endpoint(
                session, endpoint_id, change, policy, _sealer(stores), organization_id=organization_id
            )

    return on_stores(_readable(act))


def show(endpoint_id: str) -> EndpointView:
    """Return an endpoint."""
    return _of(
        endpoint_id,
        lambda session, sealer, owner: endpoints.get_endpoint(session, endpoint_id, sealer, organization_id=owner),
    )


def enable(endpoint_id: str) -> EndpointView:
    """Send to an endpoint again."""
    return _of(
        endpoint_id,
        lambda session, sealer, owner: endpoints.enable_endpoint(session, endpoint_id, sealer, organization_id=owner),
    )


def disable(endpoint_id: str) -> EndpointView:
    """Stop sending to an endpoint."""
    return _of(
        endpoint_id,
        lambda session, sealer, owner: endpoints.disable_endpoint(
            session, endpoint_id, sealer, "operator", organization_id=owner
        ),
    )


def delete(endpoint_id: str) -> None:
    """Delete an endpoint."""
    _of(
        endpoint_id,
        lambda session, _, owner: endpoints.delete_endpoint(session, endpoint_id, organization_id=owner),
    )


def send_test(endpoint_id: str) -> str:
    """Have a ping sent; return the event's id."""
    return _of(endpoint_id, lambda session, _, owner: endpoints.send_test(session, endpoint_id, organization_id=owner))


def rotate(endpoint_id: str, secret: str | None) -> NewSecret:
    """Give an endpoint another secret."""
    brought = _brought(secret)

    async def act(session: AsyncSession, sealer: Sealer, owner: OrganizationId) -> NewSecret:
        made, ends_at = await rotation.rotate_secret(
            session, endpoint_id, sealer, secret=brought, organization_id=owner
        )
        return NewSecret(secret_text(made), ends_at)

    return _of(endpoint_id, act)


def end_overlap(endpoint_id: str) -> bool:
    """End the older secret."""
    return _of(endpoint_id, lambda session, _, owner: rotation.end_overlap(session, endpoint_id, organization_id=owner))


def reveal(endpoint_id: str) -> NewSecret:
    """Return an endpoint's secret."""

    async def act(session: AsyncSession, sealer: Sealer, owner: OrganizationId) -> NewSecret:
        return NewSecret(secret_text(await rotation.reveal_secret(session, endpoint_id, sealer, organization_id=owner)))

    return _of(endpoint_id, act)


def recover(endpoint_id: str, since: datetime, *, dry_run: bool) -> Counted:
    """Send what was not taken."""

    async def act(session: AsyncSession, _: Sealer, owner: OrganizationId) -> Counted:
        count = await resend.recover(session, endpoint_id, since, organization_id=owner, is_dry_run=dry_run)
        return Counted(count, dry_run)

    return _of(endpoint_id, act)


def replay(endpoint_id: str, chosen: Replay, *, dry_run: bool) -> Counted:
    """Send again what was sent."""

    async def act(session: AsyncSession, _: Sealer, owner: OrganizationId) -> Counted:
        count = await resend.replay(session, endpoint_id, chosen, organization_id=owner, is_dry_run=dry_run)
        return Counted(count, dry_run)

    return _of(endpoint_id, act)


def list_deliveries(org: str | None, chosen: DeliveryFilter, limit: int) -> Sequence[DeliveryView]:
    """Return deliveries, newest first."""

    async def act(stores: Stores) -> list[DeliveryView]:
        async with stores.database.transaction() as session:
            owner = await overview.owner_of(session, chosen.endpoint_id) if chosen.endpoint_id and not org else None
        organization_id = owner or await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            return await deliveries.list_deliveries(session, chosen, limit, organization_id=organization_id)

    return on_stores(act)


def show_delivery(delivery_id: str) -> DeliveryDetails:
    """Return a delivery with its attempts."""
    return _of(
        delivery_id, lambda session, _, owner: deliveries.get_delivery(session, delivery_id, organization_id=owner)
    )


def resend_one(delivery_id: str) -> None:
    """Send a delivery again."""
    _of(delivery_id, lambda session, _, owner: resend.resend(session, delivery_id, organization_id=owner))


def reseal() -> Resealed:
    """Seal everything under the newest key, so that older ones can be taken away."""

    async def act(stores: Stores) -> Resealed:
        sealer = _sealer(stores)
        counts: list[int] = []
        for part in (overview.reseal, overview.reseal_headers):
            count, after = 0, ""
            while after is not None:
                async with stores.database.transaction() as session:
                    more, after = await part(session, sealer, after, _RESEALED_AT_ONCE)
                count += more
            counts.append(count)
        return Resealed(*counts)

    return on_stores(_readable(act))


def _of(one_id: str, act: _Act[_T]) -> _T:
    """Run *act* for whoever the endpoint or delivery belongs to."""

    async def owned(stores: Stores) -> _T:
        async with stores.database.transaction() as session:
            owner = await overview.owner_of(session, one_id)
            return await act(session, _sealer(stores), owner)

    return on_stores(_readable(owned))


def _readable(act: Callable[[Stores], Awaitable[_T]]) -> Callable[[Stores], Awaitable[_T]]:
    """Say in words that a sealing key is missing."""

    async def told(stores: Stores) -> _T:
        try:
            return await act(stores)
        except SealBroken as error:
            fail(f"a secret cannot be read: {error}")

    return told


def _sealer(stores: Stores) -> Sealer:
    if not stores.sealing_keys:
        raise WebhooksNotConfigured
    return Sealer(stores.sealing_keys)


def _brought(secret: str | None) -> bytes | None:
    if secret is None:
        return None
    try:
        return parse_secret(secret)
    except ValueError as error:
        fail(f"the secret is not valid: {error}")
