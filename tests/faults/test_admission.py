"""More calls than places: a bounded queue in order, then 503, before memory grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.faults.conftest import PATH
from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import Exchange, FakeProvider, answer, chat_answer
from tests.harness.quota_view import nothing_is_taken
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant


@pytest.fixture
async def narrow(stores: TestStores, provider: FakeProvider, workdir: Path) -> AsyncIterator[Gateway]:
    """Four calls at once, two in the queue."""
    config = config_for(provider.base_url)
    limits = {"AAP_IN_FLIGHT_MAX": "4", "AAP_QUEUED_MAX": "2", "AAP_QUEUE_SECONDS_MAX": "2"}
    async with Gateway(stores, workdir, config, **limits) as made:
        yield made


class Gate:
    """A provider that answers one call each time it is told to."""

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(0)

    async def play(self, exchange: Exchange) -> None:
        await self.turns.acquire()
        await answer(chat_answer())(exchange)


async def _metric(gateway: Gateway, name: str) -> float:
    got = await call(gateway.port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
    return next(float(line.split()[-1]) for line in got.body.decode().splitlines() if line.startswith(f"{name} "))


async def _asked(gateway: Gateway, tenant: Tenant, text: str) -> RawConnection:
    connection = await RawConnection.open(gateway.port)
    await connection.send(post(PATH, tenant.key, chat(text=text)))
    return connection


async def _statuses(connections: list[RawConnection]) -> list[int]:
    """The statuses of the answers, in order; the connections are closed."""
    answers = await asyncio.gather(*(connection.answer() for connection in connections))
    for connection in connections:
        connection.reset()
    return [got.status for got in answers]


class TestAdmission:
    async def test_the_seventh_call_gets_503_and_the_queue_is_served_in_order(
        self, narrow: Gateway, provider: FakeProvider, tenant: Tenant, redis: Redis
    ) -> None:
        gate = Gate()
        provider.default = gate.play
        running = [await _asked(narrow, tenant, f"running {number}") for number in range(4)]
        await eventually(lambda: len(provider.exchanges) == 4)
        queued: list[RawConnection] = []
        for number in range(2):
            queued.append(await _asked(narrow, tenant, f"queued {number}"))
            await eventually(lambda: _is(narrow, "aap_requests_queued", len(queued)))
        refused = await call(narrow.port, post(PATH, tenant.key, chat(text="seventh")))
        assert (refused.status, refused.error()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert len(provider.exchanges) == 4
        for number in range(2):
            gate.turns.release()
            await eventually(lambda count=5 + number: len(provider.exchanges) == count)
            assert b"queued %d" % number in provider.exchanges[-1].received.body
        for _ in range(4):
            gate.turns.release()
        assert await _statuses(running + queued) == [200] * 6
        await eventually(lambda: nothing_is_taken(redis, tenant.organization_id))

    async def test_whoever_waits_too_long_gets_503_and_leaves_no_place_taken(
        self, narrow: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        gate = Gate()
        provider.default = gate.play
        running = [await _asked(narrow, tenant, "running") for _ in range(4)]
        await eventually(lambda: len(provider.exchanges) == 4)
        late = await call(narrow.port, post(PATH, tenant.key, chat(text="late")))
        assert (late.status, late.error()["code"]) == (503, "overloaded")
        for _ in range(4):
            gate.turns.release()
        assert await _statuses(running) == [200] * 4
        await eventually(lambda: _is(narrow, "aap_requests_in_flight", 0))
        provider.default = answer(chat_answer())
        assert (await call(narrow.port, post(PATH, tenant.key, chat()))).status == 200

    async def test_callers_who_hang_up_everywhere_leave_no_place_taken(
        self, narrow: Gateway, provider: FakeProvider, tenant: Tenant, redis: Redis
    ) -> None:
        gate = Gate()
        provider.default = gate.play
        connections = [await _asked(narrow, tenant, f"{number}") for number in range(6)]
        await eventually(lambda: _is(narrow, "aap_requests_queued", 2))
        for connection in connections:
            connection.reset()
        for _ in range(6):
            gate.turns.release()
        await eventually(lambda: _is(narrow, "aap_requests_in_flight", 0), 10)
        await eventually(lambda: nothing_is_taken(redis, tenant.organization_id))

    async def test_a_refused_call_costs_no_quota(self, narrow: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
        gate = Gate()
        provider.default = gate.play
        connections = [await _asked(narrow, tenant, f"{number}") for number in range(6)]
        await eventually(lambda: _is(narrow, "aap_requests_queued", 2))
        refused = await call(narrow.port, post(PATH, tenant.key, chat()))
        assert refused.status == 503
        assert "x-ratelimit-remaining-requests" not in refused.headers
        for _ in range(6):
            gate.turns.release()
        assert await _statuses(connections) == [200] * 6


class TestSlowBody:
    async def test_a_body_in_drips_is_waited_for_and_nobody_else_waits(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        request = post(PATH, tenant.key, chat(model))
        head, _, body = request.partition(b"\r\n\r\n")
        connection = await RawConnection.open(gateway.port)
        await connection.send(head + b"\r\n\r\n")
        for start in range(0, len(body), 10):
            await connection.send(body[start : start + 10])
            await moment(0.02)
            assert not provider.received or start + 10 >= len(body)
            if start == 20:
                assert (await call(gateway.port, post(PATH, tenant.key, chat("nope")))).status == 404
        assert (await connection.answer()).status == 200
        connection.close()

    async def test_a_body_that_breaks_off_reaches_no_provider_and_leaves_nothing(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis
    ) -> None:
        request = post(PATH, tenant.key, chat(model))
        for end in (b"reset", b"close"):
            connection = await RawConnection.open(gateway.port)
            await connection.send(request[:-5])
            await moment(0.05)
            if end == b"reset":
                connection.reset()
            else:
                connection.close()
        lines = await eventually(lambda: _ended(gateway, tenant, 2))
        assert [line["status"] for line in lines] == [499, 499]
        assert provider.received == []
        await eventually(lambda: nothing_is_taken(redis, tenant.organization_id))


async def _is(gateway: Gateway, name: str, value: float) -> bool:
    return await _metric(gateway, name) == value


def _ended(gateway: Gateway, tenant: Tenant, count: int) -> list[dict[str, object]] | None:
    lines = [line for line in gateway.calls() if line.get("key_id") == tenant.key_id]
    return lines if len(lines) == count else None
