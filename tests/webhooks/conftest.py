"""A database of a test's own, empty and with the schema: workers take whatever is due in theirs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import asyncpg
import pytest

from core.database import Database
from core.ids import OrganizationId
from core.migrations import upgrade
from tests.harness.stores import TestStores, with_database
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


@pytest.fixture(scope="session")
async def webhook_template(stores: TestStores, worker_id: str) -> AsyncIterator[str]:
    """The name of a database that holds the schema, and that nobody is connected to."""
    name = f"webhooks_{worker_id}"
    connection = await asyncpg.connect(stores.database_url)
    await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    await connection.execute(f'CREATE DATABASE "{name}"')
    database = Database(with_database(stores.database_url, name), connections_max=1)
    await upgrade(database)
    await database.close()
    yield name
    await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await connection.close()


@pytest.fixture
async def own(stores: TestStores, webhook_template: str) -> AsyncIterator[Own]:
    name = f"{webhook_template}_copy"
    connection = await asyncpg.connect(stores.database_url)
    await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{webhook_template}"')
    mine = stores._replace(database_url=with_database(stores.database_url, name))
    database = Database(mine.database_url)
    tenant = await new_tenant(database, mine.pepper)
    yield Own(mine, database, tenant.organization_id)
    await database.close()
    await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await connection.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Sink]:
    async with sink() as made:
        yield made
