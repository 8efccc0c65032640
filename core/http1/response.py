"""What a caller holds of an exchange once the response head has arrived."""

import abc
import asyncio
from collections.abc import Callable

from core.http1.errors import BodyTooLarge, UpstreamError


class ResponseSource(abc.ABC):
    """The connection, as far as a response needs it; a base class because the two modules cannot import each other."""

    __slots__ = ()

    is_reading_paused: bool

    @abc.abstractmethod
    def resume_reading(self) -> None:
        """Read from the network again, and let the idle deadline run again."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Close the connection at once."""


class Http1Response:
    """A response whose head has arrived and whose body may still be arriving.

    Exactly one task reads. What arrived before a failure is handed out first; then every read raises that failure.
    The connection goes back to the pool by itself at the clean end of the body, read or not.
    """

    __slots__ = ("_error", "_is_ended", "_pieces", "_sink", "_source", "_waiter", "headers", "status", "taken_bytes")

    def __init__(
        self, status: int, headers: list[tuple[bytes, bytes]], pieces: list[bytes], source: ResponseSource
    ) -> None:
        self.status = status
        self.headers = headers
        """Names in lower case, in the order and with the repetitions of the wire."""
        self.taken_bytes = 0
        self._pieces = pieces
        self._source: ResponseSource | None = source
        self._waiter: asyncio.Future[bool] | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._error: UpstreamError | None = None
        self._is_ended = False

    async def read(self) -> bytes:
        """Return all that arrived since the last call, joined; wait if that is nothing; b"" at the clean end.

        Cancellation closes the connection: a body nobody reads to its end cannot be reused.
        Errors: IdleTimedOut, TotalTimedOut, ConnectionLost, ProtocolViolated.
        """
        while not self._pieces:
            if self._is_ended:
                if self._error is not None:
                    raise self._error
                return b""
            await self._wait(None)
        return self._take()

    async def pass_on(self, sink: Callable[[bytes], bool]) -> bool:
        """Give *sink* what arrives, in the moment in which it does, until it returns False; return whether all is read.

        No task is woken for a piece: of a stream whose events come one by one, that is a third of the cost.
        Cancellation closes the connection. Errors: those of `read`, and whatever *sink* raises.
        """
        while self._pieces or not self._is_ended:
            if not self._pieces:
                is_welcome = await self._wait(sink)
            else:
                try:
                    is_welcome = sink(self._take())
                except BaseException:
                    self.abort()
                    raise
            if not is_welcome:
                return False
        if self._error is not None:
            raise self._error
        return True

    async def _wait(self, sink: Callable[[bytes], bool] | None) -> bool:
        """Return when there is something to see; False if *sink* has refused more."""
        if self._waiter is not None:
            raise RuntimeError("Two tasks read one response.")
        self._waiter = asyncio.get_running_loop().create_future()
        self._sink = sink
        try:
            return await self._waiter
        except BaseException:
            self.abort()
            raise
        finally:
            self._waiter = self._sink = None

    def read_nowait(self) -> bytes | None:
        """Return what is there already: b"" at the clean end, None if nothing has arrived yet. Errors: as `read`."""
        if self._pieces:
            return self._take()
        if not self._is_ended:
            return None
        if self._error is not None:
            raise self._error
        return b""

    async def read_all(self, bytes_max: int) -> bytes:
        """Return the rest of the body. Errors: BodyTooLarge beyond *bytes_max* bytes, and those of `read`."""
        body = self.read_nowait()
        if body is None:
            body = await self.read()
        elif self._is_ended and not self._pieces and self._error is None and len(body) <= bytes_max:
            return body  # it all came at once, as answers that are not streamed do
        parts: list[bytes] = []
        size_bytes = 0
        while body:
            size_bytes += len(body)
            if size_bytes > bytes_max:
                self.abort()
                raise BodyTooLarge(f"The upstream's answer is larger than {bytes_max} bytes.", bytes_max=bytes_max)
            parts.append(body)
            body = await self.read()
        return b"".join(parts)

    def abort(self) -> None:
        """Close the connection at once, so that the provider sees it and stops working. Idempotent.

        After the end of the body it does nothing: the connection is in the pool and may be somebody else's already.
        """
        source = self._source
        if source is not None:
            self._source = None
            source.abort()

    def wake(self) -> None:
        """Let the reader see what has arrived. For the connection."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        sink = self._sink
        if sink is None:
            waiter.set_result(True)
            return
        try:
            if not sink(self._take()):
                waiter.set_result(False)
        except BaseException as error:  # noqa: BLE001 - the reader's to handle, not the event loop's
            waiter.set_exception(error)

    def end(self, error: UpstreamError | None) -> None:
        """Mark the end, clean or by *error*, and cut the tie to the connection. For the connection."""
        self._is_ended = True
        self._error = error
        self._source = None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(True)

    def _take(self) -> bytes:
        pieces = self._pieces
        taken = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self.taken_bytes += len(taken)
        source = self._source
        # Everything was taken, so the buffer is below the half at which reading resumes.
        if source is not None and source.is_reading_paused:
            source.resume_reading()
        return taken
