"""A very fast OpenAI-compatible provider: `python -m bench.mock_provider --port N [--core N]`.

It shares a core with the load generator, so it has to be much cheaper than anything measured: answers are finished
bytes (bench/mock_answers.py), the request is parsed by httptools without looking at its headers, and all paced streams
hang on one timer wheel. It prints `ready <port>` once it listens, and binds to loopback only.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import time

import httptools
import msgspec
import uvloop

from bench.mock_answers import (
    completion_answer,
    embeddings_answer,
    error_answer,
    models_answer,
    script_of,
    stream_writes,
)

BODY_BYTES_MAX = 16 * 1024 * 1024
TICK_SECONDS = 0.001
GOLDEN_RATIO = 0.618034  # its multiples spread evenly over the interval, however many streams there are


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _ChatRequest(msgspec.Struct):
    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None


class _EmbeddingsRequest(msgspec.Struct):
    model: str
    input: str | list
    encoding_format: str = "float"


_decode_chat = msgspec.json.Decoder(_ChatRequest).decode
_decode_embeddings = msgspec.json.Decoder(_EmbeddingsRequest).decode


class TimerWheel:
    """Wakes paced streams at steady intervals with one timer for all of them.

    A late turn makes up for every slot that it missed, so the rate holds on average under load.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, list[_PacedStream]] = {}
        self._turned_to = 0
        self._started = 0
        self._is_turning = False

    def start(self, stream: "_PacedStream") -> None:
        """Schedule the second write of a stream; its phase differs from that of the streams before it."""
        self._started += 1
        stream.due_seconds = time.monotonic() + stream.interval_seconds * (self._started * GOLDEN_RATIO % 1.0)
        self._add(stream)
        if not self._is_turning:
            self._is_turning = True
            self._turned_to = int(time.monotonic() / TICK_SECONDS)
            self._loop.call_later(TICK_SECONDS, self._turn)

    def _add(self, stream: "_PacedStream") -> None:
        slot = max(int(stream.due_seconds / TICK_SECONDS), self._turned_to + 1)
        self._slots.setdefault(slot, []).append(stream)

    def _turn(self) -> None:
        now = int(time.monotonic() / TICK_SECONDS)
        while self._turned_to < now:
            self._turned_to += 1
            for stream in self._slots.pop(self._turned_to, ()):
                if stream.write_next():
                    stream.due_seconds += stream.interval_seconds
                    self._add(stream)
        self._is_turning = bool(self._slots)
        if self._is_turning:
            self._loop.call_later(TICK_SECONDS, self._turn)


class _PacedStream:
    """One stream that writes its next event each time the wheel comes round."""

    __slots__ = ("_index", "_provider", "_writes", "due_seconds", "interval_seconds")

    def __init__(self, provider: "MockProvider", writes: tuple[bytes, ...], interval_seconds: float) -> None:
        self._provider = provider
        self._writes = writes
        self._index = 1
        self.interval_seconds = interval_seconds
        self.due_seconds = 0.0

    def write_next(self) -> bool:
        """Write one event; False when it was the last one or the caller has gone."""
        transport = self._provider.transport
        if transport is None:
            return False
        transport.write(self._writes[self._index])
        self._index += 1
        if self._index < len(self._writes):
            return True
        self._provider.is_streaming = False
        return False


class MockProvider(asyncio.Protocol):
    """One connection. Requests are answered in order; one that arrives during a paced stream closes the connection."""

    def __init__(self, wheel: TimerWheel) -> None:
        self._wheel = wheel
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self.transport: asyncio.Transport | None = None
        self.is_streaming = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the name is asyncio's
        self.transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._close(error_answer(400, "Not an HTTP/1.1 request."))

    def on_url(self, url: bytes) -> None:
        self._url = url
        self._body = b""

    def on_body(self, part: bytes) -> None:
        self._body = self._body + part if self._body else part
        if len(self._body) > BODY_BYTES_MAX:
            self._close(error_answer(400, "The body is too large."))

    def on_message_complete(self) -> None:
        if self.transport is None:
            return
        if self.is_streaming:
            self._close(b"")
            return
        try:
            self._answer()
        except msgspec.DecodeError as error:  # also what a body of the wrong shape raises
            self.transport.write(error_answer(400, str(error)))
        if not self._parser.should_keep_alive() and not self.is_streaming:
            self._close(b"")

    def _answer(self) -> None:
        if self._url.endswith(b"/chat/completions"):
            self._answer_chat(_decode_chat(self._body))
        elif self._url.endswith(b"/embeddings"):
            request = _decode_embeddings(self._body)
            inputs = len(request.input) if isinstance(request.input, list) else 1
            self.transport.write(embeddings_answer(request.model, inputs, request.encoding_format))
        elif self._url.endswith(b"/models"):
            self.transport.write(models_answer())
        else:
            self.transport.write(error_answer(404, "No such path."))

    def _answer_chat(self, request: _ChatRequest) -> None:
        if not request.stream:
            self.transport.write(completion_answer(request.model))
            return
        options = request.stream_options
        writes = stream_writes(request.model, with_usage=options is not None and options.include_usage)
        self.transport.write(writes[0])
        script = script_of(request.model)
        if script is not None and script.is_cut:
            self._close(b"")
        elif len(writes) > 1:
            self.is_streaming = True
            self._wheel.start(_PacedStream(self, writes, 1.0 / script.events_per_second))

    def _close(self, last_words: bytes) -> None:
        if self.transport is not None:
            self.transport.write(last_words)
            self.transport.close()


async def listen(port: int) -> asyncio.Server:
    """Open the mock on loopback; port 0 takes a free one."""
    loop = asyncio.get_running_loop()
    wheel = TimerWheel(loop)
    return await loop.create_server(lambda: MockProvider(wheel), "127.0.0.1", port, backlog=4096)


async def _serve(port: int) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    server = await listen(port)
    print(f"ready {server.sockets[0].getsockname()[1]}", flush=True)
    await stopped.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--core", type=int, help="the CPU core to stay on")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    gc.freeze()
    gc.disable()  # nothing here makes cycles per request, and a collection would show as a slow provider
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(arguments.port))


if __name__ == "__main__":
    main()
