"""A database of billing's own: rounds work on everybody, and are to find nobody else's."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from core.database import Database
from tests.harness.billing import BillingPlace, billing_place
from tests.harness.stores import TestStores, new_database


@pytest.fixture(scope="session")
async def books_url(stores: TestStores, worker_id: str, template: str) -> AsyncGenerator[str]:
    async with new_database(stores.database_url, f"billing_{worker_id}", template) as url:
        yield url


@pytest.fixture(scope="session")
async def books(books_url: str) -> AsyncGenerator[Database]:
    made = Database(books_url, connections_max=20)
    yield made
    await made.close()


@pytest.fixture
async def place(books: Database, stores: TestStores) -> AsyncGenerator[BillingPlace]:
    async with billing_place(books, stores.pepper) as made:
        yield made
