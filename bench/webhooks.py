"""`make bench-webhooks`: how fast webhooks are delivered, and what hostile endpoints cost the others.

One worker, PostgreSQL and the receivers on this machine. First a backlog: deliveries a second. Then rounds at a steady
pace, in turns without and with two hostile endpoints in the same organizations, one that never answers and one that
answers a byte a second: how long after its event a first attempt arrives, in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import msgspec
import uvloop
from rich.console import Console

from core import embedded
from core.database import Database
from core.egress import EgressPolicy
from core.ids import OrganizationId, new_id
from core.migrations import upgrade
from core.plain_sql import fetch
from core.sealing import Sealer
from core.settings import load
from keys.tenants import create_organization
from webhooks.endpoints import NewEndpoint, create_endpoint, disable_endpoint, enable_endpoint
from webhooks.events import EXAMPLES, KeyCreated

ORGANIZATIONS: Final = 10
ENDPOINTS_EACH: Final = 2
_POLICY: Final = EgressPolicy(allow=("127.0.0.0/8",), ports="any", plain_http=True)
_CONFIG: Final = '[egress]\nallow = ["127.0.0.0/8"]\nports = "any"\nplain_http = true\n'
_OK: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
_LENGTH: Final = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_PUBLISH: Final = """
WITH made AS (
  INSERT INTO webhook_events (id, organization_id, type, data)
  SELECT id, organization_id, $3, $4::text::json FROM unnest($1::text[], $2::text[]) AS m (id, organization_id)
)
SELECT pg_notify('aap_webhooks', '')
"""
_BACKLOG_EVENTS: Final = 500


class Receiver:
    """What has arrived at the endpoints that are well."""

    def __init__(self) -> None:
        self.count = 0
        self.delays_seconds: list[float] = []
        self.times_delays = False
        self.port = 0
        self._wanted = 0
        self._reached = asyncio.Event()

    async def listen(self) -> None:
        """Take connections from now on."""
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def reach(self, count: int) -> None:
        """Return when *count* webhooks have arrived since the start."""
        self._wanted = count
        self._reached.clear()
        if self.count < count:
            await self._reached.wait()

    def take(self, body: bytes) -> None:
        """Count a webhook, and how long ago its event was."""
        self.count += 1
        if self.count >= self._wanted:
            self._reached.set()
        if self.times_delays:
            told = datetime.fromisoformat(msgspec.json.decode(body)["timestamp"])
            self.delays_seconds.append(time.time() - told.timestamp())


class _Connection(asyncio.Protocol):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._unread = b""
        self._drip: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self._drip is not None:
            self._drip.cancel()

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while (end := self._unread.find(b"\r\n\r\n")) >= 0:
            head = self._unread[:end]
            length = _LENGTH.search(head)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._unread) < whole:
                return
            body, self._unread = self._unread[end + 4 : whole], self._unread[whole:]
            path = head.split(b" ", 2)[1]
            if path == b"/hole":
                continue
            if path == b"/drip":
                self._drip = asyncio.get_running_loop().create_task(self._drip_bytes())
                continue
            self._receiver.take(body)
            self._transport.write(_OK)

    async def _drip_bytes(self) -> None:
        for byte in _OK:
            self._transport.write(bytes([byte]))
            await asyncio.sleep(1)


class Place(NamedTuple):
    """Who sends to whom."""

    database: Database
    sealer: Sealer
    receiver: Receiver
    organizations: Sequence[OrganizationId]
    hostile: Sequence[tuple[OrganizationId, str]]


async def build(database: Database, sealer: Sealer, receiver: Receiver) -> Place:
    """Make organizations with endpoints, and two hostile ones, which are disabled as yet."""
    organizations: list[OrganizationId] = []
    hostile: list[tuple[OrganizationId, str]] = []
    base = f"http://127.0.0.1:{receiver.port}"
    async with database.transaction() as session:
        for number in range(ORGANIZATIONS):
            made = await create_organization(session, f"bench {number}")
            organizations.append(made.id)
            paths = [f"/{number}/{one}" for one in range(ENDPOINTS_EACH)]
            paths += {0: ["/hole"], 1: ["/drip"]}.get(number, [])
            for path in paths:
                new = NewEndpoint(url=f"{base}{path}")
                view, _ = await create_endpoint(session, new, _POLICY, sealer, organization_id=made.id)
                if path in {"/hole", "/drip"}:
                    hostile.append((made.id, view.id))
                    await disable_endpoint(session, view.id, sealer, organization_id=made.id)
    return Place(database, sealer, receiver, organizations, hostile)


async def publish(place: Place, count: int, start: int = 0) -> None:
    """Publish *count* events, the organizations in turns."""
    owners = [place.organizations[(start + number) % ORGANIZATIONS] for number in range(count)]
    ids = [new_id("evt") for _ in owners]
    data = msgspec.json.encode(EXAMPLES[KeyCreated.type]).decode()
    async with place.database.transaction() as session:
        await fetch(session, _PUBLISH, ids, owners, KeyCreated.type, data)


async def backlog(place: Place, events: int) -> float:
    """Return deliveries a second, of *events* that were there at once."""
    receiver = place.receiver
    expected = receiver.count + events * ENDPOINTS_EACH
    started = time.monotonic()
    for start in range(0, events, _BACKLOG_EVENTS):
        await publish(place, _BACKLOG_EVENTS, start)
    await receiver.reach(expected)
    return events * ENDPOINTS_EACH / (time.monotonic() - started)


async def paced(place: Place, per_second: int, seconds: float) -> list[float]:
    """Return the delays of deliveries, of events that come *per_second* deliveries' worth."""
    receiver = place.receiver
    receiver.delays_seconds, receiver.times_delays = [], True
    batch = max(per_second // ENDPOINTS_EACH // 20, 1)
    started = time.monotonic()
    for turn in range(int(seconds * 20)):
        await publish(place, batch, turn * batch)
        await asyncio.sleep(max(0.0, started + (turn + 1) / 20 - time.monotonic()))
    await asyncio.sleep(1)
    receiver.times_delays = False
    return sorted(receiver.delays_seconds)


async def set_hostile(place: Place, *, is_on: bool) -> None:
    """Let the hostile endpoints be sent to, as if nothing were known of them, or not."""
    async with place.database.transaction() as session:
        for organization_id, endpoint_id in place.hostile:
            act = enable_endpoint if is_on else disable_endpoint
            await act(session, endpoint_id, place.sealer, organization_id=organization_id)
    await asyncio.sleep(1.5)


async def run(stores: embedded.Stores, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Measure; return the figures."""
    database = Database(stores.database_url)
    await upgrade(database)
    receiver = Receiver()
    await receiver.listen()
    place = await build(database, Sealer(stores.sealing_keys), receiver)
    environment = {**os.environ, **_environment(stores, directory)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway.webhook_worker", env=environment, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        await publish(place, ORGANIZATIONS)
        await receiver.reach(ORGANIZATIONS * ENDPOINTS_EACH)
        throughput = await backlog(place, arguments.events)
        await paced(place, arguments.rate, 1)
        quiet: list[list[float]] = []
        hurt: list[list[float]] = []
        for _ in range(arguments.rounds):
            quiet.append(await paced(place, arguments.rate, arguments.seconds))
            await set_hostile(place, is_on=True)
            hurt.append(await paced(place, arguments.rate, arguments.seconds))
            await set_hostile(place, is_on=False)
    finally:
        process.terminate()
        await process.wait()
        await database.close()
    return _figures(throughput, quiet, hurt)


def _figures(throughput: float, quiet: list[list[float]], hurt: list[list[float]]) -> dict[str, Any]:
    p99_quiet, p99_hurt = [_quantile(one, 0.99) for one in quiet], [_quantile(one, 0.99) for one in hurt]
    return {
        "deliveries_per_second": round(throughput),
        "first_attempt_p50_ms": round(statistics.median(_quantile(one, 0.5) for one in quiet) * 1000, 1),
        "first_attempt_p99_ms": round(statistics.median(p99_quiet) * 1000, 1),
        "first_attempt_p99_ms_beside_hostile": round(statistics.median(p99_hurt) * 1000, 1),
        "p99_ratio": round(statistics.median(p99_hurt) / statistics.median(p99_quiet), 3),
        "p99_ms_rounds": [round(one * 1000, 1) for one in p99_quiet],
        "p99_ms_rounds_beside_hostile": [round(one * 1000, 1) for one in p99_hurt],
        "deliveries_timed": sum(map(len, [*quiet, *hurt])),
    }


def _quantile(values: list[float], part: float) -> float:
    return values[int(len(values) * part)]


def _environment(stores: embedded.Stores, directory: Path) -> dict[str, str]:
    config = directory / "bench.toml"
    config.write_text(_CONFIG)
    return {
        "DATABASE_URL": stores.database_url,
        "REDIS_URL": stores.redis_url,
        "AAP_KEY_PEPPERS": ",".join(f"{key.id}:{key.key.hex()}" for key in stores.peppers),
        "AAP_SEALING_KEYS": ",".join(f"{key.id}:{key.key.hex()}" for key in stores.sealing_keys),
        "AAP_CONFIG": str(config),
        "AAP_DATA_DIR": str(directory),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.webhooks", description="How fast webhooks are delivered.")
    parser.add_argument("--events", type=int, default=20_000, help="In the backlog; each goes to two endpoints.")
    parser.add_argument("--rate", type=int, default=500, help="Deliveries a second in the paced rounds.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Of a paced round.")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aap-bench-") as directory:
        settings = load({"AAP_DATA_DIR": directory})
        with embedded.stores(settings) as stores:
            figures = uvloop.run(run(stores, arguments, Path(directory)))
    Console().print_json(data=figures)


if __name__ == "__main__":
    main()
