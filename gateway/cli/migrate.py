"""What `aap migrate` does."""

from __future__ import annotations

import asyncio

from core import embedded
from core.database import DOWN, Database
from core.embedded import EmbeddedUnavailable
from core.migrations import upgrade
from gateway.cli.common import fail
from gateway.cli.stores import read_settings


def migrate() -> str:
    """Bring the schema up to date; return its revision."""
    try:
        with embedded.stores(read_settings()) as stores:
            return asyncio.run(_upgraded(stores.database_url))
    except (EmbeddedUnavailable, *DOWN) as error:
        fail(f"the schema could not be brought up to date: {error}")


async def _upgraded(url: str) -> str:
    database = Database(url, connections_max=1)
    try:
        return await upgrade(database)
    finally:
        await database.close()
