"""A gateway or a worker that dies by SIGKILL at a named point of a call's path: `python -m tests.harness.failpoints`.

The product knows nothing of it: the point's function is wrapped in this process before the product's own main runs.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import uvloop

from core.clock import SystemClock
from core.database import Database
from core.log_writer import LogWriter
from core.redis import connect
from core.settings import load
from core.telemetry import configure_logs
from gateway.live import Run
from gateway.server import serve
from inference.call import Call, Inference
from inference.upstreams.openai_http import OpenAIHttp
from keys.quota import Quota
from keys.secrets import redact
from metering import reconcile, sweeper
from metering.ledger import Ledger
from metering.worker import MeteringStores, MeteringWorker


class Point(NamedTuple):
    """A function to die in, before or after its work."""

    owner: Any
    function: str


GATEWAY = {
    "reserve": Point(Quota, "reserve"),
    "intend": Point(Ledger, "intend"),
    "write_intents": Point(Ledger, "_write_intents"),
    "connect": Point(OpenAIHttp, "open"),
    "admit": Point(Inference, "open"),
    "first_byte": Point(Run, "begin"),
    "whole_answer": Point(Run, "whole"),
    "read": Point(Call, "read"),
    "collect": Point(Call, "collect"),
    "end_stream": Point(Run, "end"),
    "settle": Point(Inference, "settle"),
    "checkpoint": Point(Ledger, "_checkpoint"),
    "write_entries": Point(Ledger, "_write_entries"),
    "charge": Point(Quota, "settle"),
}
WORKER = {
    "orphans": Point(sweeper, "_terms"),
    "sweep": Point(MeteringWorker, "sweep"),
    "reconcile": Point(reconcile, "_read_known"),
}


def arm(point: Point, side: str, countdown: int) -> None:
    """Make the process kill itself *before* or *after* the function's *countdown*-th run."""
    original = getattr(point.owner, point.function)
    left = countdown

    def die_now(at: str) -> None:
        nonlocal left
        if at == side:
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    wrapped: Callable[..., Any]
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def wrapped(*arguments: Any, **named: Any) -> Any:
            die_now("before")
            result = await original(*arguments, **named)
            die_now("after")
            return result
    else:

        @functools.wraps(original)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            die_now("before")
            result = original(*arguments, **named)
            die_now("after")
            return result

    setattr(point.owner, point.function, wrapped)


async def work_once(settings: Any) -> None:
    """Do what a worker does, once, as if every gateway's lease had run out."""
    database, redis = Database(settings.database_url, connections_max=2), connect(settings.redis_url)
    worker = MeteringWorker(
        MeteringStores(settings.database_url, database, redis),
        settings.ledger.__class__(
            lease_seconds=float(os.environ["AAP_TEST_LEASE_SECONDS"]), retention_months=0, archive_dir=settings.data_dir
        ),
        SystemClock(),
    )
    await worker.sweep()
    await worker.reconcile()
    await database.close()
    await redis.aclose()


def main() -> None:
    kind, *armed = sys.argv[1:]
    if armed:
        name, side, countdown = armed
        arm((GATEWAY if kind == "gateway" else WORKER)[name], side, int(countdown))
    settings = load(os.environ)
    if kind == "worker":
        asyncio.run(work_once(settings))
        return
    log_writer = LogWriter(2)
    configure_logs(settings.log, redact, log_writer)
    uvloop.run(serve(settings, log_writer))


if __name__ == "__main__":
    main()
