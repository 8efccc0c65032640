"""How a connection to an upstream comes about: name lookup, TCP to the first address to answer, proxy tunnel, TLS."""

import asyncio
import errno
import itertools
import os
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from core.http1.connection import Http1Connection
from core.http1.errors import ConnectFailed
from core.http1.messages import Origin
from core.http1.proxies import Proxy, as_address

# RFC 8305, section 5: how long one address may stay silent before the next is tried beside it. Done here because
# uvloop's create_connection tries one address after the other, and a dead IPv6 route would eat the whole deadline.
NEXT_ADDRESS_SECONDS = 0.25
PROXY_HEAD_BYTES_MAX = 16_384
# A peer that vanished without FIN or RST (a NAT that forgot us) is noticed after 60 + 4 x 15 seconds.
KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_PROBES = 60, 15, 4
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r\n")

SocketAddress = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]
Resolver = Callable[[str, int], Awaitable[list[SocketAddress]]]
"""Returns the addresses of a host, the first to try first; never none. Errors: ConnectFailed."""


class Route(msgspec.Struct, frozen=True):
    """The way to an upstream."""

    origin: Origin
    proxy: Proxy | None
    tls: ssl.SSLContext | None
    """Set for https; carries the trust roots, hostname checking and ALPN."""
    resolve: Resolver | None = None
    """Looks up the host in the place of the system, and refuses what must not be reached."""

    @property
    def target_prefix(self) -> bytes:
        """What stands before the path in a request line: a proxy for plain http wants the absolute form."""
        return f"http://{self.origin.authority}".encode() if self.proxy and not self.tls else b""

    @property
    def fixed_lines(self) -> bytes:
        """The header lines every request on this route carries."""
        lines = b"host: %b\r\n" % self.origin.authority.encode()
        if self.proxy and not self.tls and self.proxy.authorization:
            lines += b"proxy-authorization: %b\r\n" % self.proxy.authorization
        return lines


async def dial(route: Route, connection: Http1Connection) -> None:
    """Connect *connection* over *route*. The caller bounds the time and cancels; nothing stays open then.

    Errors: ConnectFailed.
    """
    loop = asyncio.get_running_loop()
    hop = route.proxy or route.origin
    addresses = await (route.resolve(hop.host, hop.port) if route.resolve else look_up(loop, hop.host, hop.port))
    sock = await open_socket(loop, f"{hop.host}:{hop.port}", addresses)
    inode = os.fstat(sock.fileno()).st_ino
    is_dialled = False
    try:
        if route.proxy is not None and route.tls is not None:
            await open_tunnel(loop, sock, route.origin, route.proxy)
        await loop.create_connection(
            lambda: connection,
            sock=sock,
            ssl=route.tls,
            server_hostname=route.origin.host if route.tls else None,
        )
        is_dialled = not connection.is_closed
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message.rstrip(".")
        raise ConnectFailed(f"{route.origin.address} shows a certificate we refuse: {reason}.", phase="tls") from error
    except OSError as error:  # ssl.SSLError is one
        phase = "tls" if route.tls else "connect"
        text = f"{route.origin.address} broke off the TLS handshake." if route.tls else f"{hop.host} closed at once."
        raise ConnectFailed(text, phase=phase) from error
    finally:
        if not is_dialled:
            connection.abort()
            let_go(sock, inode)


def let_go(sock: socket.socket, inode: int) -> None:
    """Close *sock*, unless the event loop has closed its descriptor already, which *inode* tells.

    uvloop 0.22 closes the descriptor, but not the Python object, of a connection that ends before `create_connection`
    returns. Closing that object, or leaving it to garbage collection, would close whatever has the number by then.
    """
    try:
        is_ours = os.fstat(sock.fileno()).st_ino == inode
    except OSError:
        is_ours = False
    if is_ours:
        sock.close()
    else:
        sock.detach()


async def open_socket(loop: asyncio.AbstractEventLoop, name: str, addresses: list[SocketAddress]) -> socket.socket:
    """Return a socket connected to the first of *addresses* that answers. Errors: ConnectFailed."""
    pending: set[asyncio.Task[socket.socket]] = set()
    failures: list[OSError] = []
    try:
        for address in [*addresses, None]:
            if address is not None:
                pending.add(loop.create_task(connect_socket(loop, address)))
            is_last = address is None or address is addresses[-1]
            while pending:
                timeout = None if is_last else NEXT_ADDRESS_SECONDS
                done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                winner = pick_winner(done, failures)
                if winner is not None:
                    return winner
                if not is_last:
                    break
    finally:
        for task in pending:
            task.add_done_callback(close_late)
            task.cancel()
    # Not strerror: asyncio puts a sentence of its own there.
    reason = os.strerror(failures[-1].errno or errno.EHOSTUNREACH)
    raise ConnectFailed(f"{name} cannot be reached: {reason}.", phase="connect") from failures[-1]


async def look_up(loop: asyncio.AbstractEventLoop, host: str, port: int) -> list[SocketAddress]:
    """Return the addresses of *host*, families taking turns (RFC 8305, section 4). Errors: ConnectFailed."""
    literal = as_address(host)
    if literal is not None:
        family = socket.AF_INET6 if literal.version == 6 else socket.AF_INET
        return [(family, (host, port, 0, 0) if literal.version == 6 else (host, port))]
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConnectFailed(f"{host} cannot be found in the DNS.", phase="dns") from error
    addresses: list[SocketAddress] = [(family, address) for family, _, _, _, address in found]  # type: ignore[misc]
    first_family = addresses[0][0]
    first = [address for address in addresses if address[0] == first_family]
    second = [address for address in addresses if address[0] != first_family]
    return [address for pair in itertools.zip_longest(first, second) for address in pair if address is not None]


async def connect_socket(loop: asyncio.AbstractEventLoop, address: SocketAddress) -> socket.socket:
    """Return a socket connected to *address*, with Nagle off and keep-alive on. Errors: OSError."""
    family, sockaddr = address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", KEEPALIVE_IDLE_SECONDS),
            ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_SECONDS),
            ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ):
            if hasattr(socket, option):  # macOS names the first one differently and does without
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        await loop.sock_connect(sock, sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def pick_winner(done: Iterable[asyncio.Task[socket.socket]], failures: list[OSError]) -> socket.socket | None:
    """Return one connected socket of *done*, close the others, and add to *failures*."""
    winner: socket.socket | None = None
    for task in done:
        error = task.exception()
        if isinstance(error, OSError):
            failures.append(error)
        elif error is not None:
            raise error
        elif winner is None:
            winner = task.result()
        else:
            task.result().close()
    return winner


def close_late(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket of an attempt that lost the race, and take note of its error so that asyncio does not log it."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def open_tunnel(loop: asyncio.AbstractEventLoop, sock: socket.socket, origin: Origin, proxy: Proxy) -> None:
    """Ask *proxy* to relay to *origin*. Errors: ConnectFailed with phase "proxy", naming the proxy's status."""
    address = origin.address.encode()
    head = b"CONNECT %b HTTP/1.1\r\nhost: %b\r\n" % (address, address)
    if proxy.authorization is not None:
        head += b"proxy-authorization: %b\r\n" % proxy.authorization
    received = b""
    try:
        await loop.sock_sendall(sock, head + b"\r\n")
        while b"\r\n\r\n" not in received:
            piece = await loop.sock_recv(sock, 4096)
            received += piece
            if not piece or len(received) > PROXY_HEAD_BYTES_MAX:
                raise ConnectFailed("The proxy broke off the tunnel's set-up.", phase="proxy")
    except OSError as error:
        raise ConnectFailed("The proxy broke off the tunnel's set-up.", phase="proxy") from error
    status_line = STATUS_LINE.match(received)
    if status_line is None:
        raise ConnectFailed("The proxy did not answer with HTTP/1.1.", phase="proxy")
    if not status_line[1].startswith(b"2"):
        raise ConnectFailed(f"The proxy refused the tunnel with status {status_line[1].decode()}.", phase="proxy")
    if not received.endswith(b"\r\n\r\n") or received.count(b"\r\n\r\n") > 1:
        # TLS begins with our hello: bytes from the far side before it were not sent by the upstream.
        raise ConnectFailed("The proxy sent bytes of its own into the tunnel.", phase="proxy")
