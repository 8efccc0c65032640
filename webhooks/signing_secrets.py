"""The signing secrets of an endpoint: made, rotated with an overlap, shown again to whom they belong."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import database_now
from core.ids import OrganizationId, new_id
from core.sealing import Sealer
from webhooks.signing import new_secret
from webhooks.tables import WebhookSecretRow
from webhooks.vault import secret_place

OVERLAP: Final = timedelta(hours=24)
"""How long the secret before a rotation works, too (as with Svix)."""


async def add_secret(
    session: AsyncSession,
    endpoint_id: str,
    sealer: Sealer,
    *,
    organization_id: OrganizationId,
    secret: bytes | None = None,
) -> bytes:
    """Give an endpoint a secret without an end, a fresh one by default; return it."""
    secret = new_secret() if secret is None else secret
    secret_id = new_id("whs")
    session.add(
        WebhookSecretRow(
            id=secret_id,
            organization_id=organization_id,
            endpoint_id=endpoint_id,
            sealed=sealer.seal(secret, secret_place(organization_id, secret_id)),
        )
    )
    await session.flush()
    return secret


async def overlap_end(session: AsyncSession, endpoint_id: str, *, organization_id: OrganizationId) -> datetime | None:
    """Return when the secret before the present one ends; None: there is only one."""
    return await session.scalar(
        select(func.max(WebhookSecretRow.not_after)).where(
            WebhookSecretRow.organization_id == organization_id,
            WebhookSecretRow.endpoint_id == endpoint_id,
            WebhookSecretRow.not_after > func.now(),
        )
    )


async def limit_secrets(
    session: AsyncSession, endpoint_id: str, end_after: timedelta, *, organization_id: OrganizationId
) -> datetime:
    """Let the endpoint's present secrets end; return when."""
    end = await database_now(session) + end_after
    await session.execute(
        update(WebhookSecretRow)
        .where(
            WebhookSecretRow.organization_id == organization_id,
            WebhookSecretRow.endpoint_id == endpoint_id,
            WebhookSecretRow.not_after.is_(None),
        )
        .values(not_after=end)
    )
    return end


async def drop_ending(session: AsyncSession, endpoint_id: str, *, organization_id: OrganizationId) -> int:
    """Delete the endpoint's secrets that have an end; return how many."""
    gone = await session.execute(
        delete(WebhookSecretRow)
        .where(
            WebhookSecretRow.organization_id == organization_id,
            WebhookSecretRow.endpoint_id == endpoint_id,
            WebhookSecretRow.not_after.is_not(None),
        )
        .returning(WebhookSecretRow.id)
    )
    return len(gone.all())


async def open_secret(
    session: AsyncSession, endpoint_id: str, sealer: Sealer, *, organization_id: OrganizationId
) -> bytes:
    """Return the endpoint's present secret. Errors: SealBroken."""
    rows: Sequence[WebhookSecretRow] = (
        await session.scalars(
            select(WebhookSecretRow).where(
                WebhookSecretRow.organization_id == organization_id,
                WebhookSecretRow.endpoint_id == endpoint_id,
                WebhookSecretRow.not_after.is_(None),
            )
        )
    ).all()
    row = rows[0]
    return sealer.open(row.sealed, secret_place(organization_id, row.id))
