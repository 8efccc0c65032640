"""The worker process: what must be done once for all gateways, later. `python -m gateway.worker`."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import timedelta
from importlib import import_module
from typing import Final

import structlog
import uvloop
from redis.exceptions import RedisError
from sqlalchemy import text

from core.clock import SystemClock
from core.database import DOWN, Database
from core.redis import connect
from core.settings import Settings, load
from core.telemetry import configure_logs
from gateway import back_office, idempotency_claims, lifeline
from gateway.plan_file import PlanFile
from keys.quota_pruning import prune_buckets
from keys.secrets import redact
from metering.worker import MeteringStores, MeteringWorker

_PRUNE_SECONDS: Final = 3_600.0
_RETRY_SECONDS: Final = 30.0
# A gateway reads changes every two seconds; a week leaves room for looking into what happened.
_CHANGES_KEPT: Final = timedelta(days=7)
_log = structlog.get_logger(__name__)


async def work(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT. A store down: tried again half a minute later."""
    assert settings.database_url is not None
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    lifeline.watch(stop)
    assert settings.redis_url is not None
    database = Database(settings.database_url, connections_max=3)
    redis = connect(settings.redis_url)
    metering = MeteringWorker(
        MeteringStores(settings.database_url, database, redis),
        settings.ledger,
        SystemClock(),
        plans=PlanFile(settings.config_path).plans,
    )
    tasks = [asyncio.create_task(metering.run()), asyncio.create_task(back_office.run(settings))]
    if settings.stripe.api_key is not None:
        run_billing = import_module("gateway.billing_worker").run
        tasks.append(asyncio.create_task(run_billing(settings, PlanFile(settings.config_path).plans)))
    _log.info("worker.started")
    while not stop.is_set():
        pause_seconds = _PRUNE_SECONDS
        try:
            await prune_key_changes(database)
            await prune_buckets(redis)
            await idempotency_claims.prune(database)
        except (*DOWN, RedisError) as error:
            # Often a store, or a schema, that is only just coming up.
            pause_seconds = _RETRY_SECONDS
            _log.warning("worker.round_failed", error=type(error).__name__)
        try:
            async with asyncio.timeout(pause_seconds):
                await stop.wait()
        except TimeoutError:
            continue
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await redis.aclose()
    await database.close()
    _log.info("worker.stopped")


async def prune_key_changes(database: Database) -> int:
    """Delete changes that every gateway has long read; return how many."""
    statement = text("DELETE FROM key_changes WHERE changed_at < now() - CAST(:kept AS interval) RETURNING sequence")
    async with database.transaction() as session:
        return len((await session.execute(statement, {"kept": _CHANGES_KEPT})).all())


if __name__ == "__main__":
    _settings = load(os.environ)
    configure_logs(_settings.log, redact)
    uvloop.run(work(_settings))
