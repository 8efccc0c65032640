"""One API process: the application under Granian, until it is told to stop. `python -m gateway.server`.

Granian is embedded, so that the event loop, the signals and the order of stopping are ours. Several processes
share the port (SO_REUSEPORT); the kernel spreads connections over them.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from typing import Any, Final

import structlog
import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from core.log_writer import LogWriter
from core.settings import EdgeSettings, Settings, load
from core.telemetry import configure_logs
from gateway.app import create_app
from gateway.runtime import Runtime, running
from keys.secrets import redact

# hyper's read buffer, which bounds a request's head (about: it reads in steps); 100 headers are its own bound.
_HEADER_BUFFER_BYTES: Final = 64 * 1024
_INTERRUPTED_SECONDS_MAX: Final = 5.0
_log = structlog.get_logger(__name__)


async def serve(settings: Settings, log: LogWriter) -> None:
    """Serve until SIGTERM or SIGINT, then drain: take nothing new, finish what runs, cut what takes too long."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(settings, log) as runtime:
        server = _server(create_app(runtime), settings.edge)
        _relax_garbage_collection()
        serving = asyncio.create_task(server.serve())
        waiting = asyncio.create_task(stop.wait())
        telling = asyncio.create_task(_tell_supervisor(settings.edge))
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        telling.cancel()
        if serving.done():
            serving.result()
        await _drain(runtime, server, serving)


async def _drain(runtime: Runtime, server: Any, serving: asyncio.Task[None]) -> None:
    _log.info("gateway.draining", running=runtime.admission.running)
    runtime.admission.stop()
    server.stop()
    is_idle = await runtime.admission.wait_idle(runtime.settings.edge.drain_seconds)
    if not is_idle:
        _log.warning("gateway.interrupting", running=runtime.admission.running)
        runtime.live.interrupt_all()
        await runtime.admission.wait_idle(_INTERRUPTED_SECONDS_MAX)
    await asyncio.wait({serving}, timeout=_INTERRUPTED_SECONDS_MAX)
    _log.info("gateway.stopped", was_idle=is_idle)


def _server(app: Any, settings: EdgeSettings) -> Any:
    return Server(
        app,
        address=settings.host,
        port=settings.port,
        interface=Interfaces.ASGINL,
        http=HTTPModes.http1,
        websockets=False,
        backlog=2048,
        http1_settings=HTTP1Settings(
            header_read_timeout=int(settings.header_seconds_max * 1000), max_buffer_size=_HEADER_BUFFER_BYTES
        ),
        # Admission has the last word on how much runs; this only must not be lower.
        backpressure=settings.in_flight_max + settings.queued_max + 1024,
        log_level=LogLevels.error,
    )


def _relax_garbage_collection() -> None:
    """Leave what was made at the start out of every collection, and collect less often.

    A call leaves few cycles behind; with Python's thresholds the collector took a tenth of the CPU of a call (bench).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def _tell_supervisor(settings: EdgeSettings) -> None:
    """Say on the inherited descriptor that the port is open: Granian's own hook runs a moment before it is."""
    descriptor = os.environ.get("AAP_READY_FD")
    if descriptor is None:
        return
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - connected to, not bound
    while True:
        try:
            _, writer = await asyncio.open_connection(host, settings.port)
        except OSError:
            await asyncio.sleep(0.002)
            continue
        writer.close()
        os.write(int(descriptor), b"1")
        os.close(int(descriptor))
        return


if __name__ == "__main__":
    _settings = load(os.environ)
    _log_writer = LogWriter(2)
    configure_logs(_settings.log, redact, _log_writer)
    try:
        uvloop.run(serve(_settings, _log_writer))
    finally:
        _log_writer.close()
