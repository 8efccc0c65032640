"""The HTTP server: bounds over all callers together, and what it says around a request that it refuses."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway, config_for
from tests.harness.memory import resident_bytes
from tests.harness.provider import FakeProvider, answer, chat_answer, stream
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant
from tests.hostile.conftest import PATH, assert_clear_error, spoken, statuses

_MEGABYTE = 1024 * 1024
_GET = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
async def narrow(stores: TestStores, provider: FakeProvider, workdir: Path) -> AsyncIterator[Gateway]:
    """A gateway with room for little."""
    limits = {"AAP_BODIES_BYTES_MAX": str(4 * _MEGABYTE), "AAP_CONNECTIONS_MAX": "20"}
    async with Gateway(stores, workdir, config_for(provider.base_url), **limits) as made:
        yield made


async def _metric(gateway: Gateway, name: str) -> float:
    text = (await call(gateway.port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")).body.decode()
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def _large(key: str, size_bytes: int) -> bytes:
    return post(PATH, key, chat(text="x" * size_bytes))


class TestBoundsOverAll:
    async def test_bodies_take_so_much_memory_and_no_more(
        self, narrow: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        """Guarantee: beyond the bound large bodies get 503, small calls go on, and all of it is given back."""
        halves = [await RawConnection.open(narrow.port) for _ in range(3)]
        for connection in halves:
            await connection.send(_large(tenant.key, 2 * _MEGABYTE)[:1_200_000])
        await eventually(lambda: _is_at_least(narrow, 3_500_000))
        refused = await call(narrow.port, _large(tenant.key, 3 * _MEGABYTE))
        assert (refused.status, refused.error()["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert (await call(narrow.port, post(PATH, tenant.key, chat()))).status == 200
        for connection in halves:
            connection.reset()
        await eventually(lambda: _is(narrow, "aap_request_bodies_bytes", 0))
        assert (await call(narrow.port, _large(tenant.key, 3 * _MEGABYTE))).status == 200
        await eventually(lambda: _is(narrow, "aap_request_bodies_bytes", 0))

    async def test_connections_beyond_the_bound_are_told_so(self, narrow: Gateway, tenant: Tenant) -> None:
        held = [await RawConnection.open(narrow.port) for _ in range(20)]
        await held[-1].send(_GET)
        assert (await held[-1].answer()).status == 200
        refused = await RawConnection.open(narrow.port)
        got = await refused.answer()
        assert (got.status, got.error()["code"], got.headers["connection"]) == (503, "overloaded", "close")
        assert await refused.reader.read() == b""
        for connection in (*held, refused):
            connection.close()
        await eventually(lambda: _serves(narrow))


async def _is_at_least(gateway: Gateway, value: float) -> bool:
    return await _metric(gateway, "aap_request_bodies_bytes") >= value


async def _is(gateway: Gateway, name: str, value: float) -> bool:
    return await _metric(gateway, name) == value


async def _serves(gateway: Gateway) -> bool:
    try:
        return (await call(gateway.port, _GET)).status == 200
    except ConnectionError:
        return False  # turned away before it was read: there is no place yet


class TestPipelines:
    async def test_a_pipeline_holds_nobody_else_up(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        """Guarantee: ten thousand requests in one write are answered, in turn with those of others."""
        flood = [await RawConnection.open(gateway.port) for _ in range(8)]
        reading = [asyncio.create_task(_count_answers(connection, 8_000)) for connection in flood]
        for connection in flood:
            connection.writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 8_000)
        answered = 0
        while not all(task.done() for task in reading):
            started_at = asyncio.get_running_loop().time()
            assert (await call(gateway.port, post(PATH, tenant.key, chat()))).status == 200
            answered += asyncio.get_running_loop().time() - started_at < 2
        assert answered >= 3
        assert [await task for task in reading] == [8_000] * 8
        for connection in flood:
            connection.close()

    async def test_bodies_of_a_pipeline_are_forgotten_however_it_ends(self, gateway: Gateway, tenant: Tenant) -> None:
        """Guarantee: the memory that bodies take is given back, or in time every large body would be refused."""
        body = _large("sk-wrong", 90_000)
        chunked = b"POST /v1/models HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        tails = [
            b"GET /livez HTTP/1.0\r\nconnection: keep-alive\r\n\r\n" + body,
            _GET + chunked + b"15f90\r\n" + b"a" * 90_000 + b"\r\nZZ",
            _GET + body + body[:-50],
            b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" + body,
            body + body,
        ]
        for tail in tails:
            await spoken(gateway.port, tail)
        await eventually(lambda: _is(gateway, "aap_request_bodies_bytes", 0))

    async def test_who_reads_nothing_is_not_answered_without_end(self, gateway: Gateway) -> None:
        """Guarantee: what waits for one caller who does not read is bounded, also when it asks for a little at a time."""
        connection = await RawConnection.open(gateway.port)
        connection.writer.transport.pause_reading()
        before = resident_bytes(gateway.processes[0].pid)
        sent = 0
        try:
            async with asyncio.timeout(2):
                while sent < 60_000:
                    await connection.send(_GET * 50)
                    sent += 50
        except TimeoutError:
            pass
        assert resident_bytes(gateway.processes[0].pid) - before < 8 * _MEGABYTE
        connection.reset()


async def _count_answers(connection: RawConnection, count: int) -> int:
    for answered in range(count):
        if (await connection.answer()).status != 200:
            return answered
    return count


class TestOfferedProtocols:
    @pytest.mark.parametrize("framing", ["length", "chunks"])
    @pytest.mark.parametrize("is_apart", [False, True])
    async def test_a_request_that_offers_h2c_is_answered_in_http_1(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, framing: str, is_apart: bool
    ) -> None:
        """Guarantee: what Java's and Kotlin's clients send with every first request costs nobody their body."""
        body = chat(text="outer")
        head = post(PATH, tenant.key, body).partition(b"\r\n\r\n")[0]
        head += b"\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA"
        if framing == "chunks":
            head = re.sub(rb"(?i)content-length: \d+", b"transfer-encoding: chunked", head)
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        connection = await RawConnection.open(gateway.port)
        if is_apart:
            await connection.send(head + b"\r\n\r\n")
            await moment(0.05)
            await connection.send(body + _GET)
        else:
            await connection.send(head + b"\r\n\r\n" + body + _GET)
        got = await connection.answer()
        assert (got.status, got.headers["connection"]) == (200, "close")
        assert await connection.reader.read() == b""
        assert b"outer" in provider.received[0].body
        connection.close()


class TestStatuses:
    @pytest.mark.parametrize("status", [299, 498, 499, 599])
    async def test_a_status_that_has_no_name_is_passed_on(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, status: int
    ) -> None:
        provider.scripts.append(answer(chat_answer(), status=status))
        got = await call(gateway.port, post(PATH, tenant.key, chat()))
        assert (got.status, got.body) == (status, chat_answer())


class TestRefusals:
    async def test_the_answer_arrives_while_a_body_that_nobody_wants_is_still_sent(
        self, gateway: Gateway, provider: FakeProvider
    ) -> None:
        """Guarantee: a caller who sends all before it reads gets the answer, not a reset."""
        connection = await RawConnection.open(gateway.port)
        await connection.send(_large("sk-wrong", 8 * _MEGABYTE))
        got = await connection.answer()
        assert (got.status, got.headers["connection"]) == (401, "close")
        assert await connection.reader.read() == b""
        connection.close()

    async def test_what_is_malformed_behind_a_request_is_answered_behind_it(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        good = post(PATH, tenant.key, chat())
        for tail in (
            b"nonsense\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01",
            good.replace(b"host:", b"host :"),
        ):
            said = await spoken(gateway.port, good + good + tail + good)
            assert statuses(said) == [200, 200, 400], (tail, said)
        assert len(provider.received) == 8

    @pytest.mark.parametrize(
        "head",
        [
            b"GET /livez HTTP/1.1\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n",
            b"POST /v1/models HTTP/1.1\r\nhost: a\r\ncontent-type: a\r\ncontent-type: b\r\n\r\n",
            b"GET /livez HTTP/2.0\r\nhost: a\r\n\r\n",
            b"POST /v1/models HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            b"BREW /livez HTTP/1.1\r\nhost: a\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 101 + b"\r\n",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
            b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
        ],
    )
    async def test_what_is_no_request_of_ours_is_refused_in_openais_form(self, gateway: Gateway, head: bytes) -> None:
        connection = await RawConnection.open(gateway.port)
        await connection.send(head + _GET)
        got = await connection.answer()
        assert_clear_error(got)
        assert got.headers["connection"] == "close"
        assert await connection.reader.read() == b""
        connection.close()

    async def test_a_body_that_stops_halfway_is_answered(self, gateway: Gateway, tenant: Tenant) -> None:
        connection = await RawConnection.open(gateway.port)
        await connection.send(post(PATH, tenant.key, chat())[:-5])
        connection.writer.write_eof()
        got = await connection.answer()
        assert (got.status, assert_clear_error(got)["code"]) == (400, "malformed_request")
        connection.close()


class TestOldClients:
    async def test_http_1_0_gets_a_stream_without_chunks_that_ends_with_the_connection(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.default = stream("one", "two")
        request = post(PATH, tenant.key, chat(stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0")
        head, _, body = (await spoken(gateway.port, request)).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert b"connection: close" in head
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")

    async def test_a_head_request_has_the_length_and_no_body(self, gateway: Gateway) -> None:
        connection = await RawConnection.open(gateway.port)
        await connection.send(b"HEAD /nope HTTP/1.1\r\nhost: a\r\n\r\n" + _GET)
        status, headers = await connection.head()
        assert (status, int(headers["content-length"]) > 0) == (404, True)
        assert (await connection.answer()).status == 200
        connection.close()


class TestStopping:
    async def test_a_notice_is_given_before_the_port_closes(
        self, stores: TestStores, provider: FakeProvider, workdir: Path, tenant: Tenant
    ) -> None:
        """Guarantee: with AAP_DRAIN_NOTICE_SECONDS nobody is refused before the load balancer has heard of it."""
        async with Gateway(stores, workdir, config_for(provider.base_url), AAP_DRAIN_NOTICE_SECONDS="1") as gateway:
            idle = await RawConnection.open(gateway.port)
            gateway.terminate()
            await eventually(lambda: _is_unready(gateway))
            assert (await call(gateway.port, post(PATH, tenant.key, chat()))).status == 200
            await eventually(lambda: _refuses(gateway))
            assert await asyncio.wait_for(idle.reader.read(), 5) == b""
            assert await gateway.wait() == [0]
            idle.close()


async def _is_unready(gateway: Gateway) -> bool:
    return (await call(gateway.port, b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")).status == 503


async def _refuses(gateway: Gateway) -> bool:
    try:
        await call(gateway.port, _GET)
    except (ConnectionError, asyncio.IncompleteReadError):
        return True
    await moment(0.05)
    return False


class TestMetricsForReal:
    async def test_without_a_token_nobody_sees_them_and_with_it_its_holder_does(
        self, stores: TestStores, provider: FakeProvider, workdir: Path
    ) -> None:
        """Guarantee: a proxy on this machine that adds no header does not make the metrics public."""
        request = b"GET /metrics HTTP/1.1\r\nhost: x\r\n%b\r\n"
        closed = {"AAP_METRICS_ACCESS": "token"}
        async with Gateway(stores, workdir, config_for(provider.base_url), **closed) as gateway:
            assert (await call(gateway.port, request % b"")).status == 404
        async with Gateway(stores, workdir, config_for(provider.base_url), **closed, AAP_METRICS_TOKEN="t") as gateway:
            assert (await call(gateway.port, request % b"authorization: Bearer wrong\r\n")).status == 404
            assert (await call(gateway.port, request % b"authorization: Bearer t\r\n")).status == 200
