"""Stripe's ids of what is for sale, as the last synchronisation found or made them."""

from __future__ import annotations

from typing import Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from metering.billing import marks

CATALOG_MARK: Final = "catalog"


class SoldAt(msgspec.Struct, frozen=True, kw_only=True):
    """The ids of what is for sale."""

    plans: dict[str, str] = {}
    """A plan's price."""
    usage_price: str | None = None
    meters: dict[str, str] = {}


async def sold_at(session: AsyncSession) -> SoldAt:
    """Return what the last synchronisation came to; nothing before the first."""
    found = await marks.get_mark(session, CATALOG_MARK)
    return SoldAt() if found is None else msgspec.convert(found, SoldAt)


async def meter_ids(session: AsyncSession) -> dict[str, str]:
    """Return Stripe's ids of the meters, by the names of their events."""
    return (await sold_at(session)).meters
