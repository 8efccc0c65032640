"""The connections to one upstream: kept warm, bounded in number, shared out in order."""

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from core.http1.connection import ConnectionCounters, ConnectionOwner, Http1Connection
from core.http1.dial import Route, dial
from core.http1.errors import ConnectFailed, ConnectTimedOut
from core.http1.messages import Origin


class ConnectionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what a client keeps open and in memory."""

    connections_per_origin_max: int = 1_024
    """Open at once to one scheme, host and port, idle ones included. A stream holds its connection until it ends."""
    idle_seconds_max: float = 55.0
    """After this long without a request a connection is closed: just under the 60 s after which AWS's load balancers,
    and many others, close it from their side, so that we seldom write into a connection that is being closed."""
    buffered_bytes_max: int = 262_144
    """Above this much unread body, one connection stops reading. What one read of the socket brings comes on top
    (at most 256 KiB with asyncio and uvloop)."""


class OriginPool:
    """The connections over one route. The last one used is taken first, so that the rest can grow old and close."""

    __slots__ = (
        "_idle",
        "_is_closed",
        "_limits",
        "_loop",
        "_on_empty",
        "_owner",
        "_route",
        "_size",
        "_sweep",
        "_waiters",
        "connections",
        "fixed_lines",
        "target_prefix",
    )

    def __init__(
        self,
        route: Route,
        limits: ConnectionLimits,
        counters: ConnectionCounters,
        on_empty: Callable[["OriginPool"], None],
    ) -> None:
        """*on_empty* is called whenever no connection is left, nor anybody who waits for one."""
        self._on_empty = on_empty
        self._loop = asyncio.get_running_loop()
        self._route = route
        self._limits = limits
        self._owner = ConnectionOwner(
            route.origin.address, limits.buffered_bytes_max, counters, self._put_back, self._forget
        )
        self._idle: list[Http1Connection] = []
        self._waiters: deque[tuple[asyncio.Future[Http1Connection | None], bool]] = deque()
        self._size = 0
        """Places taken: connections, and those being dialled."""
        self._sweep: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.connections: set[Http1Connection] = set()
        self.target_prefix = route.target_prefix
        self.fixed_lines = route.fixed_lines

    @property
    def origin(self) -> Origin:
        """Where they lead."""
        return self._route.origin

    @property
    def origin_address(self) -> str:
        """Host and port, for messages."""
        return self._owner.name

    def take_idle(self, now: float) -> Http1Connection | None:
        """Return the connection used last, or None. *now* is on the loop's clock."""
        idle = self._idle
        if not idle:
            return None
        connection = idle.pop()
        self._owner.counters.connections_idle -= 1
        if now - connection.idle_since < self._limits.idle_seconds_max:
            return connection
        connection.abort()
        for older in tuple(idle):
            older.abort()
        return None

    async def acquire(self, connect_at: float, *, is_fresh: bool) -> Http1Connection:
        """Return a connection: an idle one, a new one, or, at the bound, the next given back, in order of asking.

        *is_fresh* asks for a new one in any case. Waiting and dialling end at *connect_at*, on the loop's clock.
        Errors: ConnectFailed, ConnectTimedOut.
        """
        connection = None if is_fresh else self.take_idle(self._loop.time())
        if connection is None:
            if self._size >= self._limits.connections_per_origin_max and is_fresh and self._idle:
                self._idle[0].abort()
            if self._size < self._limits.connections_per_origin_max and not self._is_closed:
                self._size += 1
            else:
                connection = await self._wait(connect_at, is_fresh=is_fresh)
        return connection or await self._open(connect_at)

    def close(self) -> None:
        """Close every connection and let nobody wait any longer. Those being dialled close when they are there."""
        self._is_closed = True
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        while self._waiters:
            waiter, _ = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(closed_error())
        for connection in tuple(self.connections):
            connection.abort()

    async def _wait(self, connect_at: float, *, is_fresh: bool) -> Http1Connection | None:
        """Queue for a connection, or (None) for the place to dial one."""
        if self._is_closed:
            raise closed_error()
        waiter: asyncio.Future[Http1Connection | None] = self._loop.create_future()
        self._waiters.append((waiter, is_fresh))
        try:
            async with asyncio.timeout_at(connect_at):
                return await waiter
        except TimeoutError:
            self._decline(waiter)
            raise ConnectTimedOut(
                f"All connections to {self.origin_address} were in use for the whole connect deadline.", phase="pool"
            ) from None
        except asyncio.CancelledError:
            self._decline(waiter)
            raise

    def _decline(self, waiter: asyncio.Future[Http1Connection | None]) -> None:
        """Pass on what the waiter got in the very moment it gave up."""
        if not waiter.done() or waiter.cancelled():
            # It leaves the queue when its turn comes; leaving now would cost a search.
            waiter.cancel()
        elif waiter.exception() is None:
            connection = waiter.result()
            if connection is None:
                self._free_place()
            elif not connection.is_closed:
                self._put_back(connection)

    async def _open(self, connect_at: float) -> Http1Connection:
        """Dial on a place already taken; give the place back if that fails."""
        connection = Http1Connection(self._loop, self._owner)
        try:
            async with asyncio.timeout_at(connect_at):
                await dial(self._route, connection)
        except TimeoutError:
            self._free_place()
            raise ConnectTimedOut(
                f"No connection to {self.origin_address} within the connect deadline.", phase="connect"
            ) from None
        except BaseException:
            self._free_place()
            raise
        if connection.is_closed:  # the upstream hung up between the handshake and this line
            self._free_place()
            raise ConnectFailed(f"{self.origin_address} closed the connection at once.", phase="connect")
        self.connections.add(connection)
        connection.count_in()
        if self._is_closed:
            connection.abort()
            raise closed_error()
        return connection

    def _put_back(self, connection: Http1Connection) -> None:
        """Give a connection in a known state to whoever waits longest, or keep it."""
        waiters = self._waiters
        while waiters:
            waiter, is_fresh = waiters.popleft()
            if waiter.done():
                continue
            if is_fresh:
                waiters.appendleft((waiter, is_fresh))
                connection.abort()  # frees its place, which wakes the waiter to dial
            else:
                waiter.set_result(connection)
            return
        now = self._loop.time()
        connection.idle_since = now
        self._idle.append(connection)
        self._owner.counters.connections_idle += 1
        if self._sweep is None and not self._is_closed:
            self._sweep = self._loop.call_at(now + self._limits.idle_seconds_max, self._close_old)

    def _forget(self, connection: Http1Connection) -> None:
        """Take a closed connection out of the books."""
        if connection not in self.connections:
            return  # it failed while it was being dialled; `_open` frees the place
        self.connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
            self._owner.counters.connections_idle -= 1
        self._free_place()

    def _free_place(self) -> None:
        """Let the next in the queue dial, or note that one place is free."""
        while self._waiters:
            waiter, _ = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._size -= 1
        if self._size == 0:
            if self._sweep is not None:
                self._sweep.cancel()
                self._sweep = None
            # Not at once: whoever closes the last one to dial another is about to take its place.
            self._loop.call_soon(self._tell_if_empty)

    def _tell_if_empty(self) -> None:
        if self._size == 0 and not self._waiters:
            self._on_empty(self)

    def _close_old(self) -> None:
        """Close what has been idle too long. One timer serves them all: the oldest is at the front."""
        self._sweep = None
        now = self._loop.time()
        while self._idle and now - self._idle[0].idle_since >= self._limits.idle_seconds_max - 0.001:
            self._idle[0].abort()
        if self._idle:
            self._sweep = self._loop.call_at(self._idle[0].idle_since + self._limits.idle_seconds_max, self._close_old)


def closed_error() -> ConnectFailed:
    """Return the error of a client that was closed."""
    return ConnectFailed("The HTTP client is closed.", phase="closed")
