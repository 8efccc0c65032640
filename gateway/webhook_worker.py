"""The process that delivers webhooks. `python -m gateway.webhook_worker`."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import timedelta
from typing import Final

import structlog
import uvloop

from core.clock import SystemClock
from core.egress import Guard
from core.http import GuardedClient
from core.http1.connections import ConnectionLimits
from core.sealing import Sealer
from core.settings import Settings, load
from core.telemetry import configure_logs
from gateway import descriptors, lifeline
from gateway.egress_file import EgressFile
from gateway.webhook_metrics import WebhookMetrics
from keys.secrets import redact
from webhooks.attempts import Sender
from webhooks.signing import PlatformKeys
from webhooks.worker import WebhookWorker
from webhooks.worker_parts import WorkerParts

# Many endpoints may be at one host, a relay's for instance: what is under way is bounded elsewhere.
_LIMITS: Final = ConnectionLimits(connections_per_origin_max=1_024, idle_seconds_max=30.0, buffered_bytes_max=65_536)
_METRICS_SECONDS: Final = 5.0
_RELOAD_SECONDS: Final = 0.5
_log = structlog.get_logger(__name__)


class WorkerBroken(Exception):
    """A part of the worker has ended by itself."""


async def deliver(settings: Settings) -> None:
    """Deliver until SIGTERM or SIGINT. A store down: tried again by itself. Errors: WorkerBroken."""
    assert settings.database_url is not None
    descriptors.raise_limit()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    lifeline.watch(stop)
    egress = EgressFile(settings.config_path)
    client = GuardedClient(Guard(egress.policy), _LIMITS)
    clock = SystemClock()
    worker = WebhookWorker(
        settings.database_url,
        WorkerParts(
            Sender(client, PlatformKeys(settings.webhook_signing_keys), clock),
            Sealer(settings.sealing_keys),
            egress.policy,
            clock,
        ),
        retention=timedelta(days=settings.webhook_retention_days),
    )
    metrics = WebhookMetrics(settings.data_dir / "metrics", worker.stats, clock)
    acts = (worker.run(), egress.keep_reading(_RELOAD_SECONDS), metrics.keep_saving(_METRICS_SECONDS))
    tasks = [asyncio.create_task(act) for act in acts]
    _log.info("webhooks.started")
    for task in tasks:
        # None ends before it is told to, but for a fault of ours.
        task.add_done_callback(lambda _: stop.set())
    await stop.wait()
    broken = [task for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    metrics.save()
    await client.close()
    if broken:
        # Half of it working is worse than none: the supervisor starts the whole again.
        raise WorkerBroken from broken[0].exception()
    _log.info("webhooks.stopped")


if __name__ == "__main__":
    _settings = load(os.environ)
    configure_logs(_settings.log, redact)
    uvloop.run(deliver(_settings))
