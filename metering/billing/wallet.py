"""Prepaid credit, in double entry: every transfer's postings add up to nothing, and nothing is ever changed.

`credit` is what an organization has. A top-up moves money from `payments`, usage moves it to `usage`. What a transfer
is for (*source*) makes it happen once. An organization without a subscription spends its credit under a hard budget,
which grows with each top-up, so that a call is refused before it is spent twice (`keys/quota.lua`).
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId, new_id
from metering.billing.tables import WalletPostingRow, WalletTransferRow

TransferKind = Literal["top_up", "usage", "refund", "adjustment"]
_OTHER_SIDE = {"top_up": "payments", "usage": "usage", "refund": "payments", "adjustment": "adjustments"}


async def transfer(
    session: AsyncSession,
    kind: TransferKind,
    nano_usd: int,
    *,
    source: str,
    organization_id: OrganizationId,
    note: str | None = None,
) -> bool:
    """Add *nano_usd* (below zero: take it) to an organization's credit. False: this *source* did so before."""
    made = await session.scalar(
        insert(WalletTransferRow)
        .values(id=new_id("wtr"), organization_id=organization_id, kind=kind, source=source, note=note)
        .on_conflict_do_nothing(index_elements=[WalletTransferRow.source])
        .returning(WalletTransferRow.id)
    )
    if made is None:
        return False
    sides = (("credit", nano_usd), (_OTHER_SIDE[kind], -nano_usd))
    await session.execute(
        insert(WalletPostingRow).values(
            [
                {"transfer_id": made, "account": account, "organization_id": organization_id, "nano_usd": amount}
                for account, amount in sides
            ]
        )
    )
    return True


async def draw(session: AsyncSession, nano_usd: int, *, source: str, organization_id: OrganizationId) -> bool:
    """Pay usage by credit. As `transfer`."""
    return await transfer(session, "usage", -nano_usd, source=source, organization_id=organization_id)


async def balance(session: AsyncSession, *, organization_id: OrganizationId) -> int:
    """Return an organization's credit in nano-USD, without usage that is not drawn yet."""
    total = await session.scalar(
        select(func.coalesce(func.sum(WalletPostingRow.nano_usd), 0)).where(
            WalletPostingRow.organization_id == organization_id, WalletPostingRow.account == "credit"
        )
    )
    return int(total or 0)
