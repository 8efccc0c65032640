"""What `aap wallet` does."""

from __future__ import annotations

import msgspec

from core.clock import SystemClock
from core.ids import OrganizationId
from core.money import parse_usd, usd_text
from gateway.cli.common import fail
from gateway.cli.stores import Stores, on_stores
from gateway.routes.billing_forms import WalletObject, wallet_object
from keys.lookup import require_organization
from metering.billing import prepaid, views
from metering.billing.prepaid import NANO_USD_PER_CENT, Credit

_SHOWN = 50


class Added(msgspec.Struct, frozen=True):
    """Whether that was new, and what is left."""

    is_new: bool
    available_usd: str


def show(org: str) -> WalletObject:
    """Return an organization's credit."""

    async def act(stores: Stores) -> WalletObject:
        async with stores.database.transaction() as session:
            organization_id = await require_organization(session, organization_id=OrganizationId(org))
            return wallet_object(
                await views.wallet_of(session, _SHOWN, SystemClock().now(), organization_id=organization_id)
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
