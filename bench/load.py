"""The load generator: keeps C callers busy for D seconds, and believes no answer that it has not checked.

A process of its own: `python -m bench.load --core N` reads one LoadPlan (JSON) from stdin, prints `open` when the
measured window begins and `shut` when it ends (whoever watches the target's CPU time reads it then), and last one
LoadResult (JSON); `--result FILE` writes it there instead. In-process use: `await run_load(plan)`. It refuses every
target that is not on loopback.

The clock of a request starts when it is written; one that waits for a connection has not started. Callers are a closed
loop: the next request follows the previous answer at once. Streams are the same loop with longer answers.
"""

import argparse
import asyncio
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httptools
import msgspec
import uvloop

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
WINDOW_SECONDS_MAX = 120.0
RECONNECT_SECONDS = 0.05
BODY_KEPT_BYTES_MAX = 32 * 1024 * 1024


class TargetRefusedError(ValueError):
    """The plan names a target that is not on loopback, or a time without a bound."""


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run against one target."""

    host: str
    port: int
    path: str = "/v1/chat/completions"
    headers: dict[str, str] = {}
    body: str
    concurrency: int
    warmup_seconds: float = 0.3
    window_seconds: float = 1.0
    ramp_seconds: float = 0.0  # callers begin evenly spread over this time, before the warm-up
    is_stream: bool = False
    stream_events: int = 0  # a stream with fewer events than this has failed
    body_bytes_min: int = 200


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one run saw inside its window. Samples are whole microseconds."""

    requests: int  # answers that were complete and right
    events: int  # stream events that arrived, of unfinished streams too
    window_seconds: float
    errors: dict[str, int]  # by kind: "status 500", "connection lost", …; never counted as requests
    unanswered: int  # in flight at the end without one byte of an answer
    open_streams: int  # in flight at the end, answered, unfinished
    latency_us: list[int]
    first_byte_us: list[int]
    gap_us: list[int]


class _Run:
    """The counters of one run; they only move while the window is open."""

    def __init__(self, plan: LoadPlan) -> None:
        head = [f"POST {plan.path} HTTP/1.1", f"host: {plan.host}:{plan.port}", "content-type: application/json"]
        head += ["accept: */*", "user-agent: bench/1", f"content-length: {len(plan.body.encode())}"]
        head += [f"{name}: {value}" for name, value in plan.headers.items()]
        self.request = "\r\n".join([*head, "", ""]).encode() + plan.body.encode()
        self.plan = plan
        self.is_open = False
        self.is_over = False
        self.requests = 0
        self.events = 0
        self.errors: Counter[str] = Counter()
        self.latency_us: list[int] = []
        self.first_byte_us: list[int] = []
        self.gap_us: list[int] = []

    def count_error(self, kind: str) -> None:
        """Count one failure by its kind."""
        if self.is_open:
            self.errors[kind] += 1


class Caller(asyncio.Protocol):
    """One connection that asks, checks the answer, and asks again."""

    def __init__(self, run: _Run, on_lost: Callable[[], None]) -> None:
        self._run = run
        self._on_lost = on_lost
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._kept_bytes = 0
        self._sent_at = 0.0
        self._read_at = 0.0
        self._previous_read_at = 0.0
        self.is_waiting = False  # a request is out
        self.is_answered = False  # and its first body byte has come
        self.has_failed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the name is asyncio's
        self._transport = None
        if self.is_waiting:
            self._fail("cut off" if self.is_answered else "connection lost")
        self._on_lost()

    def _ask(self) -> None:
        if self._run.is_over:
            self._transport.close()
            return
        self._parts = []
        self._kept_bytes = 0
        self.is_waiting = True
        self.is_answered = False
        self._sent_at = time.perf_counter()
        self._transport.write(self._run.request)

    def data_received(self, data: bytes) -> None:
        self._read_at = time.perf_counter()
        run = self._run
        if run.plan.is_stream and run.is_open:
            run.events += data.count(b"data: {")
            if self.is_answered:
                run.gap_us.append(int((self._read_at - self._previous_read_at) * 1e6))
        self._previous_read_at = self._read_at
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail("not HTTP")

    def on_body(self, part: bytes) -> None:
        if not self.is_answered:
            self.is_answered = True
            if self._run.is_open and self._parser.get_status_code() == 200:
                self._run.first_byte_us.append(int((self._read_at - self._sent_at) * 1e6))
        self._parts.append(part)
        self._kept_bytes += len(part)
        if self._kept_bytes > BODY_KEPT_BYTES_MAX:
            self._fail("endless body")

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or not self.is_waiting:
            return
        self.is_waiting = False
        run = self._run
        problem = f"status {status}" if status != 200 else problem_of(run.plan, b"".join(self._parts))
        if problem:
            run.count_error(problem)
        elif run.is_open:
            run.requests += 1
            run.latency_us.append(int((self._read_at - self._sent_at) * 1e6))
        if self._transport is None or self._transport.is_closing():
            return
        if self._parser.should_keep_alive():
            self._ask()
        else:
            self._transport.close()

    def _fail(self, kind: str) -> None:
        if self.is_waiting:
            self._run.count_error(kind)
            self.is_waiting = False
        self.has_failed = True
        if self._transport is not None:
            self._transport.close()


def problem_of(plan: LoadPlan, body: bytes) -> str | None:
    """Name what is wrong with the body of a 200, or None. Fast and false is false."""
    if not plan.is_stream:
        if len(body) < plan.body_bytes_min:
            return "short body"
        return None if b'"content"' in body and b'"usage"' in body else "not a completion"
    if b"data: [DONE]" not in body[-64:]:
        return "no [DONE]"
    events = body.count(b"data: {")
    return None if events >= plan.stream_events else f"only {events} events"


async def run_load(plan: LoadPlan, announce: Callable[[str], None] = lambda _: None) -> LoadResult:
    """Load one target; ends after ramp, warm-up and window, whatever the target does.

    Errors: TargetRefusedError.
    """
    if plan.host not in LOOPBACK_HOSTS:
        raise TargetRefusedError(f"{plan.host} is not on loopback")
    if not 0 < plan.window_seconds + plan.warmup_seconds + plan.ramp_seconds <= WINDOW_SECONDS_MAX:
        raise TargetRefusedError(f"a run lasts at most {WINDOW_SECONDS_MAX} seconds")
    run = _Run(plan)
    callers: dict[int, Caller] = {}
    tasks = [asyncio.ensure_future(_keep_calling(run, callers, index)) for index in range(plan.concurrency)]
    await asyncio.sleep(plan.ramp_seconds + plan.warmup_seconds)
    announce("open")
    opened_at = time.perf_counter()
    run.is_open = True
    await asyncio.sleep(plan.window_seconds)
    run.is_open = False
    window_seconds = time.perf_counter() - opened_at
    run.is_over = True
    announce("shut")
    in_flight = [caller for caller in callers.values() if caller.is_waiting]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return LoadResult(
        requests=run.requests,
        events=run.events,
        window_seconds=window_seconds,
        errors=dict(run.errors),
        unanswered=sum(not caller.is_answered for caller in in_flight),
        open_streams=sum(caller.is_answered for caller in in_flight),
        latency_us=run.latency_us,
        first_byte_us=run.first_byte_us,
        gap_us=run.gap_us,
    )


async def _keep_calling(run: _Run, callers: dict[int, Caller], index: int) -> None:
    """Keep one caller connected until the run ends; a lost connection is replaced after a breath."""
    loop = asyncio.get_running_loop()
    plan = run.plan
    await asyncio.sleep(plan.ramp_seconds * index / plan.concurrency)
    while not run.is_over:
        lost = asyncio.Event()
        transport = caller = None
        try:
            transport, caller = await loop.create_connection(
                lambda lost=lost: Caller(run, lost.set), plan.host, plan.port
            )
            callers[index] = caller
            await lost.wait()
        except OSError:
            run.count_error("not connected")
        finally:
            if transport is not None:
                transport.abort()
        if caller is None or caller.has_failed:
            await asyncio.sleep(RECONNECT_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--core", type=int, help="the CPU core to stay on")
    parser.add_argument("--result", type=Path, help="where the LoadResult goes instead of stdout")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=LoadPlan)
    gc.disable()  # bounded in time, and a collection would show as a slow target
    result = uvloop.run(run_load(plan, announce=lambda word: print(word, flush=True)))
    if arguments.result is not None:
        arguments.result.write_bytes(msgspec.json.encode(result))
        return
    sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
