"""A server that counts webhooks: many connections, kept alive, any number of requests in one read."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_ID = re.compile(rb"webhook-id: (\S+)", re.IGNORECASE)


@dataclass
class Arrival:
    """One webhook as it came, and when by the wall clock."""

    path: str
    head: bytes
    body: bytes
    at: float

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}


Answer = Callable[[Arrival], bytes | None]
"""Returns what is sent back; None: nothing, for ever."""


def status(code: int, body: bytes = b"", more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n%b\r\n%b" % (code, len(body), more, body)


OK = status(200)


@dataclass
class Sink:
    """Takes webhooks at `url(path)`; what a path answers is in *answers*, 200 by default."""

    port: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """How often each `webhook-id` was taken (answered 2xx)."""
    arrivals: dict[str, list[Arrival]] = field(default_factory=lambda: defaultdict(list))
    """By path; only where `keeps` says so."""
    answers: dict[str, Answer] = field(default_factory=dict)
    keeps: bool = True
    open_connections: int = 0
    waiting: dict[str, list[asyncio.Transport]] = field(default_factory=lambda: defaultdict(list))
    """By path: connections that wait for an answer."""

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def answer_late(self, path: str, answer: bytes) -> None:
        """Answer what waits at *path* for an answer."""
        for transport in self.waiting.pop(path, []):
            transport.write(answer)

    def take(self, arrival: Arrival) -> bytes | None:
        if self.keeps:
            self.arrivals[arrival.path].append(arrival)
        answer = self.answers.get(arrival.path, lambda _: OK)(arrival)
        found = _ID.search(arrival.head)
        if answer is not None and answer[9:10] == b"2" and found is not None:
            self.counts[found[1].decode()] += 1
        return answer


class _Connection(asyncio.Protocol):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._sink.open_connections += 1

    def connection_lost(self, error: Exception | None) -> None:
        self._sink.open_connections -= 1

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while (end := self._unread.find(b"\r\n\r\n")) >= 0:
            head = self._unread[:end]
            length = _LENGTH.search(head)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._unread) < whole:
                return
            body, self._unread = self._unread[end + 4 : whole], self._unread[whole:]
            path = head.split(b" ", 2)[1].decode()
            answer = self._sink.take(Arrival(path, head, body, time.time()))
            if answer is None:
                self._sink.waiting[path].append(self._transport)
            else:
                self._transport.write(answer)


@asynccontextmanager
async def sink() -> AsyncGenerator[Sink]:
    made = Sink()
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(made), "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
