"""Where requests of ours may go: a policy, and the guard that looks at every address before anything is connected.

Nobody may have our servers ask for what only they can reach. A name is looked up once for each connection; if any of
its addresses is refused, nothing is connected, and what is connected is an address that was looked at: no second lookup
for a rebinding name to answer otherwise. Refusals are in words that may be shown to whoever typed the address.

The DNS down or slow: a lookup fails, or runs into the caller's deadline; lookups run in threads of their own, and those
of one name share a thread, so that one name server that says nothing holds up nobody else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import re
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Final, Literal, NamedTuple
from urllib.parse import SplitResult, urlsplit

import msgspec

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a name, as text. Errors: OSError."""

# Beside whatever is not global: `is_global` says yes to some of these (seen on CPython 3.11.7).
_SPECIAL: Final = tuple(
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
# RFC 6761, RFC 8375, RFC 9476 and ICANN's `.internal`: names that lead nowhere on the public internet.
_LOCAL_SUFFIXES: Final = ("localhost", "local", "internal", "invalid", "onion", "alt", "home.arpa", "localdomain")
_URL_CHARACTERS_MAX: Final = 2_000
_CONTROL_OR_SPACE: Final = re.compile(r"[\x00-\x20\x7f-\xa0\\]")
_HOST_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER: Final = re.compile(r"0x[0-9a-f]*|[0-9]+")
_TARGET: Final = re.compile(r"/[\x21-\x22\x24-\x7e]*")
_LOOKUP_THREADS: Final = 256


class EgressRefused(Exception):
    """What is asked for is not to be reached; the message says why, and may be shown. Nothing was sent."""


class EgressPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be reached beside, or instead of, the public internet by https: `[egress]` in aap.toml."""

    allow: tuple[str, ...] = ()
    """Networks of the operator's own that may be reached, such as 10.1.0.0/16."""
    forbid: tuple[str, ...] = ()
    """Networks that may not. They win over *allow*."""
    ports: tuple[int, ...] | Literal["any"] = (443, 8443)
    plain_http: bool = False
    """Whether http:// is taken as well, then also on port 80."""

    def __post_init__(self) -> None:
        """Errors: ValueError for a malformed network or a port that is none."""
        for text in (*self.allow, *self.forbid):
            ipaddress.ip_network(text)
        if self.ports != "any" and not all(0 < port < 65_536 for port in self.ports):
            raise ValueError("a port is a number from 1 to 65535")

    def takes_port(self, port: int) -> bool:
        """Tell whether *port* may be connected to."""
        return self.ports == "any" or port in self.ports or (self.plain_http and port == 80)

    def takes(self, address: Address) -> bool:
        """Tell whether *address* may be connected to."""
        if _is_in(address, _networks(self.forbid)):
            return False
        return not _is_special(address) or _is_in(address, _networks(self.allow))


class Destination(NamedTuple):
    """An address that passed: what a client needs of it. *host* is lower-case ASCII, IPv6 without brackets."""

    scheme: Literal["http", "https"]
    host: str
    port: int
    target: str


def check_url(url: str, policy: EgressPolicy) -> Destination:
    """Return the parts of *url* if it is one that may be asked for, as far as its spelling tells.

    What a name's addresses are is looked at when it is connected to (`Guard`). Errors: EgressRefused.
    """
    parts, port = _split(url)
    if parts.scheme not in {"https", "http"}:
        raise EgressRefused("The address must begin with https://.")
    if parts.scheme == "http" and not policy.plain_http:
        raise EgressRefused("The address must begin with https://: what is sent in the clear can be read on its way.")
    scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
    port = port or (443 if scheme == "https" else 80)
    if not policy.takes_port(port):
        raise EgressRefused(f"Port {port} is not allowed.")
    host = _checked_host(parts.hostname or "", policy, is_bracketed="[" in parts.netloc)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not _TARGET.fullmatch(target):
        raise EgressRefused("The address's path or query holds what is not ASCII: percent-encode it.")
    return Destination(scheme, host, port, target)


def _split(url: str) -> tuple[SplitResult, int | None]:
    """Return the parts of *url*, and its port, of an address that different programs read alike."""
    if len(url) > _URL_CHARACTERS_MAX:
        raise EgressRefused(f"The address is longer than {_URL_CHARACTERS_MAX} characters.")
    if _CONTROL_OR_SPACE.search(url):
        raise EgressRefused("The address holds a space, a control character or a backslash.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise EgressRefused("The address's host or port is not valid.") from None
    if "@" in parts.netloc:
        raise EgressRefused("The address holds a user name or password. Credentials go into a header of their own.")
    if "#" in url:
        raise EgressRefused("The address holds a fragment (#), which no server is sent.")
    if parts.scheme in {"http", "https"} and (port == 0 or parts.netloc.endswith(":") or not parts.hostname):
        raise EgressRefused("The address's host or port is not valid.")
    return parts, port


def _checked_host(host: str, policy: EgressPolicy, *, is_bracketed: bool) -> str:
    if is_bracketed:
        return str(_checked_literal(host, policy))
    try:
        name = host.lower() if host.isascii() else host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise EgressRefused("The address's host name is not valid.") from None
    if name.endswith("."):
        raise EgressRefused("The address's host name ends with a dot: leave it out.")
    if len(name) > 253 or not _HOST_NAME.fullmatch(name):
        raise EgressRefused("The address's host name is not valid.")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        # As browsers have it (WHATWG URL): a last part that is a number makes it an IPv4 address, in any spelling.
        return str(_checked_literal(name, policy))
    if not policy.allow and ("." not in name or name.endswith(tuple(f".{suffix}" for suffix in _LOCAL_SUFFIXES))):
        raise EgressRefused(f"{name} is not a name on the public internet.")
    return name


def _checked_literal(text: str, policy: EgressPolicy) -> Address:
    if "%" in text:
        raise EgressRefused("The IPv6 address names a zone, which means nothing to another machine.")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise EgressRefused("The IP address is not valid, or oddly spelled: write it like 192.0.2.1.") from None
    _require(address, policy)
    return address


def _require(address: Address, policy: EgressPolicy) -> None:
    if not policy.takes(address):
        raise EgressRefused(f"{address} is not a public address.")


def is_special(address: str) -> bool:
    """Tell whether an IP address is not on the public internet, or leads back from there by translation."""
    try:
        return _is_special(ipaddress.ip_address(address.partition("%")[0]))
    except ValueError:
        return True


def _is_special(address: Address) -> bool:
    return not address.is_global or address.is_multicast or _is_in(address, _SPECIAL)


def _is_in(address: Address, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks)


@lru_cache(maxsize=64)
def _networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


class Guard:
    """Looks at the addresses of a host under the policy of the moment."""

    def __init__(self, policy: Callable[[], EgressPolicy], resolve: Resolve | None = None) -> None:
        """*resolve* stands in for the system's lookup."""
        self.policy = policy
        self._resolve = resolve or system_lookup
        self._lookups: dict[tuple[str, int], asyncio.Task[list[str]]] = {}

    async def addresses(self, host: str, port: int) -> list[str]:
        """Return the addresses of *host*, all of which may be connected to; families take turns (RFC 8305, section 4).

        Errors: EgressRefused; OSError for a name that is not found.
        """
        policy = self.policy()
        if not policy.takes_port(port):
            raise EgressRefused(f"Port {port} is not allowed.")
        try:
            found = [str(ipaddress.ip_address(host))]
        except ValueError:
            found = await self._shared_lookup(host, port)
        for text in found:
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                # With a zone: an address of the link.
                raise EgressRefused(f"{host} leads to an address that is not a public one.") from None
            if not policy.takes(address):
                raise EgressRefused(f"{host} leads to {address}, which is not a public address.")
        if not found:
            raise OSError(f"{host} has no address")
        return _taking_turns(found)

    async def _shared_lookup(self, host: str, port: int) -> list[str]:
        lookup = self._lookups.get((host, port))
        if lookup is None:
            lookup = self._lookups[host, port] = asyncio.ensure_future(self._resolve(host, port))
            lookup.add_done_callback(lambda _: self._lookups.pop((host, port), None))
        # Whoever gives up waiting must not end it for the others.
        return await asyncio.shield(lookup)


def _taking_turns(addresses: list[str]) -> list[str]:
    is_first_v6 = ":" in addresses[0]
    first = [address for address in addresses if (":" in address) is is_first_v6]
    second = [address for address in addresses if (":" in address) is not is_first_v6]
    return [one for pair in itertools.zip_longest(first, second) for one in pair if one is not None]


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    # The loop's own are few (uvloop: four), and shared with everything else: a few dead name servers would take all.
    return ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="dns")


async def system_lookup(host: str, port: int) -> list[str]:
    """Return the addresses of *host* by the system's resolver, in its order. Errors: OSError."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.run_in_executor(_threads(), _getaddrinfo, host, port)
    except UnicodeError as error:
        raise OSError(f"{host} is no name") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _getaddrinfo(host: str, port: int) -> list[tuple[int, int, int, str, tuple[str, int] | tuple[int, bytes]]]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]
