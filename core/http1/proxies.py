"""Which proxy, if any, stands between us and an upstream."""

import base64
import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

import msgspec

from core.http1.messages import CONTROL_OR_SPACE, Origin, parse_host

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
DEFAULT_PROXY_PORT = 80


class ProxyInvalid(ValueError):
    """A proxy variable that cannot be used; the text names it, without its value."""


class Proxy(msgspec.Struct, frozen=True):
    """An HTTP proxy, spoken to in plain TCP. Its credentials do not show in `repr`."""

    host: str
    port: int
    authorization: bytes | None = None
    """The value of Proxy-Authorization."""

    def __repr__(self) -> str:
        return f"Proxy({self.host!r}, {self.port})"


class ProxyExemption(msgspec.Struct, frozen=True):
    """One entry of NO_PROXY: a name with its subdomains, or a network; perhaps for one port only."""

    suffix: str = ""
    network: Network | None = None
    port: int | None = None

    def covers(self, origin: Origin, address: Address | None) -> bool:
        """Tell whether *origin* is reached directly; *address* is its host where that is a literal."""
        if self.port is not None and self.port != origin.port:
            return False
        if self.network is not None:
            return address is not None and address in self.network
        host = origin.host.rstrip(".")
        return address is None and (host == self.suffix or host.endswith("." + self.suffix))


class ProxySettings(msgspec.Struct, frozen=True):
    """The proxies to use, one per scheme of the upstream, and the upstreams reached without."""

    http: Proxy | None = None
    https: Proxy | None = None
    exemptions: tuple[ProxyExemption, ...] = ()
    is_off: bool = False
    """NO_PROXY=*"""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "ProxySettings":
        """Read HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY; the lower-case spelling wins, as in curl.

        NO_PROXY holds names (each with its subdomains, with or without a leading "." or "*."), addresses, networks in
        CIDR notation, each perhaps with ":port", separated by commas or spaces; "*" turns proxies off.
        Errors: ProxyInvalid naming the variable, without its value.
        """

        def read(name: str) -> str:
            return (environ.get(name.lower()) or environ.get(name) or "").strip()

        def proxy_of(name: str) -> Proxy | None:
            return parse_proxy(name, read(name)) if read(name) else None

        try:
            fallback = proxy_of("ALL_PROXY")
            entries = [entry for entry in re.split(r"[\s,]+", read("NO_PROXY")) if entry]
            return cls(
                http=proxy_of("HTTP_PROXY") or fallback,
                https=proxy_of("HTTPS_PROXY") or fallback,
                exemptions=tuple(parse_exemption(entry) for entry in entries if entry != "*"),
                is_off="*" in entries,
            )
        except ValueError as error:
            raise ProxyInvalid(str(error)) from None

    def proxy_for(self, origin: Origin) -> Proxy | None:
        """Return the proxy to reach *origin* by, or None for a direct connection."""
        proxy = self.https if origin.scheme == "https" else self.http
        if proxy is None or self.is_off:
            return None
        address = as_address(origin.host)
        return None if any(exemption.covers(origin, address) for exemption in self.exemptions) else proxy


def parse_proxy(variable: str, url: str) -> Proxy:
    """Return the proxy behind *url*; without a scheme it is http. Errors: ValueError, naming *variable* only."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{variable} is not a valid URL.") from None
    if parts.scheme != "http":
        raise ValueError(f"{variable} names a proxy other than http://; TLS to the proxy and SOCKS are not supported.")
    if not host or CONTROL_OR_SPACE.search(url) or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"{variable} is not of the form http://[user:password@]host[:port].")
    authorization = None
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = b"Basic " + base64.b64encode(credentials.encode())
    try:
        return Proxy(parse_host(host), port or DEFAULT_PROXY_PORT, authorization)
    except ValueError:
        raise ValueError(f"{variable} names a host that is not valid.") from None


def parse_exemption(entry: str) -> ProxyExemption:
    """Return one entry of NO_PROXY. Errors: ValueError."""
    network = as_network(entry)
    if network is not None:
        return ProxyExemption(network=network)
    host, _, port = entry.rpartition(":") if ":" in entry and not entry.endswith("]") else (entry, "", "")
    if port and not port.isdecimal():
        raise ValueError("NO_PROXY has an entry whose port is not a number.")
    network = as_network(host.removeprefix("[").removesuffix("]"))
    suffix = host.lower().removeprefix("*").removeprefix(".").rstrip(".")
    return ProxyExemption(suffix="" if network else suffix, network=network, port=int(port) if port else None)


def as_network(text: str) -> Network | None:
    """Return *text* as a network (an address is one of size 1), or None where it is a name."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def as_address(host: str) -> Address | None:
    """Return *host* as an address, or None where it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
