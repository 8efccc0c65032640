"""Callers that stop in the middle and are given a minute, on a gateway of their own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from core.database import Database
from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import Exchange, FakeProvider, chunk
from tests.harness.raw import RawConnection, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

_PATH = "/v1/chat/completions"
_FLOOD_CHUNKS = 600


class Minute(NamedTuple):
    """A gateway with one caller that does not finish its body, and two (by policy) that do not read."""

    gateway: Gateway
    provider: FakeProvider
    half_body: RawConnection
    tenants: dict[str, Tenant]
    began_at: float


async def _flood(exchange: Exchange) -> None:
    """Far more than the buffers on the way hold, and then the usage."""
    await exchange.send_head()
    event = chunk("x" * 65_536)
    for _ in range(_FLOOD_CHUNKS):
        if exchange.hung_up.is_set():
            return
        await exchange.send_events(event, end=False)
    await exchange.send_events(chunk(finish="stop"), chunk(usage=(11, 23)))


@contextlib.asynccontextmanager
async def begin_a_minute(stores: TestStores, database: Database, directory: Path) -> AsyncIterator[Minute]:
    provider = await FakeProvider().start()
    provider.default = _flood
    tenants = {policy: await new_tenant(database, stores.pepper, policy=policy) for policy in ("drain", "abort")}
    async with Gateway(stores, directory, config_for(provider.base_url)) as gateway:
        half_body = await RawConnection.open(gateway.port)
        await half_body.send(post(_PATH, tenants["drain"].key, chat())[:-5])
        unread = [await RawConnection.open(gateway.port) for _ in tenants]
        for connection, tenant in zip(unread, tenants.values(), strict=True):
            connection.writer.transport.pause_reading()
            await connection.send(post(_PATH, tenant.key, chat(stream=True)))
        yield Minute(gateway, provider, half_body, tenants, time.monotonic())
        for connection in (half_body, *unread):
            connection.reset()
    await provider.close()
