"""An answer as it is given, for those who ask for the same while it lasts, and to be kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from core.errors import AppError
from gateway.errors import AnswerTooLarge, StillRunning

# Who joins takes a place of the process and none of the caller's own limits.
_FOLLOWERS_MAX: Final = 100
# What goes to one who joined before it is asked whether they take it.
_PIECE_BYTES: Final = 64 * 1024


class Recording:
    """What one call has answered so far.

    Its bytes are held up to a bound. Beyond it nobody can join any more, and the answer is not kept; who has joined
    goes on, unless they fall behind by more than the bound.
    """

    __slots__ = (
        "_bytes_max",
        "_changed",
        "_held",
        "_seen",
        "error",
        "followers",
        "head",
        "is_ended",
        "is_stream",
        "is_too_large",
        "is_void",
        "request_id",
        "size",
        "status",
        "when_deserted",
    )

    def __init__(self, bytes_max: int) -> None:
        self.request_id = ""
        """Of the call that is recorded."""
        self.status = 0
        self.head = b""
        """The content type, and the provider's headers behind it, as lines."""
        self.is_stream = False
        self.size = 0
        self.is_too_large = False
        self.is_ended = False
        self.is_void = False
        """Whether it ended before it was whole, for a reason that does not concern who joined."""
        self.error: AppError | None = None
        """What the call failed with."""
        self.followers = 0
        self.when_deserted: Callable[[], None] | None = None
        """Called when the last follower has left."""
        self._bytes_max = bytes_max
        self._held = bytearray()
        self._seen = 0
        self._changed = asyncio.Event()

    @property
    def is_awaited(self) -> bool:
        """Whether others wait for what comes next, and it is held for them."""
        return self.followers > 0 and not self.is_too_large

    @property
    def body(self) -> bytes:
        """What was answered so far; b"" if that is too large."""
        return b"" if self.is_too_large else bytes(self._held)

    def begin(self, status: int, head: bytes, *, is_stream: bool) -> None:
        """Note how the answer begins."""
        self.status, self.head, self.is_stream = status, head, is_stream
        self._tell()

    def write(self, data: bytes, *, is_last: bool = False) -> None:
        """Note the next part. The last one is seen when the recording ends."""
        if self.is_ended:
            return
        self.size += len(data)
        self.is_too_large = self.size > self._bytes_max
        if not self.is_too_large:
            self._held += data
        elif self.is_stream and self.followers:
            self._held += data
            del self._held[: -self._bytes_max or None]
        else:
            self._held.clear()
        if not is_last:
            self._seen = self.size
            self._tell()

    def fill(self, status: int, head: bytes, body: bytes) -> None:
        """Note a whole answer, whatever its size: one that was kept."""
        self.begin(status, head, is_stream=head.startswith(b"text/event-stream"))
        self._held += body
        self.size = len(body)
        self.end()

    def end(self, error: AppError | None = None, *, is_void: bool = False) -> None:
        """Note that nothing comes any more. With *error*, or if it *is_void*, the answer is not whole."""
        if not self.is_ended:
            self.is_ended, self.error, self.is_void = True, error, is_void
            self._seen = self.size
            self._tell()

    def abandon(self) -> None:
        """Note that the call is about to be broken off. One whose last part has come is whole all the same."""
        if self._seen == self.size:
            self.end(is_void=True)

    def join(self) -> None:
        """Count one more who follows. Errors: AnswerTooLarge; StillRunning when there are too many."""
        if self.is_too_large:
            raise AnswerTooLarge
        if self.followers >= _FOLLOWERS_MAX:
            raise StillRunning
        self.followers += 1
        self._tell()

    def leave(self) -> None:
        """Count one less."""
        self.followers -= 1
        if not self.followers and self.when_deserted is not None:
            self.when_deserted()

    def since(self, offset: int) -> bytes:
        """Return what comes behind the first *offset* bytes, as much of it as is sent at once.

        Errors: AnswerTooLarge when it is not held any more.
        """
        first = self.size - len(self._held)
        if offset < first:
            raise AnswerTooLarge
        return bytes(self._held[offset - first : min(offset + _PIECE_BYTES, self._seen) - first])

    async def changed(self) -> None:
        """Return when there is more to see."""
        await self._changed.wait()

    async def awaited(self) -> None:
        """Return when others wait for what comes next."""
        while not self.is_awaited:
            await self.changed()

    def _tell(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()
