"""An answer as it is given, kept for those who ask for the same while it lasts."""

from __future__ import annotations

import asyncio

from core.errors import AppError


class Recording:
    """What one call has answered so far. Its parts are kept up to a bound; beyond it, nobody can join any more."""

    __slots__ = (
        "_bytes_max",
        "_changed",
        "content_type",
        "digest",
        "error",
        "followers",
        "is_ended",
        "is_stream",
        "is_too_large",
        "parts",
        "size",
        "status",
    )

    def __init__(self, digest: bytes, bytes_max: int) -> None:
        self.digest = digest
        self.status = 0
        self.content_type = b""
        self.is_stream = False
        self.parts: list[bytes] = []
        self.size = 0
        self.is_too_large = False
        self.is_ended = False
        self.error: AppError | None = None
        self.followers = 0
        self._bytes_max = bytes_max
        self._changed = asyncio.Event()

    @property
    def has_begun(self) -> bool:
        """Whether status and content type are known, or the call has ended without."""
        return self.status != 0 or self.is_ended

    @property
    def body(self) -> bytes:
        """What was answered so far."""
        return b"".join(self.parts)

    def begin(self, status: int, content_type: bytes, *, is_stream: bool) -> None:
        """Note how the answer begins."""
        self.status, self.content_type, self.is_stream = status, content_type, is_stream
        self._tell()

    def write(self, data: bytes) -> None:
        """Note the next part."""
        if self.is_too_large:
            return
        self.size += len(data)
        if self.size > self._bytes_max:
            self.is_too_large = True
            self.parts.clear()
        else:
            self.parts.append(data)
        self._tell()

    def end(self, error: AppError | None = None) -> None:
        """Note that nothing comes any more; with *error*, that the answer is not whole."""
        if not self.is_ended:
            self.is_ended = True
            self.error = error
            self._tell()

    async def changed(self) -> None:
        """Return when there is more to see."""
        await self._changed.wait()

    def _tell(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()
