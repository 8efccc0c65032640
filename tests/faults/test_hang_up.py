"""The caller disappears: under `drain` the provider is read to its end, under `abort` it is stopped."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from core.database import Database
from tests.faults.conftest import PATH
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway
from tests.harness.provider import Exchange, FakeProvider, Script, answer, chat_answer, chunk
from tests.harness.quota_view import nothing_is_taken
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

_CHUNKS = 6
_INPUT, _OUTPUT = 11, 23


@pytest.fixture
async def aborting(database: Database, stores: TestStores) -> Tenant:
    """An organization that wants its provider stopped when the caller is gone."""
    return await new_tenant(database, stores.pepper, policy="abort")


def _line(gateway: Gateway, tenant: Tenant) -> dict[str, object] | None:
    return next((line for line in gateway.calls() if line.get("key_id") == tenant.key_id), None)


def _stepwise(steps: asyncio.Semaphore) -> Script:
    """A stream whose every chunk waits for the test."""

    async def play(exchange: Exchange) -> None:
        await steps.acquire()
        await exchange.send_head()
        for number in range(_CHUNKS):
            await steps.acquire()
            await exchange.send_events(chunk(f"w{number}"), end=False)
        await steps.acquire()
        await exchange.send_events(chunk(finish="stop"), chunk(usage=(_INPUT, _OUTPUT)))

    return play


async def _kill_after(connection: RawConnection, steps: asyncio.Semaphore, chunks: int) -> None:
    """Let *chunks* chunks come through, then reset the connection. 0: after the head of the provider's answer."""
    steps.release()
    if chunks:
        steps.release()
        await connection.head()
        assert b"w0" in await connection.chunk()
    for number in range(1, chunks):
        steps.release()
        assert f"w{number}".encode() in await connection.chunk()
    connection.reset()


class TestDrain:
    @pytest.mark.parametrize("chunks", range(_CHUNKS + 1))
    async def test_the_stream_is_read_to_its_end_and_the_exact_usage_is_logged(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis, chunks: int
    ) -> None:
        steps = asyncio.Semaphore(0)
        provider.scripts.append(_stepwise(steps))
        connection = await RawConnection.open(gateway.port)
        await connection.send(post(PATH, tenant.key, chat(model, stream=True)))
        await eventually(lambda: provider.exchanges)
        await _kill_after(connection, steps, chunks)
        for _ in range(_CHUNKS + 2):
            steps.release()
        line = await eventually(lambda: _line(gateway, tenant))
        assert (line["input_tokens"], line["output_tokens"]) == (_INPUT, _OUTPUT)
        assert "tokens_estimated" not in line
        # The end of the stream may come before the hang-up is seen: both are the truth.
        assert line["outcome"] in {"client_gone", "done"}
        assert not provider.exchanges[0].hung_up.is_set()
        await eventually(lambda: nothing_is_taken(redis, tenant.organization_id))

    async def test_a_whole_answer_is_waited_for_and_its_usage_is_logged(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis
    ) -> None:
        may_answer = asyncio.Event()

        async def play(exchange: Exchange) -> None:
            await may_answer.wait()
            await answer(chat_answer(usage=(_INPUT, _OUTPUT)))(exchange)

        provider.scripts.append(play)
        connection = await RawConnection.open(gateway.port)
        await connection.send(post(PATH, tenant.key, chat(model)))
        await eventually(lambda: provider.exchanges)
        connection.reset()
        assert (await call(gateway.port, post(PATH, tenant.key, chat("nope")))).status == 404
        may_answer.set()
        line = await eventually(
            lambda: next((c for c in gateway.calls() if c.get("key_id") == tenant.key_id and c.get("model")), None)
        )
        assert (line["input_tokens"], line["output_tokens"]) == (_INPUT, _OUTPUT)
        assert not provider.exchanges[0].hung_up.is_set()
        await eventually(lambda: nothing_is_taken(redis, tenant.organization_id))


class TestAbort:
    @pytest.mark.parametrize("chunks", range(_CHUNKS + 1))
    async def test_the_provider_sees_the_hang_up_within_a_second_and_the_line_says_estimated(
        self, gateway: Gateway, provider: FakeProvider, aborting: Tenant, model: str, redis: Redis, chunks: int
    ) -> None:
        steps = asyncio.Semaphore(0)
        provider.scripts.append(_stepwise(steps))
        connection = await RawConnection.open(gateway.port)
        await connection.send(post(PATH, aborting.key, chat(model, stream=True)))
        await eventually(lambda: provider.exchanges)
        await _kill_after(connection, steps, chunks)
        await asyncio.wait_for(provider.exchanges[0].hung_up.wait(), 1)
        # The script still waits for its next step: let it end.
        for _ in range(_CHUNKS + 2):
            steps.release()
        line = await eventually(lambda: _line(gateway, aborting))
        assert (line["outcome"], line.get("tokens_estimated")) == ("client_gone", True)
        assert line["input_tokens"]
        assert line.get("output_tokens", 0) == chunks
        await eventually(lambda: nothing_is_taken(redis, aborting.organization_id))

    async def test_a_whole_answer_is_given_up_too(
        self, gateway: Gateway, provider: FakeProvider, aborting: Tenant, model: str, redis: Redis
    ) -> None:
        never = asyncio.Event()

        async def play(exchange: Exchange) -> None:
            await asyncio.wait(
                {asyncio.ensure_future(never.wait()), asyncio.ensure_future(exchange.hung_up.wait())},
                return_when=asyncio.FIRST_COMPLETED,
            )
            never.set()

        provider.scripts.append(play)
        connection = await RawConnection.open(gateway.port)
        await connection.send(post(PATH, aborting.key, chat(model)))
        await eventually(lambda: provider.exchanges)
        connection.reset()
        await asyncio.wait_for(provider.exchanges[0].hung_up.wait(), 1)
        line = await eventually(lambda: _line(gateway, aborting))
        assert line["outcome"] == "client_gone"
        await eventually(lambda: nothing_is_taken(redis, aborting.organization_id))

    async def test_a_caller_who_stopped_reading_and_then_hung_up_stops_the_provider_too(
        self, gateway: Gateway, provider: FakeProvider, aborting: Tenant, model: str, redis: Redis
    ) -> None:
        """Guarantee: also when the gateway waits for the caller, not for the provider, the provider is stopped."""
        sent = 0

        async def flood(exchange: Exchange) -> None:
            nonlocal sent
            await exchange.send_head()
            event = chunk("x" * 65_536)
            while not exchange.hung_up.is_set():
                await exchange.send_events(event, end=False)
                sent += 1

        provider.scripts.append(flood)
        connection = await RawConnection.open(gateway.port)
        connection.writer.transport.pause_reading()
        await connection.send(post(PATH, aborting.key, chat(model, stream=True)))
        await _stands_still(lambda: sent)
        connection.reset()
        await asyncio.wait_for(provider.exchanges[0].hung_up.wait(), 1)
        line = await eventually(lambda: _line(gateway, aborting))
        assert line["outcome"] == "client_gone"
        await eventually(lambda: nothing_is_taken(redis, aborting.organization_id))


async def _stands_still(number) -> None:
    """Return when *number* has grown and then stayed the same for a quarter of a second: everything is full."""
    looks = [0]

    def same() -> bool:
        looks.append(number())
        return len(looks) > 25 and looks[-1] > 0 and len(set(looks[-25:])) == 1

    await eventually(same, 20)
