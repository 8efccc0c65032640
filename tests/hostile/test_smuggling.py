"""One request must not hide another: exact bytes over raw sockets (security reference, E.7)."""

from __future__ import annotations

import asyncio

import pytest

from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway
from tests.harness.provider import FakeProvider
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.tenant import Tenant
from tests.hostile.conftest import PATH, spoken, statuses

_BODY = chat(text="outer")
_HIDDEN = b"HIDDEN"


def _head(*lines: bytes, key: str, first: bytes = b"POST /v1/chat/completions HTTP/1.1", host: bool = True) -> bytes:
    fixed = [b"host: gateway.test"] if host else []
    fixed += [b"content-type: application/json", b"authorization: Bearer " + key.encode()]
    return b"\r\n".join([first, *fixed, *lines, b"", b""])


def _inner(key: str) -> bytes:
    """A whole request that must never be executed."""
    body = chat(text=_HIDDEN.decode())
    return _head(b"content-length: %d" % len(body), key=key) + body


def _chunks(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def _hidden_calls(provider: FakeProvider) -> int:
    return sum(_HIDDEN in received.body and b"outer" not in received.body for received in provider.received)


_LENGTH = b"content-length: %d" % len(_BODY)
_TE = b"transfer-encoding: chunked"
# Framing that two readers may read in two ways: refused, or the connection is closed.
AMBIGUOUS = {
    "a length and chunks": ([_LENGTH, _TE], _chunks(_BODY)),
    "chunks and a length": ([_TE, _LENGTH], _chunks(_BODY)),
    "a length of zero and chunks": ([b"content-length: 0", _TE], _chunks(_BODY)),
    "a length and chunks that end at once": ([_LENGTH, _TE], b"0\r\n\r\n"),
    "chunks of another name": ([b"transfer-encoding: xchunked"], _chunks(_BODY)),
    "identity": ([b"transfer-encoding: identity", _LENGTH], _BODY),
    "gzip chunks": ([b"transfer-encoding: gzip, chunked"], _chunks(_BODY)),
    "chunks not last": ([b"transfer-encoding: chunked, gzip"], _chunks(_BODY)),
    "chunks twice": ([b"transfer-encoding: chunked, chunked"], _chunks(_BODY)),
    "chunks in two headers": ([_TE, _TE], _chunks(_BODY)),
    "chunks and identity": ([_TE, b"transfer-encoding: identity"], _chunks(_BODY)),
    "a space before the colon": ([b"transfer-encoding : chunked", _LENGTH], _BODY),
    "a length with a space before the colon": ([b"content-length : %d" % len(_BODY)], _BODY),
    "vertical tab chunks": ([b"transfer-encoding: \x0bchunked", _LENGTH], _BODY),
    "quoted chunks": ([b'transfer-encoding: "chunked"', _LENGTH], _BODY),
    "two lengths": ([_LENGTH, b"content-length: 0"], _BODY),
    "two lengths in one": ([b"content-length: %d, 0" % len(_BODY)], _BODY),
    "two idempotency keys": ([_LENGTH, b"idempotency-key: a", b"idempotency-key: b"], _BODY),
    "a positive sign": ([b"content-length: +%d" % len(_BODY)], _BODY),
    "a negative length": ([b"content-length: -1"], _BODY),
    "a hexadecimal length": ([b"content-length: 0x10"], _BODY),
    "a length that overflows": ([b"content-length: 18446744073709551617"], _BODY),
    "an empty length": ([b"content-length:"], _BODY),
    "a folded header": ([_LENGTH, b"x-a: b\r\n c"], _BODY),
    "a folded encoding": ([b"transfer-encoding:\r\n chunked", _LENGTH], _BODY),
    "NUL in a value": ([_LENGTH, b"x-a: b\x00c"], _BODY),
    "NUL in a name": ([_LENGTH, b"x\x00a: b"], _BODY),
    "a bare CR in a value": ([_LENGTH, b"x-a: b\rc: d"], _BODY),
    "no colon": ([_LENGTH, b"x-a"], _BODY),
    "an empty name": ([_LENGTH, b": b"], _BODY),
    "a header of 1 MB": ([_LENGTH, b"x-a: " + b"a" * 1_000_000], _BODY),
    "1,000 headers": ([_LENGTH, *(b"x-%d: a" % number for number in range(1_000))], _BODY),
}
# Chunks that are not as they should be.
BROKEN_CHUNKS = {
    "no CRLF after a chunk": b"%x\r\n%b0\r\n\r\n" % (len(_BODY), _BODY),
    "a size that is not hexadecimal": b"zz\r\n%b\r\n0\r\n\r\n" % _BODY,
    "a negative size": b"-1\r\n%b\r\n0\r\n\r\n" % _BODY,
    "a size with a prefix": b"0x%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY),
    "a size that overflows": b"ffffffffffffffff1\r\n%b\r\n0\r\n\r\n" % _BODY,
    "a huge size": b"fffffffffffffff0\r\n%b\r\n0\r\n\r\n" % _BODY,
    "an extension without end": b"%x;%b\r\n%b\r\n0\r\n\r\n" % (len(_BODY), b"a" * 100_000, _BODY),
    "a bare LF in an extension": b"%x;a\nb\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY),
    "a size ended by a bare LF": b"%x\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY),
    "trailers without end": b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(_BODY), _BODY, b"x-a: b\r\n" * 20_000),
    "no last chunk": b"%x\r\n%b\r\n" % (len(_BODY), _BODY),
}


class TestAmbiguity:
    @pytest.mark.parametrize("name", AMBIGUOUS)
    async def test_nothing_that_it_hides_is_executed(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        """Guarantee: at most the outer request is executed; what stands behind it never is, and nothing ends in 5xx."""
        lines, body = AMBIGUOUS[name]
        said = await spoken(gateway.port, _head(*lines, key=tenant.key) + body + _inner(tenant.key))
        found = statuses(said)
        assert all(status < 500 or status == 501 for status in found), said
        assert _hidden_calls(provider) == 0, said
        assert found.count(200) <= 1
        assert (await call(gateway.port, post(PATH, tenant.key, chat()))).status == 200

    @pytest.mark.parametrize("name", BROKEN_CHUNKS)
    async def test_broken_chunks_reach_no_provider(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        said = await spoken(gateway.port, _head(_TE, key=tenant.key) + BROKEN_CHUNKS[name] + _inner(tenant.key))
        assert all(400 <= status < 500 for status in statuses(said)), said
        assert provider.received == []

    async def test_a_trailer_is_not_a_header(self, gateway: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
        """Guarantee: a credential behind the body authenticates nobody."""
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" + _TE + b"\r\n\r\n"
        )
        trailer = b"%x\r\n%b\r\n0\r\nauthorization: Bearer %b\r\n\r\n" % (len(_BODY), _BODY, tenant.key.encode())
        assert statuses(await spoken(gateway.port, head + trailer))[:1] == [401]
        assert provider.received == []

    async def test_a_bare_lf_head_is_one_request_at_most(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        head = _head(_LENGTH, key=tenant.key).replace(b"\r\n", b"\n")
        said = await spoken(gateway.port, head + _BODY)
        assert len(statuses(said)) <= 1
        assert all(status < 500 for status in statuses(said))
        assert len(provider.received) <= 1

    async def test_a_refused_body_is_not_read_as_a_request(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        """Guarantee: an answer before the body was read does not turn the body into the next request."""
        inner = _inner(tenant.key)
        refused = [
            _head(b"content-length: %d" % len(inner), key="sk-wrong"),
            _head(b"content-length: %d" % len(inner), key=tenant.key, first=b"GET /v1/chat/completions HTTP/1.1"),
            _head(b"content-length: %d" % len(inner), key=tenant.key, first=b"POST /nope HTTP/1.1"),
            _head(b"content-length: %d" % len(inner), b"content-encoding: gzip", key=tenant.key),
            _head(b"content-length: %d" % (20 * 1024 * 1024), key=tenant.key),
        ]
        for head in refused:
            said = await spoken(gateway.port, head + inner)
            assert 400 <= statuses(said)[0] < 500
            assert provider.received == []


class TestRequestLine:
    @pytest.mark.parametrize(
        "first",
        [
            b"POST http://evil.test/v1/chat/completions HTTP/1.1",
            b"POST https://evil.test:1/v1/chat/completions HTTP/1.1",
            b"POST /v1/chat/completions#x HTTP/1.1",
            b"POST /v1/chat/completions?key=x HTTP/1.1",
            b"POST /v1/../v1/chat/completions HTTP/1.1",
            b"POST //v1/chat/completions HTTP/1.1",
            b"POST /v1/chat%2fcompletions HTTP/1.1",
            b"POST /v1/chat/completions%00 HTTP/1.1",
            b"POST \\v1\\chat\\completions HTTP/1.1",
            b"POST /v1/chat/completions HTTP/1.0",
            b"POST /v1/chat/completions HTTP/1.2",
            b"POST /v1/chat/completions HTTP/2.0",
            b"POST /v1/chat/completions HTTP/9",
            b"POST /v1/chat/completions",
            b"POST  /v1/chat/completions  HTTP/1.1",
            b"POST /v1/chat/completions HTTP/1.1 HTTP/1.1",
            b"P\x00ST /v1/chat/completions HTTP/1.1",
            b"CONNECT evil.test:443 HTTP/1.1",
            b"OPTIONS * HTTP/1.1",
            b"PRI * HTTP/2.0",
            b"POST /" + b"a" * 100_000 + b" HTTP/1.1",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ],
    )
    async def test_odd_request_lines_are_one_call_or_a_clear_no(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, first: bytes
    ) -> None:
        said = await spoken(gateway.port, _head(_LENGTH, key=tenant.key, first=first) + _BODY)
        found = statuses(said)
        assert len(found) <= 1
        assert all(status < 500 or status == 505 for status in found), said
        assert len(provider.received) == found.count(200)
        assert all(received.path == PATH for received in provider.received)
        assert b"evil" not in b"".join(received.head for received in provider.received)

    @pytest.mark.parametrize("hosts", [[], [b"host: a", b"host: b"], [b"host: "], [b"host: [::1"], [b"host: a\tb/c?d"]])
    async def test_the_host_decides_nothing(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, hosts: list[bytes]
    ) -> None:
        for first in (b"POST /v1/chat/completions HTTP/1.1", b"POST /nope HTTP/1.1", b"GET /v1/models HTTP/1.1"):
            said = await spoken(gateway.port, _head(*hosts, _LENGTH, key=tenant.key, first=first, host=False) + _BODY)
            assert all(status in {200, 400, 404} for status in statuses(said)), said
        assert all(received.header("host") == f"127.0.0.1:{provider.port}" for received in provider.received)


class TestPipelining:
    async def test_every_request_of_a_pipeline_is_answered_in_order(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        requests = [post(PATH, tenant.key, chat(text=f"number {number}")) for number in range(5)]
        wrong = post(PATH, "sk-wrong", chat(text="wrong"))
        connection = await RawConnection.open(gateway.port)
        await connection.send(b"".join([*requests[:3], wrong, *requests[3:]]))
        got = [(await connection.answer()).status for _ in range(6)]
        assert got == [200, 200, 200, 401, 200, 200]
        assert [b"number %d" % at in one.body for at, one in enumerate(provider.received)] == [True] * 5
        connection.close()

    async def test_each_request_on_a_connection_is_authenticated_by_itself(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        connection = await RawConnection.open(gateway.port)
        for key, status in ((tenant.key, 200), (None, 401), (tenant.key, 200), ("sk-wrong", 401)):
            await connection.send(post(PATH, key, chat()))
            assert (await connection.answer()).status == status
        connection.close()


class TestUpgrades:
    @pytest.mark.parametrize(
        "lines",
        [
            [
                b"connection: upgrade",
                b"upgrade: websocket",
                b"sec-websocket-version: 13",
                b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
            ],
            [b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: AAMAAABkAARAAAAAAAIAAAAA"],
            [b"connection: upgrade", b"upgrade: TLS/1.3"],
        ],
    )
    @pytest.mark.parametrize(
        "first", [b"POST /v1/chat/completions HTTP/1.1", b"GET /v1/models HTTP/1.1", b"GET /nope HTTP/1.1"]
    )
    async def test_no_upgrade_is_made(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, lines: list[bytes], first: bytes
    ) -> None:
        length = _LENGTH if first.startswith(b"POST") else b"content-length: 0"
        body = _BODY if first.startswith(b"POST") else b""
        said = await spoken(gateway.port, _head(length, *lines, key=tenant.key, first=first) + body)
        assert statuses(said)[0] in {200, 400, 404, 426}, said
        assert b" 101 " not in said

    async def test_expect_continue_is_answered_and_the_body_is_read(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        connection = await RawConnection.open(gateway.port)
        await connection.send(_head(_LENGTH, b"expect: 100-continue", key=tenant.key))
        assert (await connection.head())[0] == 100
        await connection.send(_BODY)
        assert (await connection.answer()).status == 200
        connection.close()

    async def test_who_may_not_call_is_told_so_before_the_body(self, gateway: Gateway, provider: FakeProvider) -> None:
        connection = await RawConnection.open(gateway.port)
        await connection.send(_head(_LENGTH, b"expect: 100-continue", key="sk-wrong"))
        assert (await connection.head())[0] == 401
        connection.close()


class TestSlowloris:
    async def test_a_head_in_drips_is_cut(self, gateway: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
        connection = await RawConnection.open(gateway.port)
        await connection.send(b"POST /v1/chat/completions HTTP/1.1\r\n")

        said = asyncio.create_task(connection.reader.read(-1))

        async def dripped() -> bool:
            connection.writer.write(b"x-a: b\r\n")
            await moment(0.1)
            return said.done()

        await eventually(dripped, 4)
        assert statuses(await said) == [408]
        connection.close()

    async def test_200_idle_connections_do_not_stop_a_good_caller_and_are_closed(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        idle = [await RawConnection.open(gateway.port) for _ in range(200)]
        for connection in idle[::2]:
            await connection.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost:")
        for _ in range(10):
            assert (await call(gateway.port, post(PATH, tenant.key, chat()))).status == 200
        for connection in idle:
            await connection.reader.read(-1)
            connection.close()
