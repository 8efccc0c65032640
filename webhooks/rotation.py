"""Rotating an endpoint's signing secret without a moment in which a receiver cannot verify."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId
from core.sealing import Sealer
from webhooks import signing_secrets
from webhooks.endpoints import locked_endpoint, mark_changed
from webhooks.errors import RotationUnderway, SecretNotRevealable


async def rotate_secret(
    session: AsyncSession,
    endpoint_id: str,
    sealer: Sealer,
    *,
    organization_id: OrganizationId,
    secret: bytes | None = None,
) -> tuple[bytes, datetime]:
    """Give an endpoint another secret; return it, and when the one before ends: both sign until then.

    Errors: WebhookNotFound; RotationUnderway while an earlier rotation's overlap lasts.
    """
    row = await locked_endpoint(session, endpoint_id, organization_id=organization_id)
    ends_at = await signing_secrets.overlap_end(session, endpoint_id, organization_id=organization_id)
    if ends_at is not None:
        raise RotationUnderway(ends_at)
    await signing_secrets.drop_ending(session, endpoint_id, organization_id=organization_id)
    ends_at = await signing_secrets.limit_secrets(
        session, endpoint_id, signing_secrets.OVERLAP, organization_id=organization_id
    )
    made = await signing_secrets.add_secret(
        session, endpoint_id, sealer, secret=secret, organization_id=organization_id
    )
    await mark_changed(session, row)
    return made, ends_at


async def end_overlap(session: AsyncSession, endpoint_id: str, *, organization_id: OrganizationId) -> bool:
    """End the secret before the present one now; tell whether there was one. Errors: WebhookNotFound."""
    row = await locked_endpoint(session, endpoint_id, organization_id=organization_id)
    count = await signing_secrets.drop_ending(session, endpoint_id, organization_id=organization_id)
    await mark_changed(session, row)
    return count > 0


async def reveal_secret(
    session: AsyncSession, endpoint_id: str, sealer: Sealer, *, organization_id: OrganizationId
) -> bytes:
    """Return an endpoint's secret. Errors: WebhookNotFound, SealBroken; SecretNotRevealable if its owner said so."""
    row = await locked_endpoint(session, endpoint_id, organization_id=organization_id, is_read=True)
    if not row.is_secret_revealable:
        raise SecretNotRevealable
    return await signing_secrets.open_secret(session, endpoint_id, sealer, organization_id=organization_id)
