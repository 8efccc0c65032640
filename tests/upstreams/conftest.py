"""A scripted upstream on a real socket: each test says, byte by byte, what the other side does."""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop

from core.http1.client import Http1Client
from core.http1.connections import ConnectionLimits
from core.http1.messages import Deadlines, Origin, UpstreamRequest
from tests.harness.authority import Authority

PATIENCE_SECONDS = 10.0
DEADLINES = Deadlines(connect_seconds=5, first_byte_seconds=5, idle_seconds=5, total_seconds=20)
OK_HEAD = b"HTTP/1.1 200 OK\r\n"
OK = OK_HEAD + b"Content-Length: 2\r\n\r\nok"


def pytest_asyncio_loop_factories(config, item):
    """The client promises to behave the same on both loops."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Peer:
    """The upstream's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> bytes:
        """Read one whole request and return it."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = 0
            for line in head.split(b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            return head + await self.reader.readexactly(length)

    def send(self, raw: bytes) -> None:
        self.writer.write(raw)

    async def answer(self, raw: bytes = OK) -> bytes:
        request = await self.request()
        self.send(raw)
        return request

    def half_close(self) -> None:
        self.writer.write_eof()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self, within_seconds: float = 1.0) -> bool:
        """Wait until the client has closed; fail if it takes longer than the second we promise."""
        async with asyncio.timeout(within_seconds):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(65_536):
                    pass
        return True


class Upstream:
    """A listening socket whose connections are handed to the test one by one."""

    def __init__(self, scheme: str = "http") -> None:
        self._peers: asyncio.Queue[Peer] = asyncio.Queue()
        self._all: list[Peer] = []
        self._scheme = scheme
        self.server: asyncio.Server | None = None
        self.accepted_count = 0

    async def listen(self, host: str, tls: ssl.SSLContext | None = None) -> None:
        self.server = await asyncio.start_server(self._on_connect, host, 0, ssl=tls, limit=1 << 20)

    async def _on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        self.accepted_count += 1
        self._all.append(peer)
        self._peers.put_nowait(peer)

    async def accept(self) -> Peer:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self._peers.get()

    @property
    def port(self) -> int:
        assert self.server is not None
        return self.server.sockets[0].getsockname()[1]

    def origin(self, host: str = "127.0.0.1") -> Origin:
        return Origin(self._scheme, host, self.port)

    def request(self, host: str = "127.0.0.1", **changes) -> UpstreamRequest:
        values = {"method": b"POST", "target": b"/v1/chat", "headers": [], "body": b"{}"}
        return UpstreamRequest(origin=self.origin(host), **{**values, **changes})

    async def close(self) -> None:
        assert self.server is not None
        self.server.close()
        for peer in self._all:
            peer.writer.transport.abort()
        for peer in self._all:
            with contextlib.suppress(OSError):
                await peer.writer.wait_closed()


@asynccontextmanager
async def listening(host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    upstream = Upstream("https" if tls else "http")
    await upstream.listen(host, tls)
    try:
        yield upstream
    finally:
        await upstream.close()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with listening() as server:
        yield server


@asynccontextmanager
async def open_client(**settings) -> AsyncIterator[Http1Client]:
    client = Http1Client(**{"limits": ConnectionLimits(), "proxies": None, **settings})
    try:
        yield client
    finally:
        await client.close()
        assert client.connections_open == 0
        assert client.connections_idle == 0


@pytest.fixture
async def client() -> AsyncIterator[Http1Client]:
    async with open_client() as opened:
        yield opened


async def exchange(client: Http1Client, upstream: Upstream, raw: bytes, *, then_close: bool = False, **changes):
    """One request on a connection of its own, answered with *raw*; return status, headers and body."""
    task = asyncio.create_task(client.send(upstream.request(**changes), DEADLINES))
    peer = await upstream.accept()
    await peer.answer(raw)
    if then_close:
        peer.close()
    response = await task
    return response.status, response.headers, await response.read_all(1 << 30)


async def until(claim: Callable[[], bool]) -> None:
    """Let the loop run until *claim* holds."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not claim():  # noqa: ASYNC110 - polls state that has no event, by whole rounds of the loop
            await asyncio.sleep(0)


def only_connection(client: Http1Client):
    """The client's one connection, to see how far it has read."""
    (pool,) = client._pools.values()
    (connection,) = pool.connections
    return connection


@pytest.fixture(scope="session")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))
