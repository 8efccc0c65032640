"""Where a test worker's stores are."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

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


def with_database(url: str, name: str) -> str:
    parts = urlsplit(url)
    # urlunsplit drops the empty host of a unix socket's URL unless there is a netloc, which "postgres:@" is.
    return urlunsplit(parts._replace(path=f"/{name}"))


def with_redis_database(url: str, number: int) -> str:
    if url.startswith("unix://"):
        return f"{url}?db={number}"
    return urlunsplit(urlsplit(url)._replace(path=f"/{number}"))
