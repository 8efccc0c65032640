"""Redis for everything that is not on the hot path, and the choice between one server and a cluster."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence, Sized
from typing import Any, Final, Protocol, cast

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisClusterException, RedisError

from core.resp import UNDELIVERED_MAX, RedisUnavailable, Reply, Script, ScriptCall, ScriptConnection

CLUSTER_PREFIX = ("redis+cluster://", "rediss+cluster://")


class Scripts(Protocol):
    """Runs Lua scripts, those of one event-loop tick together. Down: RedisUnavailable at once."""

    @property
    def is_up(self) -> bool:
        """Whether calls are being sent."""
        ...

    async def start(self) -> None:
        """Connect, and keep connected."""
        ...

    async def close(self) -> None:
        """Stop."""
        ...

    def run(self, call: ScriptCall) -> asyncio.Future[Reply]:
        """Send *call*; the future fails with RedisUnavailable after the deadline."""
        ...

    def deliver(self, call: ScriptCall) -> None:
        """Send *call*, and again later if its answer never came. For scripts that may run twice."""
        ...

    @property
    def undelivered(self) -> Sized:
        """What waits to be sent again."""
        ...


def connect(url: str) -> Redis:
    """Return a redis-py client for *url*: one server, or (`redis+cluster://`) any node of a cluster."""
    if url.startswith(CLUSTER_PREFIX):
        cluster = RedisCluster.from_url(url.replace("+cluster", "", 1), socket_timeout=1, socket_connect_timeout=1)
        return cast("Redis", cluster)
    return cast("Any", Redis).from_url(url, socket_timeout=2, socket_connect_timeout=1)


def scripts_for(url: str, scripts: Sequence[Script], *, deadline_seconds: float = 0.05) -> Scripts:
    """Return a runner of *scripts* that fits *url*."""
    if url.startswith(CLUSTER_PREFIX):
        return ClusterScripts(url, deadline_seconds=deadline_seconds)
    return ScriptConnection(url, scripts, deadline_seconds=deadline_seconds)


_LOOK_SECONDS: Final = 0.5
_REDELIVERED_AT_ONCE: Final = 100
# What redis-py raises of a cluster whose nodes are all gone is no RedisError.
_FAILURES: Final = (RedisError, RedisClusterException, OSError, TimeoutError)


class ClusterScripts:
    """Runs scripts on a Redis Cluster through redis-py, which knows where each hash tag lives.

    When the cluster is down: calls fail after the deadline; after a failure, at once until a probe has an answer.
    """

    def __init__(self, url: str, *, deadline_seconds: float) -> None:
        self._client: Any = RedisCluster.from_url(
            url.replace("+cluster", "", 1), socket_timeout=deadline_seconds, socket_connect_timeout=1
        )
        self._deadline_seconds = deadline_seconds
        self._waiting: list[tuple[ScriptCall, asyncio.Future[Reply] | None]] = []
        self._loop = asyncio.get_running_loop()
        self._runner: asyncio.Task[None] | None = None
        self._is_up = False
        self.undelivered: deque[ScriptCall] = deque(maxlen=UNDELIVERED_MAX)
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether calls are being sent."""
        return self._is_up

    async def start(self) -> None:
        """Find the cluster's nodes; keep looking when it is down."""
        await self._look()
        self._probe = self._loop.create_task(self._keep_looking())

    async def close(self) -> None:
        """Close every connection."""
        if self._probe is not None:
            self._probe.cancel()
        if self._runner is not None:
            await asyncio.gather(self._runner, return_exceptions=True)
        await self._client.aclose()

    def run(self, call: ScriptCall) -> asyncio.Future[Reply]:
        """Send *call* with this tick's others."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._enqueue(call, future)
        return future

    def deliver(self, call: ScriptCall) -> None:
        """Send *call*, and again when the cluster is back if its answer never came."""
        try:
            self._enqueue(call, None)
        except RedisUnavailable:
            self.undelivered.append(call)

    def _enqueue(self, call: ScriptCall, future: asyncio.Future[Reply] | None) -> None:
        if not self._is_up:
            raise RedisUnavailable("Redis is down")
        self._waiting.append((call, future))
        if self._runner is None:
            self._runner = self._loop.create_task(self._run_all())

    async def _run_all(self) -> None:
        """Run what waits, a batch after the other: two at once could overtake each other, a call its settlement."""
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._run_batch(batch)
        finally:
            self._runner = None

    async def _run_batch(self, batch: list[tuple[ScriptCall, asyncio.Future[Reply] | None]]) -> None:
        # EVAL, not EVALSHA: a pipeline cannot resend the one call whose node has not seen the script yet.
        pipeline = self._client.pipeline()
        for call, _ in batch:
            shape = call.shape
            keys = (*call.keys, *shape.keys)
            pipeline.eval(shape.script.source, len(keys), *keys, *call.arguments, *shape.fixed)
        try:
            async with asyncio.timeout(self._deadline_seconds):
                answers: list[Any] = await pipeline.execute(raise_on_error=False)
        except _FAILURES:
            self._is_up = False
            answers = [RedisUnavailable("the Redis cluster did not answer in time")] * len(batch)
        for (call, future), answer in zip(batch, answers, strict=True):
            if future is None and isinstance(answer, Exception):
                self.undelivered.append(call)
            _resolve(future, answer)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if not self._is_up:
                await self._look()
            # A few at a time: all at once would take longer than any call may, and count as an outage again.
            for _ in range(min(len(self.undelivered), _REDELIVERED_AT_ONCE)):
                self.deliver(self.undelivered.popleft())

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(2):
                await self._client.ping()
        except _FAILURES:
            self._is_up = False
        else:
            self._is_up = True


def _resolve(future: asyncio.Future[Reply] | None, answer: object) -> None:
    if future is None or future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(RedisUnavailable(str(answer)))
    else:
        future.set_result(cast("Reply", answer))
