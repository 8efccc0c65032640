"""A database of billing's own: rounds work on everybody, and are to find nobody else's."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import asyncpg
import pytest

from core.database import Database
from core.migrations import upgrade
from tests.harness.billing import BillingPlace, billing_place
from tests.harness.stores import TestStores, with_database


@pytest.fixture(scope="session")
async def books_url(stores: TestStores, worker_id: str) -> AsyncGenerator[str]:
    name = f"billing_{worker_id}"
    connection = await asyncpg.connect(stores.database_url)
    await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    await connection.execute(f'CREATE DATABASE "{name}"')
    url = with_database(stores.database_url, name)
    made = Database(url, connections_max=1)
    await upgrade(made)
    await made.close()
    yield url
    await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await connection.close()


@pytest.fixture(scope="session")
async def books(books_url: str) -> AsyncGenerator[Database]:
    made = Database(books_url, connections_max=20)
    yield made
    await made.close()


@pytest.fixture
async def place(books: Database, stores: TestStores) -> AsyncGenerator[BillingPlace]:
    async with billing_place(books, stores.pepper) as made:
        yield made
