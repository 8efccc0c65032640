"""Floods from providers and callers that do not read: memory stays bounded, and nobody else waits."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest

from tests.faults.conftest import PATH
from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway, config_for
from tests.harness.memory import MEGABYTE, forget_peak, resident_bytes_peak
from tests.harness.piped import PipedGateway
from tests.harness.provider import Exchange, FakeProvider, Script, chunk
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant

_BOUND = 32 * MEGABYTE


class Flood:
    """A stream without end, and how much of it the gateway has taken."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    async def play(self, exchange: Exchange) -> None:
        event = b"data: " + chunk("x" * 65_536) + b"\n\n"
        await exchange.send_head()
        while not exchange.hung_up.is_set():
            await exchange.send_chunk(event)
            self.sent_bytes += len(event)

    async def is_full(self) -> None:
        """Return when nothing was taken for a quarter of a second: every buffer on the way is full."""
        looks: list[int] = []

        def stands() -> bool:
            looks.append(self.sent_bytes)
            return len(looks) > 25 and looks[-1] > 0 and looks[-1] == looks[-25]

        await eventually(stands, 20)


async def _warm(gateway: Gateway, tenant: Tenant, model: str) -> int:
    """Make the process as large as ordinary calls make it; return its id."""
    for _ in range(20):
        assert (await call(gateway.port, post(PATH, tenant.key, chat(model)))).status == 200
    return gateway.processes[0].pid


async def _unread(gateway: Gateway, tenant: Tenant, model: str) -> RawConnection:
    connection = await RawConnection.open(gateway.port)
    connection.writer.transport.pause_reading()
    await connection.send(post(PATH, tenant.key, chat(model, stream=True)))
    return connection


class TestFlood:
    async def test_a_caller_who_does_not_read_stops_the_provider_and_not_the_others(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        pid = await _warm(gateway, tenant, model)
        before = forget_peak(pid)
        flood = Flood()
        provider.scripts.append(flood.play)
        connection = await _unread(gateway, tenant, model)
        await flood.is_full()
        assert flood.sent_bytes < 3 * _BOUND
        assert (await call(gateway.port, post(PATH, tenant.key, chat(model)))).status == 200
        assert resident_bytes_peak(pid) - before < _BOUND
        connection.reset()

    async def test_ten_callers_who_do_not_read_stay_within_the_same_bound(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        pid = await _warm(gateway, tenant, model)
        before = forget_peak(pid)
        floods = [Flood() for _ in range(10)]
        provider.scripts.extend(flood.play for flood in floods)
        connections = [await _unread(gateway, tenant, model) for _ in floods]
        await asyncio.gather(*(flood.is_full() for flood in floods))
        assert resident_bytes_peak(pid) - before < _BOUND
        for connection in connections:
            connection.reset()

    async def test_a_slow_reader_gets_every_byte_in_bounded_memory(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        pid = await _warm(gateway, tenant, model)
        before = forget_peak(pid)
        count = 600
        texts = [f"{number:06}" + "x" * 65_536 for number in range(count)]
        provider.scripts.append(_sends(*(chunk(text) for text in texts)))
        connection = await RawConnection.open(gateway.port)
        await connection.send(post(PATH, tenant.key, chat(model, stream=True)))
        _, headers = await connection.head()
        await moment(0.5)
        body = await asyncio.wait_for(connection.body(headers), 30)
        assert [body.count(text.encode()) for text in texts] == [1] * count
        assert body.endswith(b"data: [DONE]\n\n")
        assert resident_bytes_peak(pid) - before < _BOUND
        connection.close()

    async def test_an_event_of_64_megabytes_arrives_whole_in_bounded_memory(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        pid = await _warm(gateway, tenant, model)
        before = forget_peak(pid)
        provider.scripts.append(_large_event(64))
        connection = await RawConnection.open(gateway.port)
        await connection.send(post(PATH, tenant.key, chat(model, stream=True)))
        await connection.head()
        letters = 0
        tail = b""
        while piece := await asyncio.wait_for(connection.chunk(), 30):
            letters += piece.count(b"y")
            tail = (tail + piece)[-64:]
        assert letters == 64 * MEGABYTE
        assert tail.endswith(b'"}\n\ndata: [DONE]\n\n')
        assert resident_bytes_peak(pid) - before < _BOUND
        connection.close()

    async def test_a_whole_answer_without_end_is_a_502(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        async def play(exchange: Exchange) -> None:
            await exchange.send_head(content_type="application/json")
            while not exchange.hung_up.is_set():
                await exchange.send_chunk(b" " * MEGABYTE)

        provider.scripts.append(play)
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert (got.status, got.error()["code"]) == (502, "upstream_unreachable")
        await asyncio.wait_for(provider.exchanges[0].hung_up.wait(), 1)

    async def test_comments_without_end_before_the_first_event_stay_small(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            while not exchange.hung_up.is_set():
                await exchange.send_chunk(b": still thinking\n\n" * 4_000)

        pid = await _warm(gateway, tenant, model)
        before = forget_peak(pid)
        provider.scripts.append(play)
        connection = await _unread(gateway, tenant, model)
        await eventually(lambda: len(provider.exchanges) > 20)
        await moment(0.5)
        assert (await call(gateway.port, post(PATH, tenant.key, chat(model)))).status == 200
        assert resident_bytes_peak(pid) - before < _BOUND
        connection.reset()


class TestLogs:
    async def test_a_log_that_nobody_reads_does_not_stop_the_calls(
        self, provider: FakeProvider, stores: TestStores, tenant: Tenant, workdir, model: str
    ) -> None:
        """Guarantee: calls go on, whatever becomes of the lines; what is written stays whole lines."""
        gateway = PipedGateway(stores, workdir, config_for(provider.base_url, models=(model,)))
        await gateway.start()
        try:
            for at in itertools.count():
                got = await asyncio.wait_for(call(gateway.port, post(PATH, tenant.key, chat(model))), 5)
                assert got.status == 200
                if at % 100 == 0:
                    await moment(0.15)
                if at == 500:
                    break
            # The line on which the writer waits for the reader may stand there in part.
            lines = gateway.read_log().rpartition(b"\n")[0].splitlines()
            assert len(lines) > 10
            assert all(msgspec.json.decode(line) for line in lines)
        finally:
            await gateway.stop()


def _sends(*events: bytes) -> Script:
    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        await exchange.send_events(*events)

    return play


def _large_event(megabytes: int) -> Script:
    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        await exchange.send_chunk(b'data: {"x":"')
        for _ in range(megabytes):
            await exchange.send_chunk(b"y" * MEGABYTE)
        await exchange.send_chunk(b'"}\n\ndata: [DONE]\n\n')
        await exchange.end()

    return play


@pytest.mark.parametrize("size", [1, 7])
async def test_an_answer_in_tiny_pieces_costs_no_more_than_its_bytes(
    gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, size: int
) -> None:
    """Guarantee: a provider that dribbles one long event does not keep the process busy for everybody else."""

    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        event = b'data: {"x":"' + b"y" * 20_000 + b'"}\n\ndata: [DONE]\n\n'
        for start in range(0, len(event), size):
            await exchange.send_chunk(event[start : start + size])
        await exchange.end()

    provider.scripts.append(play)
    got = await asyncio.wait_for(call(gateway.port, post(PATH, tenant.key, chat(model, stream=True))), 15)
    assert got.body.count(b"y") == 20_000
