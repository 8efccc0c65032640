"""The schema: from nothing to the newest, back, and what the code's tables say it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from core.database import Database, Table
from core.migrations import configuration, expected_revision, is_current, upgrade
from tests.harness.stores import TestStores, new_database


@pytest.fixture
async def empty(stores: TestStores, worker_id: str) -> AsyncIterator[Database]:
    """A database with nothing in it."""
    async with new_database(stores.database_url, f"empty_{worker_id}") as url:
        made = Database(url, connections_max=4)
        yield made
        await made.close()


async def test_an_empty_database_is_not_current_and_an_upgraded_one_is(empty: Database) -> None:
    assert not await is_current(empty)
    assert await upgrade(empty) == expected_revision()
    assert await is_current(empty)


async def test_an_upgrade_is_idempotent_and_several_may_run_at_once(empty: Database) -> None:
    assert set(await asyncio.gather(*[upgrade(empty) for _ in range(4)])) == {expected_revision()}


async def test_the_schema_is_what_the_tables_say(empty: Database) -> None:
    await upgrade(empty)

    def differences(connection: Connection) -> list[object]:
        return compare_metadata(MigrationContext.configure(connection), Table.metadata)

    assert await empty.run(differences) == []


async def test_every_migration_can_be_taken_back(empty: Database) -> None:
    await upgrade(empty)
    await empty.run(lambda connection: command.downgrade(configuration(connection), "base"))
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
    assert await empty.run(lambda connection: connection.scalar(text(tables))) == 0
    await upgrade(empty)
    assert await is_current(empty)


async def test_an_upgrade_that_a_running_process_is_in_the_way_of_is_tried_again(empty: Database) -> None:
    await upgrade(empty)
    await empty.run(lambda connection: command.downgrade(configuration(connection), "0012"))
    async with empty.transaction() as session:
        # In the other order than the upgrade's: PostgreSQL ends one of the two, the one that has waited longer.
        await session.execute(text("LOCK webhook_deliveries IN ACCESS SHARE MODE"))
        upgrading = asyncio.create_task(upgrade(empty))
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        while not await empty.run(lambda connection: connection.scalar(text(waits))):
            assert not upgrading.done()
        await session.execute(text("LOCK webhook_events IN ACCESS SHARE MODE"))
    assert await upgrading == expected_revision()
    assert await is_current(empty)


async def test_an_unknown_schema_is_not_current(empty: Database) -> None:
    """Guarantee: a process of this release does not serve on the schema of a later one."""
    await upgrade(empty)
    await empty.run(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    assert not await is_current(empty)
