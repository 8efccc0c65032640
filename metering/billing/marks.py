"""What a worker remembers about Stripe from one round to the next."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from metering.billing.tables import StripeMarkRow


async def get_mark(session: AsyncSession, name: str) -> dict[str, Any] | None:
    """Return what was remembered under *name*."""
    return await session.scalar(select(StripeMarkRow.value).where(StripeMarkRow.name == name))


async def set_mark(session: AsyncSession, name: str, value: dict[str, Any]) -> None:
    """Remember *value* under *name*, in the place of what was there."""
    await session.execute(
        insert(StripeMarkRow)
        .values(name=name, value=value)
        .on_conflict_do_update(
            index_elements=[StripeMarkRow.name], set_={"value": value, "marked_at": func.clock_timestamp()}
        )
    )


async def moment(session: AsyncSession, name: str) -> datetime | None:
    """Return the time that was remembered under *name*."""
    value = await get_mark(session, name)
    return None if value is None else datetime.fromisoformat(value["at"])


async def set_moment(session: AsyncSession, name: str, at: datetime) -> None:
    """Remember a time under *name*."""
    await set_mark(session, name, {"at": at.isoformat()})


async def take_turn(session: AsyncSession, name: str, now: datetime, every: timedelta) -> bool:
    """Tell whether it is time for *name* again; of all who ask, one is told so."""
    at = {"at": now.isoformat()}
    taken = await session.scalar(
        insert(StripeMarkRow)
        .values(name=name, value=at, marked_at=now)
        .on_conflict_do_update(
            index_elements=[StripeMarkRow.name],
            set_={"value": at, "marked_at": now},
            # One that was taken by a clock that is fast is not waited for.
            where=or_(StripeMarkRow.marked_at <= now - every, StripeMarkRow.marked_at > now + every),
        )
        .returning(StripeMarkRow.name)
    )
    return taken is not None
