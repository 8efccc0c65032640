"""A gateway, and what its ledger holds of one organization."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis

from core.database import Database
from core.money import NanoUsd
from keys.dimensions import BudgetScope
from keys.revocation import KeyChange, announce
from metering.budgets import set_budget
from metering.writer import Writer
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway
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
