"""Where a call comes from. `X-Forwarded-For` counts only behind proxies that the operator named."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from core.settings import Network


def client_address(peer: str, headers: Iterable[tuple[bytes, bytes]], trusted: tuple[Network, ...]) -> str:
    """Return the address of the nearest hop that is not a trusted proxy; "" where the *peer* has none.

    Read from the right: each trusted proxy vouches for the hop before it, and nothing else in the header is believed.
    """
    address = plain_address(peer)
    if not trusted or not _is_in(address, trusted):
        return address
    hops: list[str] = []
    for name, value in headers:
        if name == b"x-forwarded-for":
            hops += [plain_address(hop.strip()) for hop in value.decode("latin-1").split(",")]
    for hop in reversed(hops):
        address = hop
        if not _is_in(hop, trusted):
            break
    return address


def plain_address(address: str) -> str:
    """Return an address without the port that some proxies add, and IPv4 written as IPv6 as itself.

    `::ffff:192.0.2.1` is what a socket on `::` reports of an IPv4 caller.
    """
    if address.startswith("["):
        address = address[1:].partition("]")[0]
    elif address.count(":") == 1:
        address = address.partition(":")[0]
    if not address.lower().startswith("::ffff:"):
        return address
    try:
        mapped = ipaddress.IPv6Address(address).ipv4_mapped
    except ValueError:
        return address
    return str(mapped) if mapped else address


def _is_in(address: str, networks: tuple[Network, ...]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)
