"""HTTP by hand: exact bytes out, exact bytes in."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import msgspec


class RawAnswer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, object]:
        return msgspec.json.decode(self.body)

    def error(self) -> dict[str, object]:
        """The error object; fails unless the answer has OpenAI's exact form."""
        found = self.json()["error"]
        assert isinstance(found, dict)
        assert set(found) == {"message", "type", "param", "code"}
        return found


class RawConnection:
    """One connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int) -> RawConnection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**26))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 30)
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        return int(first.split(" ")[1]), headers

    async def answer(self) -> RawAnswer:
        status, headers = await self.head()
        return RawAnswer(status, headers, await asyncio.wait_for(self.body(headers), 60))

    async def body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        pieces: list[bytes] = []
        while piece := await self.chunk():
            pieces.append(piece)
        return b"".join(pieces)

    async def chunk(self) -> bytes:
        """One chunk of a chunked body, b"" for the last."""
        size = int((await self.reader.readuntil(b"\r\n")).strip(), 16)
        piece = await self.reader.readexactly(size + 2)
        return piece[:-2]

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


def post(
    path: str, key: str | None, body: bytes, *headers: str, content_type: str | None = "application/json"
) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: test", f"content-length: {len(body)}", *headers]
    if key is not None:
        lines.append(f"authorization: Bearer {key}")
    if content_type is not None:
        lines.append(f"content-type: {content_type}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def chat(model: str = "fake", *, stream: bool = False, text: str = "hello", **more: object) -> bytes:
    return msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            **({"stream": True} if stream else {}),
            **more,
        }
    )


async def call(port: int, request: bytes) -> RawAnswer:
    """One request on a connection of its own."""
    connection = await RawConnection.open(port)
    try:
        await connection.send(request)
        return await connection.answer()
    finally:
        connection.close()
