"""A database of a test's own, empty and with the schema: workers take whatever is due in theirs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from core.database import Database
from core.ids import OrganizationId
from tests.harness.stores import TestStores, new_database
from tests.harness.tenant import new_tenant
from tests.harness.webhook_sink import Sink, sink


class Own(NamedTuple):
    """A database, and an organization in it."""

    stores: TestStores
    database: Database
    organization_id: OrganizationId

    @property
    def url(self) -> str:
        return self.stores.database_url

    async def new_organization(self) -> OrganizationId:
        return (await new_tenant(self.database, self.stores.pepper)).organization_id


@pytest.fixture
async def own(stores: TestStores, template: str) -> AsyncIterator[Own]:
    async with new_database(stores.database_url, f"{template}_copy", template) as url:
        database = Database(url)
        tenant = await new_tenant(database, stores.pepper)
        yield Own(stores._replace(database_url=url), database, tenant.organization_id)
        await database.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Sink]:
    async with sink() as made:
        yield made
