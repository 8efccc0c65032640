"""A file that is sent as it is read, and that is cut off rather than ended when it cannot be had whole."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from litestar import Litestar, Request
from litestar.response import Stream
from litestar.response.base import ASGIResponse
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import Receive, Scope, Send

from gateway.routes.reading import ExportTooLong, told_when_down


class ExportStream(Stream):
    """An answer that consists of *pieces* behind the *first* one, and closes them however it ends."""

    def __init__(self, first: bytes, pieces: AsyncGenerator[bytes], media_type: str, headers: dict[str, str]) -> None:
        super().__init__(pieces, media_type=media_type, headers=headers)
        self._answer = _Answer(first, pieces, media_type, headers)

    def to_asgi_response(self, app: Litestar | None, request: Request[Any, Any, Any], **options: Any) -> ASGIResponse:  # noqa: ARG002 - what a route may declare and an export does not
        """Return the answer as it is sent."""
        return self._answer


class _Answer(ASGIStreamingResponse):
    def __init__(self, first: bytes, pieces: AsyncGenerator[bytes], media_type: str, headers: dict[str, str]) -> None:
        whole = _whole(first, pieces)
        super().__init__(iterator=whole, media_type=media_type, headers=headers)  # pyright: ignore[reportUnknownMemberType] - Litestar leaves open of what
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Left to Litestar, the pieces would stay open, and their place taken, until memory is freed.

        One that is over its time is given up without an end: our server then closes the connection.
        """
        async with contextlib.aclosing(self._pieces):
            try:
                await super().__call__(scope, receive, send)
            except* ExportTooLong:
                pass


async def begun(pieces: AsyncGenerator[bytes], *, media_type: str, headers: dict[str, str]) -> ExportStream:
    """Return *pieces* as an answer, with the first one read: until then what goes wrong is a plain answer.

    PostgreSQL down: UsageUnreadable; later the file breaks off. Errors: those of *pieces*.
    """
    with told_when_down():
        first = await anext(pieces, b"")
    return ExportStream(first, pieces, media_type, headers)


async def _whole(first: bytes, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    yield first
    async for piece in pieces:
        yield piece
