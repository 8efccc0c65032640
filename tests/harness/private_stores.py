"""A Redis and a PostgreSQL of a test's own: to be stopped, killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from core.database import Database
from core.embedded import _PostgresServer, _RedisServer
from core.migrations import upgrade
from core.settings import Pepper
from tests.harness.eventually import eventually
from tests.harness.stores import TestStores


class PrivateRedis:
    """A Redis server that one test may hurt."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server = _RedisServer(directory)
        self.url = ""

    async def start(self) -> str:
        self.url = await asyncio.to_thread(self._server.start)
        return self.url

    @property
    def pid(self) -> int:
        return int((self._directory / "redis.pid").read_text())

    async def kill(self) -> None:
        """End it at once, nothing written out."""
        process = self._server._process
        assert process is not None
        process.kill()
        await asyncio.to_thread(process.wait)

    def freeze(self) -> None:
        """Let it hold its connections and answer nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, OSError, AssertionError):
            self.thaw()
            await self.kill()


class PrivatePostgres:
    """A PostgreSQL server that one test may hurt."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server = _PostgresServer(directory)
        self.url = ""

    async def start(self) -> str:
        self.url = await asyncio.to_thread(self._server.start)
        return self.url

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.stop)

    async def stop_immediately(self) -> None:
        """End it as a power cut would: nothing is written out, and the next start recovers (`immediate` mode)."""
        pid = self.pid
        os.kill(pid, signal.SIGQUIT)
        await eventually(lambda: not Path(f"/proc/{pid}").exists() or not self._server.is_running(), 10)

    @property
    def pid(self) -> int:
        return int((self._directory / "postmaster.pid").read_text().split()[0])

    @property
    def pids(self) -> list[int]:
        """The server's process and its children."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    def crash(self) -> None:
        """Kill a child at once: the server then ends every connection, recovers, and lets nobody in meanwhile."""
        os.kill(self.pids[1], signal.SIGKILL)

    def freeze(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def private_redis(directory: Path) -> AsyncIterator[PrivateRedis]:
    redis = PrivateRedis(directory / "r")
    await redis.start()
    try:
        yield redis
    finally:
        await redis.close()


@contextlib.asynccontextmanager
async def private_postgres(
    directory: Path, redis_url: str, pepper: Pepper
) -> AsyncIterator[tuple[PrivatePostgres, TestStores]]:
    """A migrated PostgreSQL of its own beside the Redis at *redis_url*."""
    postgres = PrivatePostgres(directory / "p")
    url = await postgres.start()
    try:
        database = Database(url, connections_max=1)
        await upgrade(database)
        await database.close()
        yield postgres, TestStores(url, redis_url, pepper)
    finally:
        await postgres.stop()
