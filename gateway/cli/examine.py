"""What `aap doctor` does: what an operator would look at first, looked at."""

from __future__ import annotations

import asyncio
import os
import resource
import ssl
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, cast

import certifi
from sqlalchemy import text

from core import embedded
from core.configuration import ConfigurationInvalid
from core.database import Database
from core.http1.messages import parse_base_url
from core.migrations import is_current
from core.redis import connect
from core.settings import Settings
from gateway.catalog_file import CatalogFile
from gateway.cli.examine_billing import examine_stripe
from gateway.cli.findings import Finding
from inference.catalog import Catalog
from metering.billing.plans import Plans
from metering.prices import missing_prices

_FILES_MIN: Final = 4_096
_SKEW_SECONDS_MAX: Final = 1.0
_POSTGRESQL_MIN: Final = 150_000
_CONNECT_SECONDS_MAX: Final = 5.0
# A price that was missing once and was set since is no trouble any more.
_UNPRICED_RECENTLY: Final = timedelta(days=7)


def examine(settings: Settings) -> list[Finding]:
    """Return what was found, stores first."""
    configuration, catalog_file = _configuration(settings)
    findings = [_files()]
    try:
        with embedded.stores(settings) as stores:
            findings += asyncio.run(_stores(stores, settings, catalog_file))
    except embedded.EmbeddedUnavailable as error:
        findings.append(Finding("stores", "failed", str(error)))
    findings.append(configuration)
    return findings if catalog_file is None else findings + asyncio.run(_providers(catalog_file.catalog))


def _configuration(settings: Settings) -> tuple[Finding, CatalogFile | None]:
    try:
        catalog_file = CatalogFile(settings.config_path, os.environ)
    except ConfigurationInvalid as error:
        return Finding("configuration", "failed", "; ".join(error.problems)), None
    catalog = catalog_file.catalog
    return Finding(
        "configuration", "ok", f"{len(catalog.models)} models, {len(catalog.providers)} providers"
    ), catalog_file


def _files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES_MIN:
        return Finding("open files", "warning", f"{soft}; each stream takes two: raise `ulimit -n` to {_FILES_MIN}")
    return Finding("open files", "ok", str(soft))


async def _stores(stores: embedded.Stores, settings: Settings, catalog_file: CatalogFile | None) -> list[Finding]:
    database = Database(stores.database_url, connections_max=1)
    try:
        found = [
            await _look("postgresql", lambda: _postgresql(database)),
            await _look("schema", lambda: _schema(database)),
            await _look("clock (postgresql)", lambda: _postgresql_clock(database)),
            await _look("redis", lambda: _redis(stores.redis_url)),
        ]
        if any(one.check == "schema" and one.result == "ok" for one in found):
            found.append(await _look("prices", lambda: _prices(database)))
            if catalog_file is not None:
                plans = catalog_file.plans
                found.append(await _look("plans", lambda: _plans(database, plans)))
                found.append(await _look("stripe", lambda: examine_stripe(database, settings.stripe, plans)))
    finally:
        await database.close()
    return found


async def _look(check: str, act: Callable[[], Awaitable[Finding]]) -> Finding:
    try:
        return await act()
    except Exception as error:  # noqa: BLE001 - a doctor reports whatever it meets
        return Finding(check, "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


async def _postgresql(database: Database) -> Finding:
    async with database.transaction() as session:
        number = int(await session.scalar(text("SHOW server_version_num")) or 0)
        connections = await session.scalar(text("SHOW max_connections"))
    detail = f"version {number // 10_000}, max_connections {connections}"
    return Finding("postgresql", "ok" if number >= _POSTGRESQL_MIN else "failed", detail)


async def _schema(database: Database) -> Finding:
    if await is_current(database):
        return Finding("schema", "ok", "up to date")
    return Finding("schema", "failed", "not up to date: run `aap migrate`")


async def _postgresql_clock(database: Database) -> Finding:
    async with database.transaction() as session:
        theirs = float(await session.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0)
    skew_seconds = abs(theirs - time.time())
    result: Literal["ok", "warning"] = "ok" if skew_seconds < _SKEW_SECONDS_MAX else "warning"
    return Finding("clock (postgresql)", result, f"{skew_seconds:.3f} s apart")


async def _redis(url: str) -> Finding:
    redis = connect(url)
    try:
        info: dict[str, Any] = await cast("Any", redis).info()
    finally:
        await redis.aclose()
    detail = f"version {info['redis_version']}, {info.get('maxmemory_policy')}"
    if info.get("maxmemory_policy") not in {"noeviction", None}:
        return Finding("redis", "warning", f"{detail}: set maxmemory-policy noeviction, or limits may be forgotten")
    if not info.get("aof_enabled"):
        return Finding("redis", "warning", f"{detail}: appendonly is off, a restart forgets the limits' levels")
    return Finding("redis", "ok", detail)


async def _prices(database: Database) -> Finding:
    async with database.transaction() as session:
        count = await session.scalar(text("SELECT count(DISTINCT model) FROM prices WHERE plan IS NULL"))
        missing = await missing_prices(session)
    recent = datetime.now(UTC) - _UNPRICED_RECENTLY
    names = [one.model for one in missing if one.last_hour >= recent]
    if not count:
        return Finding("prices", "warning", "there are none, every call is charged 0: run `aap prices import`")
    if names:
        shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        return Finding("prices", "warning", f"used without a price: {shown}; see `aap prices missing`")
    return Finding("prices", "ok", f"of {count} models")


async def _plans(database: Database, plans: Plans) -> Finding:
    async with database.transaction() as session:
        used = await session.scalars(text("SELECT DISTINCT plan FROM organizations WHERE plan IS NOT NULL"))
        unknown = sorted(name for name in used if plans.find(name) is None)
    if unknown:
        return Finding("plans", "warning", f"not in aap.toml, nothing is limited by them: {', '.join(unknown)}")
    return Finding("plans", "ok", f"{len(plans.by_name)} in aap.toml")


async def _providers(catalog: Catalog) -> list[Finding]:
    findings: list[Finding] = []
    for provider in catalog.providers.values():
        base_url = provider.settings.base_url
        if provider.settings.kind != "openai" or base_url is None:
            findings.append(Finding(f"provider {provider.name}", "ok", f"kind {provider.settings.kind}, not contacted"))
            continue
        findings.append(
            await _look(f"provider {provider.name}", lambda url=base_url, name=provider.name: _reach(name, url))
        )
    return findings


async def _reach(name: str, base_url: str) -> Finding:
    """Connect, with TLS verification, and send nothing."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return Finding(f"provider {name}", "ok", "behind a proxy, not contacted")
    origin, _ = parse_base_url(base_url)
    context = ssl.create_default_context(cafile=certifi.where()) if origin.scheme == "https" else None
    async with asyncio.timeout(_CONNECT_SECONDS_MAX):
        _, writer = await asyncio.open_connection(origin.host, origin.port, ssl=context)
    writer.close()
    return Finding(f"provider {name}", "ok", f"{origin.address} answers")
