"""Our own HTTP/1.1 client for calls to upstreams: asyncio Protocols and httptools, a keep-alive pool per origin.

It exists because a request through a general client costs more CPU than all the rest of the gateway
(`docs/performance.md`). It speaks HTTP/1.1 only, follows no redirect, decodes no body, keeps no cookie.

    client = Http1Client(limits=ConnectionLimits(), proxies=ProxySettings.from_environ(os.environ))
    response = await client.send(UpstreamRequest(...), deadlines)     # the head is there
    while piece := await response.read(): ...                         # b"" is the clean end
    await client.close()

What may be raised, from `send` and from the response's reads (drawn in full in `errors.py`):

    UpstreamError
    ├── ConnectFailed, ConnectTimedOut                    the upstream saw nothing: another may be asked
    ├── FirstByteTimedOut, IdleTimedOut, TotalTimedOut    it may have worked
    ├── ConnectionLost, ProtocolViolated                  it answered badly or not to the end
    └── BodyTooLarge                                      from `read_all` only
"""

import asyncio
import ssl

import certifi

from core.http1.connection import ConnectionCounters, Exchange, Http1Connection
from core.http1.connections import ConnectionLimits, OriginPool, closed_error
from core.http1.dial import Resolver, Route
from core.http1.errors import (
    ConnectionLost,
    ConnectTimedOut,
    TotalTimedOut,
)
from core.http1.messages import Deadlines, Origin, UpstreamRequest, encode_head
from core.http1.proxies import ProxySettings
from core.http1.response import Http1Response


class Http1Client:
    """Sends requests to any number of origins. It belongs to one event loop: the one that first sends."""

    __slots__ = ("_counters", "_is_closed", "_limits", "_pools", "_proxies", "_resolve", "_tls")

    def __init__(
        self,
        *,
        limits: ConnectionLimits,
        tls: ssl.SSLContext | None = None,
        proxies: ProxySettings | None = None,
        resolve: Resolver | None = None,
    ) -> None:
        """*tls* replaces the default context (certifi's roots, hostname check); its ALPN is set to http/1.1 here.

        *resolve* replaces the system's lookup. Through a proxy it sees the proxy's name, not the origin's.
        """
        self._resolve = resolve
        self._limits = limits
        self._proxies = proxies or ProxySettings()
        self._tls = tls or ssl.create_default_context(cafile=certifi.where())
        self._tls.set_alpn_protocols(["http/1.1"])
        self._counters = ConnectionCounters()
        self._pools: dict[Origin, OriginPool] = {}
        self._is_closed = False

    @property
    def connections_open(self) -> int:
        """Sockets open now, idle or busy."""
        return self._counters.connections_open

    @property
    def connections_idle(self) -> int:
        """Connections waiting in the pools."""
        return self._counters.connections_idle

    @property
    def requests_reused(self) -> int:
        """Requests that went out on a connection used before, since the start."""
        return self._counters.requests_reused

    @property
    def requests_retried_stale(self) -> int:
        """Requests sent a second time because the reused connection turned out closed, since the start."""
        return self._counters.requests_retried_stale

    async def send(
        self, request: UpstreamRequest, deadlines: Deadlines, permit: asyncio.Future[None] | None = None
    ) -> Http1Response:
        """Send *request* and return when the response head is there; the body may still be arriving.

        Not one byte of it is sent before *permit* is done; a connection that must be made is made meanwhile.
        A request on a reused connection that ends before any byte of the response is sent once more, on a fresh one.
        For a POST that starts paid work this is acceptable: the upstream's close of an idle connection crossed our
        write, so it never read the request. An upstream that had begun to work would answer; one that fails does so
        with a byte of an answer, on a fresh connection, or by silence, and none of these is retried here.
        Cancellation closes the connection.
        Errors: every `UpstreamError` but IdleTimedOut and BodyTooLarge; ValueError for a request that breaks its lines;
        what *permit* fails with.
        """
        loop = asyncio.get_running_loop()
        pool = self._pools.get(request.origin) or self._open_pool(request.origin)
        head = encode_head(request, pool.target_prefix, pool.fixed_lines)
        now = loop.time()
        total_at = now + deadlines.total_seconds
        connection = pool.take_idle(now)
        if connection is None:
            connection = await acquire(pool, now + deadlines.connect_seconds, total_at, is_fresh=False)
        is_reused = connection.exchanges_count > 0
        is_head_only = request.method == b"HEAD"
        self._counters.requests_reused += is_reused
        while True:
            exchange = Exchange(head, request.body, is_head_only, deadlines, total_at)
            waiter = connection.start(exchange, permit)
            try:
                return await waiter
            except ConnectionLost as lost:
                if lost.response_started or not is_reused:
                    raise
            except asyncio.CancelledError:
                connection.withdraw(waiter)
                raise
            self._counters.requests_retried_stale += 1
            is_reused = False
            connect_at = loop.time() + deadlines.connect_seconds
            # The pool may have been empty, and forgotten, meanwhile.
            pool = self._pools.get(request.origin) or self._open_pool(request.origin)
            connection = await acquire(pool, connect_at, total_at, is_fresh=True)

    async def close(self) -> None:
        """Close all connections, busy ones too, and return when the sockets are closed. Idempotent."""
        self._is_closed = True
        for pool in tuple(self._pools.values()):
            pool.close()
        await self._counters.wait_until_all_closed()

    def _open_pool(self, origin: Origin) -> OriginPool:
        if self._is_closed:
            raise closed_error()
        tls = self._tls if origin.scheme == "https" else None
        route = Route(origin, self._proxies.proxy_for(origin), tls, self._resolve)
        pool = self._pools[origin] = OriginPool(route, self._limits, self._counters, self._forget)
        return pool

    def _forget(self, pool: OriginPool) -> None:
        """Let go of an origin that nothing is connected to: there may be any number of them in time."""
        if self._pools.get(pool.origin) is pool:
            del self._pools[pool.origin]


async def acquire(pool: OriginPool, connect_at: float, total_at: float, *, is_fresh: bool) -> Http1Connection:
    """Return a connection within both deadlines. Errors: ConnectFailed, ConnectTimedOut, TotalTimedOut."""
    try:
        return await pool.acquire(min(connect_at, total_at), is_fresh=is_fresh)
    except ConnectTimedOut:
        if total_at > connect_at:
            raise
        raise TotalTimedOut(f"No connection to {pool.origin_address} within the total deadline.") from None
