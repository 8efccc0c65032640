"""Clients for outbound HTTP, every one behind the guard (`core/egress.py`). Lint forbids any other.

`open_client` is httpx's: for few requests of many kinds. `GuardedClient` is our own HTTP/1.1 (`core/http1`), at a
hundredth of its cost: for many. Neither follows redirects or uses proxies of the environment: both would go around the
guard. Providers that the operator names are reached without it (`inference/upstreams/`).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import certifi
import httpcore
import httpx

from core.egress import EgressPolicy, EgressRefused, Guard
from core.http1.client import Http1Client
from core.http1.connections import ConnectionLimits
from core.http1.dial import SocketAddress
from core.http1.errors import ConnectFailed
from core.http1.messages import Deadlines, UpstreamRequest
from core.http1.response import Http1Response

_DEFAULT_POLICY: Final = EgressPolicy()


class AddressForbidden(httpcore.ConnectError):
    """The address is one that only our own network reaches, or a port that is none of the web's. Nothing was sent."""


class NamedOrigin(NamedTuple):
    """A host and port that the operator named: whatever its address is, it may be reached."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> NamedOrigin:
        """Return the origin of *url*. Errors: ValueError for what is no http or https address with a host."""
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
            raise ValueError("expected an http:// or https:// address without a user in it")
        return cls(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to what the guard lets pass, and to *trusted* origins wherever they are."""

    def __init__(self, trusted: Iterable[NamedOrigin] = (), guard: Guard | None = None) -> None:
        self._trusted = frozenset(trusted)
        self._guard = guard or Guard(lambda: _DEFAULT_POLICY)
        # Without anyio, which httpx brings, httpcore has a stand-in of this name that is no backend.
        self._network = cast("httpcore.AsyncNetworkBackend", httpcore.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to an address of *host* that was looked at. Errors: AddressForbidden; httpcore's own."""
        if NamedOrigin(host, port) in self._trusted:
            return await self._network.connect_tcp(host, port, timeout, local_address, socket_options)
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._guard.addresses(host, port)
        except EgressRefused as error:
            raise AddressForbidden(str(error)) from error
        except TimeoutError:
            raise httpcore.ConnectTimeout("the name was not resolved in time") from None
        except OSError as error:
            raise httpcore.ConnectError(f"the name was not resolved: {error}") from error
        return await self._network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """Pause between two tries."""
        await asyncio.sleep(seconds)


class _GuardedTransport(httpx.AsyncHTTPTransport):
    """httpx's own transport, over a pool that connects through the guard: so do its retries and its reconnects."""

    def __init__(self, network: GuardedNetwork, connections_max: int) -> None:
        context = ssl.create_default_context(cafile=certifi.where())
        super().__init__(verify=context)
        # httpx offers no other way to give it a network backend. `tests/core/test_http.py` fails if the name changes.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=connections_max,
            max_keepalive_connections=connections_max,
            keepalive_expiry=30.0,
            network_backend=network,
        )


def open_client(
    *, timeout_seconds: float, trusted: Iterable[NamedOrigin] = (), connections_max: int = 20
) -> httpx.AsyncClient:
    """Return a client whose every connection passes the guard. *trusted* are origins that the operator named."""
    return httpx.AsyncClient(
        transport=_GuardedTransport(GuardedNetwork(trusted), connections_max),
        timeout=timeout_seconds,
        follow_redirects=False,
        trust_env=False,
    )


class GuardedClient:
    """Our own HTTP/1.1 client behind the guard. A policy that changes holds for the next request on."""

    def __init__(
        self, guard: Guard, limits: ConnectionLimits, *, make_tls: Callable[[], ssl.SSLContext] | None = None
    ) -> None:
        """*make_tls* returns the context of https; by default one with certifi's roots."""
        self._guard = guard
        self._limits = limits
        self._make_tls = make_tls
        self._policy = guard.policy()
        self._client = self._open()
        self._old: set[asyncio.Task[None]] = set()

    async def send(self, request: UpstreamRequest, deadlines: Deadlines) -> Http1Response:
        """Send *request*; return when the answer's head is there. Redirects are answers like any other.

        Errors: UpstreamError; of ConnectFailed, the phase "refused" is the guard's, in words that may be shown.
        """
        policy = self._guard.policy()
        if policy != self._policy:
            # What is connected was looked at under the old policy: none of it carries a request any more.
            self._policy = policy
            self._retire(self._client, deadlines.total_seconds)
            self._client = self._open()
        return await self._client.send(request, deadlines)

    async def close(self) -> None:
        """Close every connection."""
        for task in self._old:
            task.cancel()
        await self._client.close()

    def _open(self) -> Http1Client:
        tls = self._make_tls() if self._make_tls is not None else None
        return Http1Client(limits=self._limits, tls=tls, resolve=self._resolve)

    def _retire(self, client: Http1Client, running_seconds: float) -> None:
        """Close *client* once what it has begun has ended, or had the time to."""

        async def close_later() -> None:
            try:
                await asyncio.sleep(running_seconds)
            finally:
                await client.close()

        task = asyncio.create_task(close_later())
        self._old.add(task)
        task.add_done_callback(self._old.discard)

    async def _resolve(self, host: str, port: int) -> list[SocketAddress]:
        try:
            addresses = await self._guard.addresses(host, port)
        except EgressRefused as error:
            raise ConnectFailed(str(error), phase="refused") from error
        except OSError as error:
            raise ConnectFailed(f"{host} cannot be found in the DNS.", phase="dns") from error
        return [
            (socket.AF_INET6, (address, port, 0, 0)) if ":" in address else (socket.AF_INET, (address, port))
            for address in addresses
        ]
