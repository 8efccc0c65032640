"""One API process: the application on our own server, until it is told to stop. `python -m gateway.server`.

Several processes share the port (SO_REUSEPORT); the kernel spreads connections over them.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from typing import Final

import structlog
import uvloop

from core.log_writer import LogWriter
from core.settings import Settings, load
from core.telemetry import configure_logs
from gateway import descriptors, lifeline
from gateway.app import Application
from gateway.http1.listener import Listener
from gateway.runtime import Runtime, running
from keys.secrets import redact

_INTERRUPTED_SECONDS_MAX: Final = 5.0
_log = structlog.get_logger(__name__)


async def serve(settings: Settings, log: LogWriter) -> None:
    """Serve until SIGTERM or SIGINT, then drain: take nothing new, finish what runs, cut what takes too long."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    lifeline.watch(stop)
    async with running(settings, log) as runtime:
        listener = runtime.listener = Listener(Application(runtime).dispatch, settings.edge)
        _relax_garbage_collection()
        descriptors.raise_limit()
        await listener.start()
        _tell_supervisor()
        await stop.wait()
        await _drain(runtime, listener)


async def _drain(runtime: Runtime, listener: Listener) -> None:
    settings = runtime.settings.edge
    _log.info("gateway.draining", running=runtime.admission.running)
    runtime.is_stopping = True
    if settings.drain_notice_seconds:
        await asyncio.sleep(settings.drain_notice_seconds)
    runtime.admission.stop()
    listener.stop_accepting()
    is_idle = await listener.wait_idle(settings.drain_seconds)
    if not is_idle:
        _log.warning("gateway.interrupting", running=runtime.admission.running)
        runtime.live.interrupt_all()
        await listener.wait_idle(_INTERRUPTED_SECONDS_MAX)
    # Calls whose callers are gone may still be read to their end, for what they cost.
    if not await runtime.admission.wait_idle(_INTERRUPTED_SECONDS_MAX):
        runtime.live.interrupt_all()
        await runtime.admission.wait_idle(_INTERRUPTED_SECONDS_MAX)
    await listener.close()
    _log.info("gateway.stopped", was_idle=is_idle)


def _relax_garbage_collection() -> None:
    """Leave what was made at the start out of every collection, and collect less often.

    A call leaves few cycles behind; with Python's thresholds the collector took a tenth of the CPU of a call (bench).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _tell_supervisor() -> None:
    """Say on the inherited descriptor that the port is open."""
    descriptor = os.environ.get("AAP_READY_FD")
    if descriptor is not None:
        os.write(int(descriptor), b"1")
        os.close(int(descriptor))


if __name__ == "__main__":
    _settings = load(os.environ)
    _log_writer = LogWriter(2)
    configure_logs(_settings.log, redact, _log_writer)
    try:
        uvloop.run(serve(_settings, _log_writer))
    finally:
        _log_writer.close()
