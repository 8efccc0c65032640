"""Callers that stop in the middle: of their request, and of reading the answer. What has to take a minute is started
with the first fault test and looked at here, so that it costs the run no minute of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from redis.asyncio import Redis

from core.database import Database
from tests.faults.conftest import PATH
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import Exchange, FakeProvider, chunk
from tests.harness.quota_view import nothing_is_taken
from tests.harness.raw import RawConnection, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

_CALLER_SECONDS_MAX = 60
_FLOOD_CHUNKS = 600


class Minute(NamedTuple):
    """A gateway with one caller that does not finish its body, and two that do not read."""

    gateway: Gateway
    provider: FakeProvider
    half_body: RawConnection
    unread: dict[str, RawConnection]
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


@pytest.fixture(scope="session")
async def a_minute(stores: TestStores, database: Database, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Minute]:
    provider = await FakeProvider().start()
    provider.default = _flood
    directory: Path = tmp_path_factory.mktemp("minute")
    async with Gateway(stores, directory, config_for(provider.base_url)) as gateway:
        tenants = {policy: await new_tenant(database, stores.pepper, policy=policy) for policy in ("drain", "abort")}
        half_body = await RawConnection.open(gateway.port)
        await half_body.send(post(PATH, tenants["drain"].key, chat())[:-5])
        unread: dict[str, RawConnection] = {}
        for policy, tenant in tenants.items():
            connection = await RawConnection.open(gateway.port)
            connection.writer.transport.pause_reading()
            await connection.send(post(PATH, tenant.key, chat(stream=True)))
            unread[policy] = connection
        yield Minute(gateway, provider, half_body, unread, tenants, time.monotonic())
        for connection in (half_body, *unread.values()):
            connection.reset()
    await provider.close()


def _left_seconds(minute: Minute) -> float:
    return max(0.0, minute.began_at + _CALLER_SECONDS_MAX - time.monotonic())


def _line(minute: Minute, policy: str) -> dict[str, object] | None:
    key_id = minute.tenants[policy].key_id
    return next((c for c in minute.gateway.calls() if c.get("key_id") == key_id and c.get("stream")), None)


class TestAMinute:
    async def test_a_body_that_does_not_come_is_a_408(self, a_minute: Minute) -> None:
        got = await asyncio.wait_for(a_minute.half_body.answer(), _left_seconds(a_minute) + 3)
        assert (got.status, got.error()["code"]) == (408, "request_timeout")

    async def test_under_abort_a_caller_who_does_not_read_is_cut_and_the_provider_stopped(
        self, a_minute: Minute, redis: Redis
    ) -> None:
        """Guarantee: neither the provider's connection nor its work outlives a caller who was given up."""
        line = await eventually(lambda: _line(a_minute, "abort"), _left_seconds(a_minute) + 3)
        assert (line["outcome"], line["tokens_estimated"]) == ("client_gone", True)
        exchange = next(one for one in a_minute.provider.exchanges if _is_cut(one))
        await asyncio.wait_for(exchange.hung_up.wait(), 1)
        await eventually(lambda: nothing_is_taken(redis, a_minute.tenants["abort"].organization_id))

    async def test_under_drain_a_caller_who_does_not_read_is_cut_and_the_provider_read_to_its_end(
        self, a_minute: Minute, redis: Redis
    ) -> None:
        line = await eventually(lambda: _line(a_minute, "drain"), _left_seconds(a_minute) + 6)
        assert line["outcome"] == "client_gone"
        assert (line["input_tokens"], line["output_tokens"]) == (11, 23)
        assert "tokens_estimated" not in line
        await eventually(lambda: nothing_is_taken(redis, a_minute.tenants["drain"].organization_id))


def _is_cut(exchange: Exchange) -> bool:
    return exchange.hung_up.is_set()
