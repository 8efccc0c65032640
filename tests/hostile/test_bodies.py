"""Bodies that are too large, too deep, not JSON, or not what their headers say: a clear error, in bounded memory."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.database import Database
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway
from tests.harness.memory import MEGABYTE, forget_peak, resident_bytes_peak
from tests.harness.provider import FakeProvider
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant
from tests.hostile.conftest import BODY_BYTES_MAX, PATH, assert_clear_error

_DEEP = 100_000


def _sized(size_bytes: int) -> bytes:
    """A good request of exactly that size."""
    empty = chat(text="")
    return chat(text="a" * (size_bytes - len(empty)))


def _head(key: str, *lines: str) -> bytes:
    fixed = (f"POST {PATH} HTTP/1.1", "host: a", "content-type: application/json", f"authorization: Bearer {key}")
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


class TestTooLarge:
    async def test_one_byte_more_than_the_limit_is_refused_before_it_is_sent(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        for size in (BODY_BYTES_MAX + 1, 2**40, 2**63):
            connection = await RawConnection.open(gateway.port)
            await connection.send(_head(tenant.key, f"content-length: {size}"))
            got = await connection.answer()
            assert (got.status, assert_clear_error(got)["code"]) == (413, "request_too_large")
            connection.close()
        assert provider.received == []

    async def test_the_exact_limit_is_accepted_and_arrives_whole(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        got = await call(gateway.port, post(PATH, tenant.key, _sized(BODY_BYTES_MAX)))
        assert got.status == 200
        assert provider.received[-1].body.count(b"a" * 10_000_000) == 1

    async def test_chunks_without_end_are_refused_in_bounded_memory(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        pid = gateway.processes[0].pid
        await call(gateway.port, post(PATH, tenant.key, _sized(BODY_BYTES_MAX)))
        before = forget_peak(pid)
        connection = await RawConnection.open(gateway.port)
        await connection.send(_head(tenant.key, "transfer-encoding: chunked"))
        sent_bytes = 0
        chunk = b"100000\r\n" + b" " * MEGABYTE + b"\r\n"
        try:
            while sent_bytes < 200 * MEGABYTE:
                await asyncio.wait_for(connection.send(chunk), 5)
                sent_bytes += MEGABYTE
        except (ConnectionError, TimeoutError):
            # The answer was sent while we were sending: the rest is refused by the closed connection.
            pass
        line = await eventually(
            lambda: next((c for c in gateway.calls() if c.get("key_id") == tenant.key_id and c["status"] != 200), None)
        )
        assert (line["status"], line["error_code"]) == (413, "request_too_large")
        assert sent_bytes < 100 * MEGABYTE
        assert resident_bytes_peak(pid) - before < 48 * MEGABYTE
        assert len(provider.received) == 1
        connection.reset()

    @pytest.mark.parametrize("path", ["/v1/models", "/nope", "/metrics", "/livez"])
    async def test_no_other_route_takes_a_large_body_either(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, path: str
    ) -> None:
        connection = await RawConnection.open(gateway.port)
        await connection.send(
            f"POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {tenant.key}\r\ncontent-length: {2**33}\r\n\r\n".encode()
        )
        assert 400 <= (await connection.answer()).status < 500
        connection.close()


_ODD = {
    "nothing": b"",
    "null": b"null",
    "an array": b"[]",
    "a number": b"1",
    "a text": b'"x"',
    "half an object": b'{"model":"fake"',
    "two objects": b'{"model":"fake"}{}',
    "a trailing comma": b'{"model":"fake","messages":[],}',
    "single quotes": b"{'model':'fake'}",
    "a byte order mark": b"\xef\xbb\xbf" + chat(),
    "UTF-16": chat().decode().encode("utf-16"),
    "a NUL between": b'{"model":\x00"fake"}',
    "a NUL in a text": b'{"model":"fa\x00ke","messages":[]}',
    "bad UTF-8 in the model": b'{"model":"\xff\xfe","messages":[]}',
    "a lone surrogate as the model": b'{"model":"\\ud800","messages":[]}',
    "a lone surrogate as a name": b'{"\\ud800":1,"model":"nope","messages":[]}',
    "NaN": b'{"model":"fake","n":NaN}',
    "an object as the model": b'{"model":{"a":1},"messages":[]}',
    "an array as the model": b'{"model":["fake"],"messages":[]}',
    "a number as the model": b'{"model":1,"messages":[]}',
    "null as the model": b'{"model":null,"messages":[]}',
    "no model": b'{"messages":[]}',
    "an empty model": b'{"model":"","messages":[]}',
    "a text as stream": b'{"model":"fake","messages":[],"stream":"true"}',
    "a huge number as stream": b'{"model":"fake","messages":[],"stream":1e400}',
    "an array as stream options": b'{"model":"fake","messages":[],"stream":true,"stream_options":[]}',
    "a text as include_usage": b'{"model":"fake","messages":[],"stream":true,"stream_options":{"include_usage":"x"}}',
    "deep arrays": b"[" * _DEEP + b"]" * _DEEP,
    "deep arrays without end": b"[" * _DEEP,
    "deep objects": b'{"a":' * _DEEP + b"1" + b"}" * _DEEP,
    "deep arrays as the model": b'{"model":' + b"[" * _DEEP + b"]" * _DEEP + b"}",
    "deep stream options": b'{"model":"fake","stream":true,"stream_options":' + b"[" * _DEEP + b"]" * _DEEP + b"}",
    "deep messages": b'{"model":"fake","messages":' + b"[" * _DEEP + b"]" * _DEEP + b"}",
    "deep objects as messages": b'{"model":"fake","messages":' + b'{"a":' * _DEEP + b"1" + b"}" * _DEEP + b"}",
}


class TestOdd:
    @pytest.mark.parametrize("name", _ODD)
    async def test_an_odd_body_is_a_clear_400_or_404(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        got = await call(gateway.port, post(PATH, tenant.key, _ODD[name]))
        assert_clear_error(got)
        assert got.status in {400, 404}
        assert provider.received == []

    @pytest.mark.parametrize(
        "value", ["1e999", "-1", "9" * 400, "1.5", "null", '"x"', "[]", "true", "0", "-0", "1E-999"]
    )
    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n", "temperature"])
    async def test_odd_numbers_are_the_providers_business_and_reserve_no_nonsense(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, name: str, value: str
    ) -> None:
        body = b'{"model":"fake","messages":[],"%b":%b}' % (name.encode(), value.encode())
        got = await call(gateway.port, post(PATH, tenant.key, body))
        if got.status != 200:
            assert_clear_error(got)
            assert provider.received == []
            return
        assert value.encode() in provider.received[-1].body
        assert 0 < int(got.headers.get("x-ratelimit-remaining-tokens", "1")) < 10_000_000

    async def test_of_repeated_names_the_provider_sees_one(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        names = {b'"stream"': b"true", b'"max_tokens"': b"999999", b'"n"': b"100", b'"stre\\u0061m"': b"true"}
        for name, first in names.items():
            body = b'{%b:%b,"model":"fake","messages":[],"stream":false,"max_tokens":1,"n":1}' % (name, first)
            assert (await call(gateway.port, post(PATH, tenant.key, body))).status == 200
            seen = provider.received[-1]
            assert (seen.json()["stream"], seen.json()["max_tokens"], seen.json()["n"]) == (False, 1, 1)
            assert b"u0061" not in seen.body
            assert seen.body.count(b'"stream"') == 1

    async def test_usage_cannot_be_switched_off_by_a_repeated_name(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        """Guarantee: whichever of two names a provider takes, it reports usage."""
        for options in (
            b'{"include_usage":false,"include_usage":true}',
            b'{"include_usage":true,"include_usage":false}',
        ):
            body = b'{"model":"fake","messages":[],"stream":true,"stream_options":%b}' % options
            assert (await call(gateway.port, post(PATH, tenant.key, body))).status == 200
            assert b"false" not in provider.received[-1].body.partition(b'"stream_options"')[2]

    async def test_surrogates_and_bad_bytes_in_a_message_break_nothing(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        for text in (b"\\ud800", b"\\udc00\\ud800", b"\xff", b"\\u0000", b"\xed\xa0\x80", b"a" * 40_000 + b"\xff"):
            body = b'{"model":"fake","messages":[{"role":"user","content":"%b"}]}' % text
            got = await call(gateway.port, post(PATH, tenant.key, body))
            assert got.status == 200 or assert_clear_error(got)


class TestContentType:
    @pytest.mark.parametrize(
        "content_type",
        ["text/plain", "application/xml", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx",
         "json", "/", ";", "*/*", "application/json, text/plain", "application\\json", "text/plain; application/json"],
    )  # fmt: skip
    async def test_another_type_is_415(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, content_type: str
    ) -> None:
        got = await call(gateway.port, post(PATH, tenant.key, chat(), content_type=content_type))
        assert (got.status, assert_clear_error(got)["code"]) == (415, "unsupported_content_type")
        assert provider.received == []

    @pytest.mark.parametrize(
        "content_type", ["application/json", "Application/JSON", "application/json;charset=utf-8", None, ""]
    )
    async def test_json_in_every_spelling_is_taken(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, content_type: str | None
    ) -> None:
        assert (await call(gateway.port, post(PATH, tenant.key, chat(), content_type=content_type))).status == 200

    @pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, identity", "x", ""])
    async def test_encoded_bodies_are_refused_unread(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, encoding: str
    ) -> None:
        got = await call(gateway.port, post(PATH, tenant.key, chat(), f"content-encoding: {encoding}"))
        assert got.status == (415 if encoding else got.status)
        assert got.status in {200, 415}


class TestModelNames:
    @pytest.mark.parametrize(
        "model",
        ["a\r\nx-injected: 1", "a\nb", "\x00", "\x7f", "\u202efake", "a" * 10_000, "a" * 256, "../fake", "org/../fake", "/fake",
         "fake/", "fake\\", "fake%00", "fake?x=1", "fake#x", "FAKE", " fake", "fake ", "{{fake}}", "'; --", "\u2028", "é" * 200],
    )  # fmt: skip
    async def test_an_odd_model_name_is_a_clear_error_and_no_header(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        error = assert_clear_error(got)
        assert got.status in {400, 404}
        assert len(str(error["message"])) < 500
        assert "x-injected" not in got.headers
        assert provider.received == []


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_NAMES = ("model", "messages", "stream", "stream_options", "max_tokens", "n", "user", "tools", "include_usage")
_bodies = st.dictionaries(
    st.sampled_from(_NAMES), _json | st.just("fake") | st.just({"include_usage": True}), max_size=6
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=_bodies)
@example(body={"model": "fake", "stream": True, "stream_options": {"include_usage": None}})
async def test_any_json_is_answered_or_refused_clearly(
    gateway: Gateway, provider: FakeProvider, fuzzer: Tenant, body: dict[str, object]
) -> None:
    got = await call(gateway.port, post(PATH, fuzzer.key, msgspec.json.encode(body)))
    assert got.status == 200 or assert_clear_error(got)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 200), junk=st.binary(max_size=8), cut=st.integers(0, 30))
async def test_any_damage_to_a_good_body_is_answered_or_refused_clearly(
    gateway: Gateway, provider: FakeProvider, fuzzer: Tenant, at: int, junk: bytes, cut: int
) -> None:
    good = chat(stream=True, stream_options={"include_usage": True}, max_tokens=5, n=1)
    got = await call(gateway.port, post(PATH, fuzzer.key, good[:at] + junk + good[at + cut :]))
    assert got.status == 200 or assert_clear_error(got)


@pytest.fixture(scope="module")
async def fuzzer(database: Database, stores: TestStores) -> Tenant:
    return await new_tenant(database, stores.pepper)
