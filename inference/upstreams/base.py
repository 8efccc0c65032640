"""What every upstream gives: an answer whose head is there and whose body is read piece by piece."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final, Protocol

import msgspec

from core.http1.errors import FirstByteTimedOut, IdleTimedOut, TotalTimedOut
from core.http1.messages import Deadlines
from inference.catalog import Deployment
from inference.endpoints import Endpoint
from inference.wire import ParsedRequest

EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"


class UpstreamCall(msgspec.Struct, frozen=True):
    """One call to one deployment. Nothing of it may reach the provider before *permit* is done: it is written down."""

    endpoint: Endpoint
    request: ParsedRequest
    deployment: Deployment
    permit: asyncio.Future[None]


class Answer(Protocol):
    """An answer on its way. Exactly one task reads it."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """The headers, names in lower case."""
        ...

    async def read(self) -> bytes:
        """Return what has arrived since the last call; b"" at the clean end. Errors: UpstreamError."""
        ...

    async def pass_on(self, sink: Callable[[bytes], bool]) -> bool:
        """Give *sink* what arrives until it returns False; return whether all is read. Errors: those of `read`."""
        ...

    async def read_all(self, bytes_max: int) -> bytes:
        """Return the rest of the body. Errors: BodyTooLarge, and those of `read`."""
        ...

    def abort(self) -> None:
        """Stop at once and let the provider know. Idempotent."""
        ...


class Upstream(Protocol):
    """A kind of provider."""

    def open(self, call: UpstreamCall) -> Awaitable[Answer]:
        """Send the call; return when the answer's head is there.

        Errors: UpstreamError, ParameterUnsupported, and what the call's permit fails with.
        """
        ...

    async def close(self) -> None:
        """Close what is open."""
        ...


class _ReadByPieces(abc.ABC):
    """An answer that can be read, and so can be passed on."""

    @abc.abstractmethod
    async def read(self) -> bytes:
        """Return the next piece; b"" at the end."""

    async def pass_on(self, sink: Callable[[bytes], bool]) -> bool:
        """Give *sink* each piece until it returns False; return whether all is read. Errors: those of `read`."""
        while piece := await self.read():
            if not sink(piece):
                return False
        return True


class HeldAnswer(_ReadByPieces):
    """An answer whose body is already here."""

    def __init__(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self._rest = body

    async def read(self) -> bytes:
        """Return the body once, then b""."""
        rest, self._rest = self._rest, b""
        return rest

    async def read_all(self, bytes_max: int) -> bytes:
        """Return the body; it was bounded when it was read."""
        return (await self.read())[:bytes_max]

    def abort(self) -> None:
        """Do nothing: the provider is done."""


class GeneratedAnswer(_ReadByPieces):
    """An answer that is made piece by piece in this process. Deadlines hold between the pieces."""

    def __init__(self, status: int, content_type: bytes, pieces: AsyncIterator[bytes], deadlines: Deadlines) -> None:
        self.status = status
        self.headers: Sequence[tuple[bytes, bytes]] = ((b"content-type", content_type),)
        self._pieces = pieces
        self._deadlines = deadlines
        self._next: asyncio.Future[bytes] | None = None
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._loop.time() + deadlines.total_seconds
        self._wait_seconds = deadlines.first_byte_seconds

    async def read(self) -> bytes:
        """Return the next piece; b"" at the end. Errors: FirstByteTimedOut, IdleTimedOut, TotalTimedOut."""
        left_seconds = self._ends_at - self._loop.time()
        # A task of its own, so that `abort` can end a wait that is under way.
        self._next = asyncio.ensure_future(anext(self._pieces, b""))
        try:
            piece = await asyncio.wait_for(self._next, min(left_seconds, self._wait_seconds))
        except TimeoutError:
            raise self._late(left_seconds) from None
        self._wait_seconds = self._deadlines.idle_seconds
        return piece

    async def read_all(self, bytes_max: int) -> bytes:
        """Return everything that is left; *bytes_max* bounds what providers send, not what we make."""
        pieces: list[bytes] = []
        while piece := await self.read():
            pieces.append(piece)
        return b"".join(pieces)[:bytes_max]

    def abort(self) -> None:
        """Stop making pieces."""
        if self._next is not None:
            self._next.cancel()

    def _late(self, left_seconds: float) -> Exception:
        if left_seconds <= self._wait_seconds:
            return TotalTimedOut("The call took longer than it may in all.")
        if self._wait_seconds == self._deadlines.first_byte_seconds:
            return FirstByteTimedOut("The provider did not begin to answer in time.")
        return IdleTimedOut("The provider stopped in the middle of its answer.")
