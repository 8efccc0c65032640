"""SIGTERM: what can finish finishes, the rest is told so, nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from tests.faults.conftest import PATH
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import Exchange, FakeProvider, answer, chat_answer, chunk
from tests.harness.quota_view import nothing_is_taken
from tests.harness.raw import RawAnswer, RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant

_STREAMS = 300


Serve = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def serve(stores: TestStores, workdir: Path) -> AsyncIterator[Serve]:
    """Starts gateways; none outlives its test, also when the test fails."""
    made: list[Gateway] = []

    async def start(config: str, **environ: str) -> Gateway:
        made.append(Gateway(stores, workdir, config, **environ))
        return await made[-1].start()

    yield start
    for gateway in made:
        await gateway.stop()


class Streams:
    """Streams that have begun: the even ones end when told to, the odd ones never."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.over = asyncio.Event()
        self.begun = 0

    async def play(self, exchange: Exchange) -> None:
        is_short = b"short" in exchange.received.body
        await exchange.send_head()
        await exchange.send_events(chunk("begun"), end=False)
        self.begun += 1
        await (self.may_end if is_short else self.over).wait()
        if is_short:
            await exchange.send_events(chunk("end"), chunk(finish="stop"), chunk(usage=(3, 4)))


async def _open(gateway: Gateway, tenant: Tenant, text: str) -> RawConnection:
    connection = await RawConnection.open(gateway.port)
    await connection.send(post(PATH, tenant.key, chat(stream=True, text=text)))
    return connection


async def _read(connection: RawConnection) -> RawAnswer:
    got = await connection.answer()
    connection.close()
    return got


def _events(got: RawAnswer) -> list[bytes]:
    return [event.removeprefix(b"data: ") for event in got.body.split(b"\n\n") if event]


class TestStreams:
    async def test_of_300_streams_half_finish_whole_and_half_are_told_that_they_did_not(
        self, serve: Serve, provider: FakeProvider, tenant: Tenant, redis: Redis
    ) -> None:
        streams = Streams()
        provider.default = streams.play
        gateway = await serve(config_for(provider.base_url).replace("idle_seconds = 3", "idle_seconds = 30"))
        texts = ["short" if number % 2 == 0 else "long" for number in range(_STREAMS)]
        connections = [await _open(gateway, tenant, text) for text in texts]
        await eventually(lambda: streams.begun == _STREAMS, 20)
        answers = [asyncio.create_task(_read(connection)) for connection in connections]
        stopped_at = time.monotonic()
        gateway.terminate()
        await eventually(lambda: "gateway.draining" in gateway.log)
        streams.may_end.set()
        got = await asyncio.gather(*answers)
        codes = await gateway.wait()
        streams.over.set()
        assert codes == [0]
        assert 1.5 < time.monotonic() - stopped_at < 2 + 5
        for text, one in zip(texts, got, strict=True):
            last = _events(one)[-1]
            if text == "short":
                assert (last, _events(one).count(b"[DONE]")) == (b"[DONE]", 1)
                continue
            assert b"[DONE]" not in one.body
            error = msgspec.json.decode(last)["error"]
            assert (set(error), error["code"]) == ({"message", "type", "param", "code"}, "stream_interrupted")
        assert await nothing_is_taken(redis, tenant.organization_id)
        outcomes = [line["outcome"] for line in gateway.calls()]
        assert sorted(outcomes) == ["done"] * (_STREAMS // 2) + ["interrupted"] * (_STREAMS // 2)

    @pytest.mark.parametrize("signals", [1, 3])
    async def test_an_idle_gateway_stops_at_once_with_open_connections(
        self, serve: Serve, provider: FakeProvider, tenant: Tenant, signals: int
    ) -> None:
        gateway = await serve(config_for(provider.base_url), AAP_DRAIN_SECONDS="20")
        idle = [await RawConnection.open(gateway.port) for _ in range(20)]
        kept = await RawConnection.open(gateway.port)
        await kept.send(post(PATH, tenant.key, chat()))
        assert (await kept.answer()).status == 200
        started = time.monotonic()
        for _ in range(signals):
            gateway.terminate()
        assert await gateway.wait() == [0]
        assert time.monotonic() - started < 8
        for connection in [*idle, kept]:
            connection.reset()


class TestOthers:
    async def test_whole_answers_and_queued_calls_end_clearly(
        self, serve: Serve, provider: FakeProvider, tenant: Tenant, redis: Redis
    ) -> None:
        may_answer, never = asyncio.Event(), asyncio.Event()

        async def play(exchange: Exchange) -> None:
            await (may_answer if b"short" in exchange.received.body else never).wait()
            await answer(chat_answer())(exchange)

        provider.default = play
        limits = {"AAP_IN_FLIGHT_MAX": "2", "AAP_QUEUED_MAX": "2", "AAP_QUEUE_SECONDS_MAX": "30"}
        config = config_for(provider.base_url).replace("first_byte_seconds = 5", "first_byte_seconds = 60")
        gateway = await serve(config, **limits)
        texts = ("short", "long", "queued", "queued")
        calls = []
        for running, text in zip((1, 2, 2, 2), texts, strict=True):
            calls.append(asyncio.create_task(call(gateway.port, post(PATH, tenant.key, chat(text=text)))))
            await eventually(lambda count=running: len(provider.exchanges) == count)
        await eventually(lambda: _queued(gateway))
        gateway.terminate()
        await eventually(lambda: "gateway.draining" in gateway.log)
        may_answer.set()
        short, long, *queued = await asyncio.gather(*calls)
        assert await gateway.wait() == [0]
        never.set()
        assert short.status == 200
        assert (long.status, long.error()["code"]) == (503, "stream_interrupted")
        assert [(one.status, one.error()["code"]) for one in queued] == [(503, "shutting_down")] * 2
        assert all(int(one.headers["retry-after"]) >= 1 for one in (long, *queued))
        assert await nothing_is_taken(redis, tenant.organization_id)

    async def test_a_caller_who_does_not_read_does_not_keep_the_gateway_from_stopping(
        self, serve: Serve, provider: FakeProvider, tenant: Tenant
    ) -> None:
        async def flood(exchange: Exchange) -> None:
            await exchange.send_head()
            while not exchange.hung_up.is_set():
                await exchange.send_events(chunk("x" * 65_536), end=False)

        provider.default = flood
        gateway = await serve(config_for(provider.base_url))
        connections = []
        for _ in range(5):
            connection = await RawConnection.open(gateway.port)
            connection.writer.transport.pause_reading()
            await connection.send(post(PATH, tenant.key, chat(stream=True)))
            connections.append(connection)
        await eventually(lambda: len(provider.exchanges) == 5)
        started = time.monotonic()
        gateway.terminate()
        assert await gateway.wait(30) == [0]
        assert time.monotonic() - started < 2 + 5 + 5 + 3
        for connection in connections:
            connection.reset()


async def _queued(gateway: Gateway) -> bool:
    got = await call(gateway.port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
    return b"\naap_requests_queued 2.0\n" in got.body
