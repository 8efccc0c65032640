"""Where a test worker's stores are."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from core.settings import Pepper


class TestStores(NamedTuple):
    __test__ = False

    database_url: str
    redis_url: str
    pepper: Pepper

    def environ(self) -> dict[str, str]:
        """The variables of a process that uses them."""
        return {
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "AAP_KEY_PEPPERS": f"{self.pepper.id}:{self.pepper.key.hex()}",
        }


@asynccontextmanager
async def new_database(server_url: str, name: str, template: str | None = None) -> AsyncGenerator[str]:
    """The URL of a database that lives as long as this: empty, or a copy of *template*, which nobody is connected to."""
    connection = await asyncpg.connect(server_url)
    try:
        await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        await connection.execute(f'CREATE DATABASE "{name}"' + (f' TEMPLATE "{template}"' if template else ""))
        yield with_database(server_url, name)
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()


def with_database(url: str, name: str) -> str:
    parts = urlsplit(url)
    # urlunsplit drops the empty host of a unix socket's URL unless there is a netloc, which "postgres:@" is.
    return urlunsplit(parts._replace(path=f"/{name}"))


def with_redis_database(url: str, number: int) -> str:
    if url.startswith("unix://"):
        return f"{url}?db={number}"
    return urlunsplit(urlsplit(url)._replace(path=f"/{number}"))
