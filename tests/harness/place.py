"""A gateway, and what its ledger holds of one organization."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from core.database import Database
from core.ids import OrganizationId
from core.money import NanoUsd
from core.writer import Writer
from keys.dimensions import BudgetScope
from keys.revocation import KeyChange, announce
from metering.budgets import set_budget
from metering.prices import add_price
from metering.rating import PriceTerms, Rates, Step
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway, config_for
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant


class Place:
    """A running gateway whose stores can be looked into."""

    def __init__(self, gateway: Gateway, database: Database, redis: Redis, writer: Writer) -> None:
        self.gateway, self.database, self.redis, self._writer = gateway, database, redis, writer

    @property
    def port(self) -> int:
        return self.gateway.port

    async def entry(self, tenant: Tenant) -> dict[str, Any]:
        """The organization's one entry, once it is there."""
        rows = await eventually(lambda: self.entries(tenant))
        assert len(rows) == 1
        return rows[0]

    async def entries(self, tenant: Tenant) -> list[dict[str, Any]]:
        rows = await self._writer.fetch(
            "SELECT * FROM ledger_entries WHERE organization_id = $1 ORDER BY request_id", tenant.organization_id
        )
        return [dict(row) for row in rows]

    async def intents(self, tenant: Tenant) -> int:
        statement = "SELECT count(*) FROM usage_intents WHERE organization_id = $1"
        return (await self._writer.fetch(statement, tenant.organization_id))[0][0]

    async def set_budget(self, tenant: Tenant, limit: int, scope: BudgetScope = "key", *, is_hard: bool = True) -> None:
        target = {"key": tenant.key_id, "project": tenant.project_id, "organization": tenant.organization_id}[scope]
        async with self.database.transaction() as session:
            sequence = await set_budget(
                session,
                (scope, target),
                "month",
                limit=NanoUsd(limit),
                is_hard=is_hard,
                organization_id=tenant.organization_id,
            )
        await announce(self.redis, KeyChange(sequence=sequence, organization_id=tenant.organization_id, key_id=None))

    async def set_own_price(self, tenant: Tenant, model: str, rates: Rates) -> None:
        """What the organization pays, from now on; the gateway knows within seconds."""
        terms = PriceTerms(tiers={"default": (Step(rates=rates),)})
        async with self.database.transaction() as session:
            await add_price(session, model, terms, organization_id=OrganizationId(tenant.organization_id))


@asynccontextmanager
async def open_place(
    stores: TestStores, base_url: str, directory: Path, prices: Mapping[str, PriceTerms | None], more: str = ""
) -> AsyncIterator[Place]:
    """A gateway in front of the provider at *base_url*, with these models at these prices, and *more* of aap.toml."""
    database = Database(stores.database_url)
    redis = Redis.from_url(stores.redis_url)
    writer = Writer(stores.database_url, statement_seconds_max=10)
    async with database.transaction() as session:
        for model, terms in prices.items():
            if terms is not None:
                await add_price(session, model, terms)
    async with Gateway(stores, directory, config_for(base_url, models=tuple(prices), more=more)) as gateway:
        yield Place(gateway, database, redis, writer)
    await writer.close()
    await redis.aclose()
    await database.close()
