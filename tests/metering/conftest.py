"""A database whose ledger a module's tests write to, and calls to write."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import NamedTuple

import pytest

from core.clock import SystemClock
from core.database import Database
from core.ids import GatewayId, id_range_start, new_id
from core.writer import Writer
from metering import partitions
from metering.entries import Attribution, Entry, Intent, Result
from metering.ledger import Ledger
from metering.usage import Units
from tests.harness.stores import TestStores, new_database
from tests.harness.tenant import Tenant, new_tenant


class Books:
    """One organization's calls, as a gateway would enter them."""

    def __init__(self, writer: Writer, tenant: Tenant, price_id: str | None = None) -> None:
        self.run = writer.fetch
        self.tenant = tenant
        self.price_id = price_id

    def attribution(self, model: str = "m") -> Attribution:
        tenant = self.tenant
        return Attribution(
            tenant.organization_id,
            tenant.project_id,
            tenant.key_id,
            "ksec_1",
            model,
            f"p/{model}",
            "chat",
            self.price_id,
            self.price_id,
        )

    def intent(self, request_id: str | None = None, *, prompt: int = 10, reserved: int = 0) -> Intent:
        return Intent(request_id or new_id("req"), self.attribution(), prompt, reserved, now_ms())

    def entry(
        self,
        request_id: str | None = None,
        *,
        units: Units | None = None,
        cost: int = 100,
        charge: int | None = None,
        started_ms: int | None = None,
        model: str = "m",
        outcome: str = "done",
    ) -> Entry:
        result = Result("usage", 0, "default", "exact", is_unpriced=False, requests=1, status=200, outcome=outcome)
        return Entry(
            request_id or new_id("req"),
            self.attribution(model),
            result,
            units or Units(input_tokens=10, output_tokens=20),
            cost,
            cost if charge is None else charge,
            now_ms() if started_ms is None else started_ms,
            5,
            3,
        )

    async def entries(self) -> list[dict[str, object]]:
        rows = await self.run(
            "SELECT * FROM ledger_entries WHERE organization_id = $1 ORDER BY request_id, kind DESC, seq",
            self.tenant.organization_id,
        )
        return [dict(row) for row in rows]

    async def windows(self, seconds: int = 3600) -> list[dict[str, object]]:
        rows = await self.run(
            "SELECT * FROM spend_windows WHERE organization_id = $1 AND seconds = $2 ORDER BY starts_at, model",
            self.tenant.organization_id,
            seconds,
        )
        return [dict(row) for row in rows]

    async def intents(self) -> list[dict[str, object]]:
        rows = await self.run(
            "SELECT * FROM usage_intents WHERE organization_id = $1 ORDER BY request_id", self.tenant.organization_id
        )
        return [dict(row) for row in rows]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture(scope="session")
async def writer(stores: TestStores) -> AsyncIterator[Writer]:
    made = Writer(stores.database_url, statement_seconds_max=30)
    await partitions.make_ahead(made.fetch, SystemClock().now())
    yield made
    await made.close()


@pytest.fixture
async def books(writer: Writer, database: Database, stores: TestStores) -> Books:
    return Books(writer, await new_tenant(database, stores.pepper))


@pytest.fixture
async def ledger(stores: TestStores) -> AsyncIterator[Ledger]:
    made = Ledger(stores.database_url, GatewayId(new_id("gw")), SystemClock(), observed=lambda: ([], []))
    await made.start()
    yield made
    await made.close()


class OwnBooks(NamedTuple):
    """The books of an installation that nobody else writes to."""

    url: str
    database: Database
    writer: Writer
    books: Books


@pytest.fixture
async def own(stores: TestStores, template: str) -> AsyncIterator[OwnBooks]:
    async with new_database(stores.database_url, f"{template}_copy", template) as url:
        database, writer = Database(url), Writer(url, statement_seconds_max=30)
        await partitions.make_ahead(writer.fetch, SystemClock().now())
        yield OwnBooks(url, database, writer, Books(writer, await new_tenant(database, stores.pepper)))
        await writer.close()
        await database.close()


def request_id_at(moment: datetime) -> str:
    """A request id that was made at *moment*, unlike any other."""
    return id_range_start("req", moment) + new_id("req")[-16:]
