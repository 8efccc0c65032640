"""What a first start does: bring the schema up to date, and make a first organization, project and key."""

from __future__ import annotations

from typing import Final

import msgspec
from sqlalchemy import text

from core.database import Database
from core.migrations import upgrade
from core.settings import Pepper
from keys.lifecycle import NewKey, create_key
from keys.tenants import create_organization, create_project, list_organizations

_LOCK: Final = 0x66697273


class FirstKey(msgspec.Struct, frozen=True):
    """The key that a first start made. Shown once."""

    secret: str

    def __repr__(self) -> str:
        """Keep the secret out of logs and tracebacks."""
        return "FirstKey()"


async def prepare(database_url: str, pepper: Pepper, *, makes_tenant: bool = True) -> FirstKey | None:
    """Migrate; make the first tenant if there is none. Returns its key, None when there was one already.

    Without *makes_tenant* nobody is made: where the output is kept as a log, a key must not be printed.
    """
    database = Database(database_url, connections_max=1)
    try:
        await upgrade(database)
        async with database.transaction() as session:
            # Several machines may start on one empty database at once.
            await session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
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
