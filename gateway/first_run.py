"""What a first start does: bring the schema up to date, import prices, make a first organization, project and key."""

from __future__ import annotations

from typing import Final

import msgspec
import structlog
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from core.migrations import upgrade
from core.settings import Pepper
from keys.lifecycle import NewKey, create_key
from keys.tenants import create_organization, create_project, list_organizations
from metering.errors import PriceListUnreadable
from metering.price_import import BUILTIN_PRICES, diff, import_prices
from metering.price_list import installed_price_list, read_price_list
from metering.rating import PriceTerms
from metering.tables import PriceRow

_log = structlog.get_logger(__name__)
_LOCK: Final = 0x66697273


class FirstKey(msgspec.Struct, frozen=True):
    """The key that a first start made. Shown once."""

    secret: str

    def __repr__(self) -> str:
        """Keep the secret out of logs and tracebacks."""
        return "FirstKey()"


async def prepare(database_url: str, pepper: Pepper, *, makes_tenant: bool = True) -> FirstKey | None:
    """Migrate; import prices and make the first tenant, where there are none. Returns the tenant's key, or None.

    Without *makes_tenant* nobody is made: where the output is kept as a log, a key must not be printed.
    """
    database = Database(database_url, connections_max=1)
    try:
        await upgrade(database)
        async with database.transaction() as session:
            # Several machines may start on one empty database at once.
            await session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            await _first_prices(session)
            if not makes_tenant or await list_organizations(session):
                return None
            organization = await create_organization(session, "Default organization")
            project = await create_project(session, "Default project", organization_id=organization.id)
            issued = await create_key(
                session,
                NewKey(name="first key"),
                organization_id=organization.id,
                project_id=project.id,
                pepper=pepper,
            )
            return FirstKey(issued.secret)
    finally:
        await database.close()


async def _first_prices(session: AsyncSession) -> None:
    """Import what litellm's package lists if there are no prices yet: the first call is priced.

    Only then. Later lists are the operator's to import, who is charged by them.
    """
    if await session.scalar(select(PriceRow.id).where(PriceRow.plan.is_(None)).limit(1)) is not None:
        return
    listed: dict[str, PriceTerms] = {}
    digest = ""
    try:
        price_list = read_price_list(installed_price_list())
        listed, digest = price_list.prices, price_list.digest
    except PriceListUnreadable as error:
        _log.warning("first_run.without_price_list", reason=error.message)
    changes = await diff(session, {**BUILTIN_PRICES, **listed})
    imported = await import_prices(session, changes, digest)
    _log.info("first_run.prices_imported", prices=imported)
