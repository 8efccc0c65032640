"""The settings and the stores that commands work on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from redis.asyncio import Redis

from core import embedded
from core.configuration import ConfigurationInvalid
from core.database import DOWN, Database
from core.embedded import EmbeddedUnavailable
from core.errors import AppError
from core.ids import KeyId, OrganizationId
from core.migrations import expected_revision, is_current
from core.redis import connect
from core.settings import Pepper, SealingKey, Settings, SettingsInvalid, load
from core.telemetry import configure_logs
from gateway.cli.common import fail
from keys import lifecycle, lookup, tenants
from keys.dimensions import LimitScope
from keys.secrets import redact

_T = TypeVar("_T")


class Stores(msgspec.Struct, frozen=True):
    """The stores that a command works on. The first of each ring of keys makes what is new."""

    settings: Settings
    database: Database
    redis: Redis
    peppers: tuple[Pepper, ...]
    sealing_keys: tuple[SealingKey, ...]


def read_settings() -> Settings:
    """Return the environment's settings, or end with every problem.

    Logs go to standard error from then on, so that what a command prints is its answer alone; and only what is not
    routine. `aap serve` logs as its settings say.
    """
    try:
        settings = load(os.environ)
    except SettingsInvalid as error:
        fail("the settings are not valid:\n  " + "\n  ".join(error.problems))
    configure_logs(msgspec.structs.replace(settings.log, level="warning"), redact)
    return settings


def on_stores(act: Callable[[Stores], Awaitable[_T]], *, statement_seconds_max: float = 30.0) -> _T:
    """Run *act* on the configured stores; embedded ones are started for it unless they run already."""
    settings = read_settings()
    try:
        with embedded.stores(settings) as stores:
            return asyncio.run(_connected(settings, stores, act, statement_seconds_max))
    except AppError as error:
        fail(error.message)
    except (EmbeddedUnavailable, ConfigurationInvalid) as error:
        fail(str(error))
    except DOWN as error:
        fail(f"a store cannot be used: {type(error).__name__}. `aap doctor` says more.")


async def _connected(
    settings: Settings, stores: embedded.Stores, act: Callable[[Stores], Awaitable[_T]], statement_seconds_max: float
) -> _T:
    database = Database(stores.database_url, connections_max=1, statement_seconds_max=statement_seconds_max)
    redis = connect(stores.redis_url)
    try:
        if not await is_current(database):
            fail(f"the database schema is not at {expected_revision()}: run `aap migrate` (or `aap serve`) first")
        return await act(Stores(settings, database, redis, stores.peppers, stores.sealing_keys))
    finally:
        await redis.aclose()
        await database.close()


async def owner_of(stores: Stores, scope: LimitScope, scope_id: str | None, org: str | None) -> OrganizationId:
    """Return whose scope this is. A key names its organization, and an organization itself. Errors: TenantNotFound."""
    if org is None and scope_id is not None and scope == "key":
        async with stores.database.transaction() as session:
            return await lifecycle.find_key_owner(session, KeyId(scope_id))
    return await chosen_organization(stores, scope_id if org is None and scope == "organization" else org)


async def chosen_organization(stores: Stores, org: str | None) -> OrganizationId:
    """Return the named organization, or the only one there is. Errors: TenantNotFound."""
    async with stores.database.transaction() as session:
        if org is None:
            return (await tenants.only_organization(session)).id
        return await lookup.require_organization(session, organization_id=OrganizationId(org))
