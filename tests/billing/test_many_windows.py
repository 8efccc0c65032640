"""Many windows at once, at the rate of a Stripe sandbox. 100,000 of them with AAP_TEST_SCALE=full."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import psutil
import pytest
from sqlalchemy import text

from core.clock import SystemClock
from core.database import Database
from core.settings import StripeSettings
from metering.billing.export import Exported, Exporter
from metering.billing.stripe_api import StripeApi
from tests.harness.billing import empty
from tests.harness.eventually import eventually

_IS_FULL = os.environ.get("AAP_TEST_SCALE") == "full"
_ORGANIZATIONS = 400 if _IS_FULL else 20
_HOURS = 250 if _IS_FULL else 100
_SANDBOX_REQUESTS_PER_SECOND = 25
_GROWTH_BYTES_MAX = 64 * 1024 * 1024
_FILL = """
WITH made AS (
  INSERT INTO organizations (id, name) SELECT 'org_many' || n, 'Many' FROM generate_series(1, :organizations) AS n
  ON CONFLICT DO NOTHING
), customers AS (
  INSERT INTO billing_customers (organization_id, stripe_customer_id)
  SELECT 'org_many' || n, (CAST(:customers AS text[]))[n] FROM generate_series(1, :organizations) AS n
), periods AS (
  INSERT INTO billing_periods (subscription_id, starts_at, ends_at, organization_id, is_metered)
  SELECT 'sub_many' || n, :since, CAST(:since AS timestamptz) + interval '31 days', 'org_many' || n, true
  FROM generate_series(1, :organizations) AS n
), cursors AS (
  INSERT INTO meter_cursors (organization_id, meter)
  SELECT 'org_many' || n, 'usage_micro_usd_v1' FROM generate_series(1, :organizations) AS n
)
INSERT INTO spend_windows (organization_id, seconds, starts_at, project_id, key_id, model, operation, service_tier,
  requests, unpriced_requests, cost_nano_usd, charge_nano_usd)
SELECT 'org_many' || n, 3600, CAST(:since AS timestamptz) + hour * interval '1 hour', 'proj_1', 'key_1', 'm', 'chat',
  'default', 1, 0, 1000 * (n + hour), 1000 * (n + hour)
FROM generate_series(1, :organizations) AS n, generate_series(0, :hours - 1) AS hour
"""


@pytest.fixture
async def filled(books: Database) -> AsyncGenerator[Database]:
    await empty(books)
    yield books
    await empty(books)


@asynccontextmanager
async def _twin(port: int) -> AsyncGenerator[str]:
    """A twin in a process of its own: what it remembers is not the exporter's memory."""
    options = ("--port", str(port), "--requests-per-second", str(_SANDBOX_REQUESTS_PER_SECOND))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "metering.billing.twin", *options, stdout=asyncio.subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient() as client:
            await eventually(lambda: _answers(client, f"{url}/_twin/journal"), 20)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).is_success
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("is_streamed", [True, False], ids=["streamed", "one by one"])
async def test_many_windows_are_reported_at_a_sandboxs_rate(
    filled: Database, is_streamed: bool, unused_tcp_port: int, record_property: Callable[[str, object], None]
) -> None:
    """Guarantee: every window once, in bounded memory, and whoever waits sees how far it is."""
    organizations, hours = (_ORGANIZATIONS, _HOURS) if is_streamed else (5, 20)
    since = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours + 1)
    async with _twin(unused_tcp_port) as url:
        settings = StripeSettings(
            api_key="sk_test_twin",
            webhook_secrets=(),
            url=url,
            requests_per_second=_SANDBOX_REQUESTS_PER_SECOND - 2,
            stream_above=0 if is_streamed else 10**6,
            test_clock=None,
        )
        api = StripeApi(settings, SystemClock())
        try:
            customers = await _customers(api, url, organizations)
            async with filled.transaction() as session:
                values = {"organizations": organizations, "hours": hours, "since": since, "customers": customers}
                await session.execute(text(_FILL), values)
            seen: list[Exported] = []
            before = psutil.Process().memory_info().rss
            started = time.monotonic()
            exporter = Exporter(filled, api, SystemClock(), stream_above=settings.stream_above)
            done = await exporter.round(lambda now: seen.append(msgspec.structs.replace(now)))
            record_property("reports_per_second", done.acked / (time.monotonic() - started))
            assert (done.problem, done.acked, done.refused) == (None, organizations * hours, 0)
            assert psutil.Process().memory_info().rss - before < _GROWTH_BYTES_MAX
            assert [one.acked for one in seen] == sorted(one.acked for one in seen)
            assert len(seen) > 1 or not is_streamed
            await _compare(api, customers, hours, since)
        finally:
            await api.close()


async def _customers(api: StripeApi, url: str, count: int) -> list[str]:
    """Customers and the meter, made at the same rate."""
    await api.add_to_catalog(
        "meters",
        {"display_name": "u", "event_name": "usage_micro_usd_v1", "default_aggregation": {"formula": "sum"}},
        idempotency_key="meter",
    )
    return [await api.create_customer(f"org_many{n}", "Many", email=None, test_clock=None) for n in range(1, count + 1)]


async def _compare(api: StripeApi, customers: list[str], hours: int, since: datetime) -> None:
    """The first and the last customer have at Stripe what the ledger has, hour by hour."""
    (meter,) = await api.list_catalog("meters")
    for number in (1, len(customers)):
        sums = await api.hourly_sums(meter["id"], customers[number - 1], since, since + timedelta(hours=hours + 1))
        expected = {since + timedelta(hours=hour): number + hour for hour in range(hours)}
        assert sums == expected
