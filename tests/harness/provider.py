"""A provider on a real socket that does exactly what it is told, one answer per request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec


class Received(NamedTuple):
    head: bytes
    body: bytes

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    def json(self) -> dict[str, object]:
        return msgspec.json.decode(self.body)

    def header(self, name: str) -> str | None:
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.decode().lower() == name:
                return value.strip().decode()
        return None


class Exchange:
    """One request at the provider: what came, and the socket to answer on."""

    def __init__(self, received: Received, writer: asyncio.StreamWriter) -> None:
        self.received = received
        self.writer = writer
        self.hung_up = asyncio.Event()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_head(self, status: int = 200, content_type: str = "text/event-stream", *, more: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n{more}\r\n"
        await self.send(head.encode())

    async def send_chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def send_events(self, *events: bytes, end: bool = True) -> None:
        for event in events:
            await self.send_chunk(b"data: " + event + b"\n\n")
        if end:
            await self.send_chunk(b"data: [DONE]\n\n")
            await self.end()

    def reset(self) -> None:
        """Close with RST."""
        self.writer.transport.abort()


Script = Callable[[Exchange], Awaitable[None]]


def answer(body: bytes, status: int = 200, content_type: str = "application/json", more: str = "") -> Script:
    """A whole answer."""

    async def play(exchange: Exchange) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n{more}\r\n"
        await exchange.send(head.encode() + body)

    return play


def chat_answer(text: str = "hi", usage: tuple[int, int] = (5, 7)) -> bytes:
    return msgspec.json.encode(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "fake",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
        }
    )


def chunk(text: str | None = None, *, finish: str | None = None, usage: tuple[int, int] | None = None) -> bytes:
    """A chunk as OpenAI sends it when usage is asked for."""
    choices = [] if usage else [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}]
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)} if usage else None
    return msgspec.json.encode(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "fake",
            "choices": choices,
            "usage": counts,
        }
    )


def stream(*texts: str, usage: tuple[int, int] = (5, 7)) -> Script:
    """A whole stream."""

    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        await exchange.send_events(*[chunk(text) for text in texts], chunk(finish="stop"), chunk(usage=usage))

    return play


class FakeProvider:
    """Plays queued scripts in order, then `default` for ever."""

    def __init__(self) -> None:
        self.scripts: deque[Script] = deque()
        self.default: Script = answer(chat_answer())
        self.received: list[Received] = []
        self.exchanges: list[Exchange] = []
        self.open_connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> FakeProvider:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open_connections += 1
        try:
            while await self._serve_one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections -= 1
            self._tasks.discard(task)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        exchange = Exchange(Received(head, await reader.readexactly(length)), writer)
        self.received.append(exchange.received)
        self.exchanges.append(exchange)
        script = self.scripts.popleft() if self.scripts else self.default
        playing = asyncio.ensure_future(script(exchange))
        watching = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({playing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                exchange.hung_up.set()
                await asyncio.gather(playing, return_exceptions=True)
                return False
            await playing
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return not writer.is_closing()
