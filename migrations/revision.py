"""Write a migration from the tables: `python -m migrations.revision what_it_does` (`make revision NAME=…`).

Compares the tables of the code with an embedded database that is at the newest revision.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile

from alembic import command
from sqlalchemy import Connection

from core import embedded
from core.database import Database
from core.migrations import configuration, expected_revision, upgrade
from core.settings import load


async def write(database_url: str, name: str) -> None:
    """Write the file for what differs, numbered after the newest one."""
    database = Database(database_url, connections_max=1)
    try:
        number = f"{int(await upgrade(database)) + 1:04d}"
        await database.run(lambda connection: _revise(connection, name, number))
    finally:
        await database.close()


def _revise(connection: Connection, name: str, number: str) -> None:
    command.revision(configuration(connection), message=name, autogenerate=True, rev_id=number)


def main() -> None:
    """Read the name from the command line."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if not re.fullmatch(r"[a-z][a-z0-9_]{2,60}", name):
        sys.exit(f"usage: make revision NAME=what_it_does   (the newest is {expected_revision()})")
    with tempfile.TemporaryDirectory() as directory:
        settings = load({**os.environ, "AAP_DATA_DIR": directory, "DATABASE_URL": "", "REDIS_URL": ""})
        with embedded.stores(settings) as stores:
            asyncio.run(write(stores.database_url, name))


if __name__ == "__main__":
    main()
