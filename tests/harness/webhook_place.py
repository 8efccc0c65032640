"""Endpoints, events and workers of a test's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import timedelta
from pathlib import Path

import msgspec

from core.clock import Clock, SystemClock
from core.database import Database
from core.egress import EgressPolicy, Guard
from core.http import GuardedClient
from core.http1.connections import ConnectionLimits
from core.ids import OrganizationId, new_id
from core.plain_sql import fetch
from core.sealing import Sealer
from core.settings import SealingKey, SigningSeed
from tests.harness.stores import TestStores
from webhooks.attempts import Sender
from webhooks.endpoints import EndpointView, NewEndpoint, create_endpoint
from webhooks.events import EXAMPLES
from webhooks.signing import PlatformKeys, secret_text
from webhooks.worker import WebhookWorker
from webhooks.worker_parts import Bounds, Pace, WorkerParts

POLICY = EgressPolicy(allow=("127.0.0.0/8",), ports="any", plain_http=True)
"""A test's receivers are on this machine."""
EGRESS = '[egress]\nallow = ["127.0.0.0/8"]\nports = "any"\nplain_http = true\n'
SEALING_KEYS = (SealingKey("test", bytes(range(32))),)
SEALER = Sealer(SEALING_KEYS)
SEED = SigningSeed(bytes(range(1, 33)))
_PUBLISH_MANY = """
WITH made AS (
  INSERT INTO webhook_events (id, organization_id, type, data)
  SELECT id, organization_id, $3, $4::text::json FROM unnest($1::text[], $2::text[]) AS m (id, organization_id)
)
SELECT pg_notify('aap_webhooks', '')
"""


async def new_endpoint(
    database: Database, url: str, organization_id: OrganizationId, **more: object
) -> tuple[EndpointView, str]:
    """An endpoint at *url*, and its secret as receivers take it."""
    async with database.transaction() as session:
        view, secret = await create_endpoint(
            session,
            msgspec.convert({"url": url, "event_types": ["*"], **more}, NewEndpoint),
            POLICY,
            SEALER,
            organization_id=organization_id,
        )
    return view, secret_text(secret)


async def publish_many(database: Database, organizations: Sequence[str], kind: str = "key.created") -> list[str]:
    """One event for each of *organizations*, which may repeat, in one transaction; return their ids."""
    ids = [new_id("evt") for _ in organizations]
    data = msgspec.json.encode(EXAMPLES[kind]).decode()
    async with database.transaction() as session:
        await fetch(session, _PUBLISH_MANY, ids, list(organizations), kind, data)
    return ids


@contextlib.asynccontextmanager
async def worker(
    url: str,
    *,
    clock: Clock | None = None,
    pace: Pace | None = None,
    policy_of: Callable[[], EgressPolicy] = lambda: POLICY,
    bounds: Bounds | None = None,
) -> AsyncGenerator[WebhookWorker]:
    """A worker in this process. *policy_of* says, at each attempt, under which policy an address is looked at."""
    clock = clock or SystemClock()
    # A test that ends has seen what it came for.
    pace = pace or Pace(drain_seconds=0.5)
    client = GuardedClient(Guard(lambda: POLICY), ConnectionLimits())
    sender = Sender(client, PlatformKeys((SEED,)), clock)
    made = WebhookWorker(
        url,
        WorkerParts(sender, SEALER, policy_of, clock),
        retention=timedelta(days=30),
        pace=pace,
        bounds=bounds,
    )
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


class WorkerProcess:
    """A worker as the product starts it."""

    def __init__(self, stores: TestStores, directory: Path) -> None:
        config = directory / "aap.toml"
        config.write_text(EGRESS)
        self._environ = {
            **os.environ,
            **stores.environ(),
            "AAP_CONFIG": str(config),
            "AAP_DATA_DIR": str(directory),
            "AAP_SEALING_KEYS": f"test:{SEALING_KEYS[0].key.hex()}",
        }
        self._log = directory / "worker.log"
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway.webhook_worker", env=self._environ, stdout=log, stderr=log
            )

    async def kill(self) -> None:
        """End it at once."""
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        """End it in order; return its exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text()
