"""One PostgreSQL and one Redis for the whole run; a database and a numbered Redis database for each worker."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession

from core import embedded
from core.database import Database
from core.migrations import upgrade
from core.settings import Pepper, load
from tests.harness.provider import FakeProvider, answer, chat_answer
from tests.harness.stores import TestStores, new_database, with_redis_database
from tests.harness.tenant import Tenant, new_tenant

_running = ExitStack()
_DATABASE = "AAP_TEST_DATABASE_URL"
_REDIS = "AAP_TEST_REDIS_URL"
PEPPER = Pepper(id="test", key=bytes(range(32)))


def pytest_configure(config: pytest.Config) -> None:
    """Start the stores once, in the process that starts the workers; DATABASE_URL and REDIS_URL name others."""
    if hasattr(config, "workerinput") or _DATABASE in os.environ:
        return
    directory = Path(tempfile.mkdtemp(prefix="aap-tests-"))
    _running.callback(shutil.rmtree, directory, ignore_errors=True)
    environ = {**os.environ, "AAP_DATA_DIR": str(directory), "AAP_KEY_PEPPERS": f"test:{PEPPER.key.hex()}"}
    stores = _running.enter_context(embedded.stores(load(environ)))
    os.environ[_DATABASE], os.environ[_REDIS] = stores.database_url, stores.redis_url


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        _running.close()


@pytest.fixture(scope="session")
async def template(worker_id: str) -> AsyncIterator[str]:
    """The name of a database that holds the schema, and that nobody is connected to."""
    name = f"template_{worker_id}"
    async with new_database(os.environ[_DATABASE], name) as url:
        database = Database(url, connections_max=1)
        await upgrade(database)
        await database.close()
        yield name


@pytest.fixture(scope="session")
async def stores(worker_id: str, template: str) -> AsyncIterator[TestStores]:
    """This worker's own, empty, migrated stores."""
    number = 0 if worker_id == "master" else int(worker_id.removeprefix("gw")) + 1
    async with new_database(os.environ[_DATABASE], f"test_{worker_id}", template) as url:
        own = TestStores(url, with_redis_database(os.environ[_REDIS], number), PEPPER)
        redis = Redis.from_url(own.redis_url)
        await redis.flushdb()
        await redis.aclose()
        yield own


@pytest.fixture(scope="session")
async def database(stores: TestStores) -> AsyncIterator[Database]:
    made = Database(stores.database_url)
    yield made
    await made.close()


@pytest.fixture
async def session(database: Database) -> AsyncIterator[AsyncSession]:
    """A session whose work is undone afterwards."""
    async with database._sessions() as made:
        await made.begin()
        yield made
        await made.rollback()


@pytest.fixture(scope="session")
async def redis(stores: TestStores) -> AsyncIterator[Redis]:
    made = Redis.from_url(stores.redis_url)
    yield made
    await made.aclose()


@pytest.fixture
async def tenant(database: Database, stores: TestStores) -> Tenant:
    """A fresh organization with a project and a key that may do everything."""
    return await new_tenant(database, stores.pepper)


@pytest.fixture
def workdir() -> Iterator[Path]:
    """A directory with a short path: unix sockets live in it."""
    directory = Path(tempfile.mkdtemp(prefix="aap-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
async def shared_provider() -> AsyncIterator[FakeProvider]:
    made = await FakeProvider().start()
    yield made
    await made.close()


@pytest.fixture
def provider(shared_provider: FakeProvider) -> FakeProvider:
    """The provider, with nothing queued and nothing received."""
    shared_provider.scripts.clear()
    shared_provider.received.clear()
    shared_provider.exchanges.clear()
    shared_provider.default = answer(chat_answer())
    return shared_provider
