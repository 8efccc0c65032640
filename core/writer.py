"""One connection to PostgreSQL for statements of the hot path, and the rows of many calls in one commit.

Raw asyncpg: a session of SQLAlchemy costs more than the statement. What is not on the hot path uses `core.database`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Generic, TypeVar, cast

import asyncpg
import structlog

from core.database import DOWN, driver_url

_T = TypeVar("_T")
_CONNECT_SECONDS_MAX: Final = 2.0
_RETRY_SECONDS: Final = (0.05, 0.1, 0.25, 0.5)
_log = structlog.get_logger(__name__)


class Writer:
    """A connection that is made when it is needed, and made anew after any failure. One statement at a time."""

    def __init__(self, url: str, *, statement_seconds_max: float, planning: Mapping[str, str] | None = None) -> None:
        """*planning* holds PostgreSQL's settings for the connection."""
        self._url = driver_url(url)
        # A statement that waits for a lock does not notice that we are gone: the server ends it, a little after us.
        timeout_ms = str(int((statement_seconds_max + 1) * 1000))
        self._settings = {"application_name": "aap-ledger", "statement_timeout": timeout_ms, **(planning or {})}
        self._statement_seconds_max = statement_seconds_max
        self._connection: Any = None
        self._turn = asyncio.Lock()

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        """Run *statement*; return its rows. Errors: those of `core.database.DOWN`; the outcome is then unknown."""
        async with self._turn:
            connection = await self._connected()
            try:
                return await connection.fetch(statement, *arguments, timeout=self._statement_seconds_max)
            except BaseException as error:
                is_useless = isinstance(error, asyncpg.ReadOnlySQLTransactionError) or connection.is_closed()
                if is_useless or not isinstance(error, asyncpg.PostgresError):
                    # Silent, broken, cancelled half-way, or to a server that became a replica: what it still does, it
                    # does without us. Looking the server up again may find the new primary.
                    self._drop()
                raise

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            with contextlib.suppress(*DOWN):
                await self._connection.close(timeout=1)
            self._connection = None

    async def _connected(self) -> Any:
        if self._connection is None or self._connection.is_closed():
            self._connection = await cast("Any", asyncpg).connect(
                self._url, timeout=_CONNECT_SECONDS_MAX, server_settings=self._settings
            )
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


class GroupCommit(Generic[_T]):
    """Collects items and writes them in batches, in order, until each is written.

    The first item after a pause is written at once. While a batch is on its way the next one gathers, and
    *pause_seconds* pass from one batch's start to the next's, unless the last had *few_rows* or less. *write* may be
    given the same items again, and with others; whatever it raises, another try is made.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[list[_T]], Awaitable[None]],
        *,
        pause_seconds: float,
        rows_max: int,
        few_rows: int = 0,
    ) -> None:
        self._name = name
        self._write = write
        self._pause_seconds = pause_seconds
        self._rows_max = rows_max
        self._few_rows = few_rows
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_T] = deque()
        self._batch: list[_T] = []
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self.failures = 0

    def __len__(self) -> int:
        """How many items are not written yet."""
        return len(self._waiting) + len(self._batch)

    def start(self) -> None:
        """Start writing."""
        self._task = self._loop.create_task(self._run())

    async def close(self, timeout_seconds: float) -> int:
        """Write what is left, for as long as *timeout_seconds*; return how many items could not be written."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        return len(self)

    def add(self, item: _T) -> None:
        """Write *item* with the next batch."""
        self._waiting.append(item)
        if not self._wake.is_set():
            self._wake.set()
            self._idle.clear()

    @property
    def oldest(self) -> _T | None:
        """What has waited longest; None when everything is written."""
        return self._batch[0] if self._batch else self._waiting[0] if self._waiting else None

    def items(self) -> list[_T]:
        """Return what is not written yet, oldest first."""
        return [*self._batch, *self._waiting]

    async def _run(self) -> None:
        started_at, rows = 0.0, 0
        while True:
            await self._wake.wait()
            if rows > self._few_rows:
                await asyncio.sleep(started_at + self._pause_seconds - self._loop.time())
            started_at = self._loop.time()
            rows = min(len(self._waiting), self._rows_max)
            self._batch = [self._waiting.popleft() for _ in range(rows)]
            await self._write_until_done()
            self._batch = []
            if not self._waiting:
                self._wake.clear()
                self._idle.set()

    async def _write_until_done(self) -> None:
        attempt = 0
        while True:
            try:
                await self._write(self._batch)
            except Exception as error:  # noqa: BLE001 - whatever it is: these rows are money, and nobody else has them
                self.failures += 1
                if attempt == 0:
                    _log.warning(
                        "group_commit.failing",
                        batch=self._name,
                        error=type(error).__name__,
                        exc_info=None if isinstance(error, DOWN) else error,
                    )
                await asyncio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
                attempt += 1
            else:
                return
