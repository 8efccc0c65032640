"""Outbound HTTP, and the guard that every such request passes: nobody asks our servers for what only they can reach.

A name is looked up once; if any of its addresses is forbidden, nothing is connected, and what is connected is the
address that was looked at (no second lookup for a rebinding name to answer otherwise). Redirects are not followed, and
proxies of the environment are not used: either would go around the guard. Providers are reached by another client,
whose addresses only the operator names (`inference/upstreams/`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import certifi
import httpcore
import httpx

# Beside whatever is not global: `is_global` says yes to some of these (seen on CPython 3.11.7).
_FORBIDDEN: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # The host's own agent in Azure and its metadata in Alibaba's cloud: public addresses by number only.
        *("168.63.129.16/32", "100.100.100.200/32"),
        *("::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32"),
        *("2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
    )
)
_PORTS_ALLOWED: Final = frozenset({443, 8443})


class AddressForbidden(httpcore.ConnectError):
    """The address is one that only our own network reaches, or a port that is none of the web's. Nothing was sent."""


class Origin(NamedTuple):
    """A host and port that the operator named: whatever its address is, it may be reached."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Return the origin of *url*. Errors: ValueError for what is no http or https address with a host."""
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
            raise ValueError("expected an http:// or https:// address without a user in it")
        return cls(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))


def is_forbidden(address: str) -> bool:
    """Tell whether an IP address is not on the public internet, or leads back from there by translation."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return True
    return not parsed.is_global or parsed.is_multicast or any(parsed in network for network in _FORBIDDEN)


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses, and to *trusted* origins wherever they are."""

    def __init__(self, trusted: Iterable[Origin] = ()) -> None:
        self._trusted = frozenset(trusted)
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
        if Origin(host, port) in self._trusted:
            return await self._network.connect_tcp(host, port, timeout, local_address, socket_options)
        if port not in _PORTS_ALLOWED:
            raise AddressForbidden(f"port {port} is not allowed")
        try:
            async with asyncio.timeout(timeout):
                addresses = await _addresses_of(host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout("the name was not resolved in time") from None
        except OSError as error:
            raise httpcore.ConnectError(f"the name was not resolved: {error}") from error
        if not addresses or any(is_forbidden(address) for address in addresses):
            raise AddressForbidden("the address is not a public one")
        return await self._network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """Pause between two tries."""
        await asyncio.sleep(seconds)


async def _addresses_of(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


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
    *, timeout_seconds: float, trusted: Iterable[Origin] = (), connections_max: int = 20
) -> httpx.AsyncClient:
    """Return a client whose every connection passes the guard. *trusted* are origins that the operator named."""
    return httpx.AsyncClient(
        transport=_GuardedTransport(GuardedNetwork(trusted), connections_max),
        timeout=timeout_seconds,
        follow_redirects=False,
        trust_env=False,
    )
