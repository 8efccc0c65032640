"""What `aap wallet` does."""

from __future__ import annotations

from datetime import datetime

import msgspec

from core.clock import SystemClock
from core.ids import OrganizationId
from core.money import NANO_USD_PER_CENT, parse_usd, usd_text
from gateway.cli.common import fail
from gateway.cli.stores import Stores, on_stores
from keys.lookup import require_organization
from metering.billing import prepaid, views
from metering.billing.prepaid import Credit

_SHOWN = 50


class Added(msgspec.Struct, frozen=True):
    """Whether that was new, and what is left."""

    is_new: bool
    available_usd: str


class TransferLine(msgspec.Struct, frozen=True):
    """A movement of credit as it is shown."""

    created_at: datetime
    kind: str
    amount_usd: str
    note: str | None
    id: str


class WalletShown(msgspec.Struct, frozen=True):
    """An organization's credit in US dollars, and its last movements."""

    balance_usd: str
    available_usd: str
    is_prepaid: bool
    transfers: list[TransferLine]


def show(org: str) -> WalletShown:
    """Return an organization's credit."""

    async def act(stores: Stores) -> WalletShown:
        async with stores.database.transaction() as session:
            organization_id = await require_organization(session, organization_id=OrganizationId(org))
            found = await views.wallet_of(session, _SHOWN, SystemClock().now(), organization_id=organization_id)
        return WalletShown(
            usd_text(found.balance_nano_usd),
            usd_text(found.available_nano_usd),
            found.is_prepaid,
            [TransferLine(one.created, one.kind, usd_text(one.nano_usd), one.note, one.id) for one in found.transfers],
        )

    return on_stores(act)


def add(org: str, usd: str, reference: str, note: str | None) -> Added:
    """Add credit once for a reference."""
    try:
        nano_usd = parse_usd(usd)
    except ValueError as error:
        fail(str(error))
    if nano_usd % NANO_USD_PER_CENT or not nano_usd:
        fail("expected whole cents, and not nothing")

    async def act(stores: Stores) -> Added:
        async with stores.database.transaction() as session:
            organization_id = await require_organization(session, organization_id=OrganizationId(org))
            source = f"operator:{organization_id}:{reference}"
            credit = Credit(cents=nano_usd // NANO_USD_PER_CENT, source=source, note=note)
            is_new = await prepaid.add_credit(session, credit, SystemClock().now(), organization_id=organization_id)
            left = await prepaid.left(session, SystemClock().now(), organization_id=organization_id)
        return Added(is_new, usd_text(left))

    return on_stores(act)
