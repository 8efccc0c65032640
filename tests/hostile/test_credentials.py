"""What stands where a key should be: never a query, never a 500, never shown to anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from core.database import Database
from keys.secrets import mint
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import FakeProvider
from tests.harness.raw import RawAnswer, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant
from tests.hostile.conftest import PATH, assert_clear_error, spoken, statuses

_INJECTIONS = [
    "' OR '1'='1",
    "'; DROP TABLE api_keys; --",
    "sk-aap-' UNION SELECT 1,2,3 --",
    "\\",
    "%00",
    "%s%s%s%n",
    "${jndi:ldap://127.0.0.1/a}",
    "{{7*7}}",
    "../../etc/passwd",
    "null",
    "undefined",
    "sk-aap-" + "a" * 59,
    "sk-aap-" + "0" * 58,
    "sk-aap-",
    "Bearer Bearer",
    "a" * 60_000,
]


def _request(*lines: bytes) -> bytes:
    body = chat()
    fixed = [b"POST /v1/chat/completions HTTP/1.1", b"host: a", b"content-type: application/json"]
    return b"\r\n".join([*fixed, *lines, b"content-length: %d" % len(body), b"", b""]) + body


def _refused(got: RawAnswer) -> None:
    error = assert_clear_error(got)
    assert got.status == 401
    assert error["code"] in {"invalid_api_key", None}


class TestRefused:
    @pytest.mark.parametrize("text", _INJECTIONS)
    @pytest.mark.parametrize("header", ["authorization: Bearer ", "x-api-key: ", "api-key: ", "authorization: "])
    async def test_an_injection_is_a_wrong_key(
        self, gateway: Gateway, provider: FakeProvider, text: str, header: str
    ) -> None:
        _refused(await call(gateway.port, _request(f"{header}{text}".encode())))
        assert provider.received == []

    @pytest.mark.parametrize(
        "value",
        [
            b"Bearer \xff\xfe\xfd",
            "Bearer ключ".encode(),
            b"Bearer \xc2\xa0",
            b"Bearer",
            b"Bearer  ",
            b"",
            b"Basic c2s6YQ==",
            b"bearer\tx",
            b"Negotiate",
            b"Bearer a b",
        ],
    )
    async def test_odd_bytes_are_a_wrong_key(self, gateway: Gateway, provider: FakeProvider, value: bytes) -> None:
        _refused(await call(gateway.port, _request(b"authorization: " + value)))

    @pytest.mark.parametrize("value", [b"Bearer a\x00b", b"Bearer a\rb", b"Bearer a\nb", b"Bearer " + b"a" * 1_000_000])
    async def test_what_no_header_can_carry_never_reaches_the_keys(
        self, gateway: Gateway, provider: FakeProvider, value: bytes
    ) -> None:
        found = statuses(await spoken(gateway.port, _request(b"authorization: " + value)))
        assert all(400 <= status < 500 for status in found)
        assert provider.received == []

    async def test_a_key_with_one_letter_changed_is_wrong(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        for at in range(0, len(tenant.key), 5):
            other = "x" if tenant.key[at] != "x" else "y"
            _refused(await call(gateway.port, post(PATH, tenant.key[:at] + other + tenant.key[at + 1 :], chat())))
        for near in (tenant.key[:-1], tenant.key + "a", tenant.key.upper(), tenant.key[7:], " ".join(tenant.key)):
            _refused(await call(gateway.port, post(PATH, near, chat())))


class TestSeveral:
    async def test_the_same_key_in_every_header_is_one_key(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        key = tenant.key.encode()
        for lines in (
            [b"x-api-key: " + key],
            [b"api-key: " + key],
            [b"authorization: bearer " + key, b"x-api-key: " + key],
        ):
            assert (await call(gateway.port, _request(*lines))).status == 200

    async def test_different_keys_are_refused_in_every_order(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, database: Database, stores: TestStores
    ) -> None:
        mine, theirs = tenant.key.encode(), (await new_tenant(database, stores.pepper)).key.encode()
        forms = (b"authorization: Bearer %b", b"x-api-key: %b", b"api-key: %b")
        for first in forms:
            for second in forms:
                _refused(await call(gateway.port, _request(first % mine, second % theirs)))
                _refused(await call(gateway.port, _request(first % mine, second % b"nonsense")))
        assert provider.received == []

    async def test_a_key_joined_with_another_by_a_comma_is_wrong(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        key = tenant.key.encode()
        _refused(await call(gateway.port, _request(b"authorization: Bearer " + key + b", Bearer " + key)))


@pytest.fixture(scope="module")
async def strict(stores: TestStores, shared_provider: FakeProvider, tmp_path_factory) -> AsyncIterator[Gateway]:
    """A gateway whose failed authentications are its own."""
    directory: Path = tmp_path_factory.mktemp("strict")
    async with Gateway(stores, directory, config_for(shared_provider.base_url)) as made:
        yield made


class TestGuessing:
    async def test_guessers_are_slowed_down_and_known_keys_are_not(
        self, strict: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        assert (await call(strict.port, post(PATH, tenant.key, chat()))).status == 200
        got = [await call(strict.port, post(PATH, mint().text, chat())) for _ in range(70)]
        assert {one.status for one in got} == {401, 429}
        slowed = assert_clear_error(got[-1])
        assert slowed["code"] == "too_many_failed_authentications"
        assert int(got[-1].headers["retry-after"]) >= 1
        assert (await call(strict.port, post(PATH, tenant.key, chat()))).status == 200


class TestCanary:
    async def test_a_key_is_found_nowhere_after_every_kind_of_failure(
        self, stores: TestStores, provider: FakeProvider, database: Database, redis: Redis, workdir: Path
    ) -> None:
        """Guarantee: log, answers, metrics, Redis and PostgreSQL hold no key, whatever place it was sent in."""
        canary = (await new_tenant(database, stores.pepper)).key
        unknown = mint().text
        said = b""
        async with Gateway(stores, workdir, config_for(provider.base_url), AAP_LOG_LEVEL="debug") as gateway:
            requests = _everywhere(canary) + _everywhere(unknown)
            said += b"".join(await asyncio.gather(*(spoken(gateway.port, request) for request in requests)))
            said += (await call(gateway.port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")).body
            await eventually(lambda: len(gateway.calls()) > 10)
            log = gateway.log.encode() + b"".join(path.read_bytes() for path in workdir.rglob("*.json"))
        rows = await _every_row(stores.database_url)
        entries = await _every_value(redis)
        # The canary must be able to be found: its hint is in the database, its organization's buckets in Redis.
        assert canary[:11].encode() in rows
        assert b"q:{org_" in entries
        for key in (canary, unknown):
            secret = key[17:].encode()
            places = {"answers": said, "log": log, "rows": rows, "redis": entries}
            assert [place for place, text in places.items() if secret in text] == []


def _everywhere(key: str) -> list[bytes]:
    """Requests with the key in every place where somebody may put it."""
    return [
        post(PATH, key, chat()),
        post(PATH, key, chat("nope")),
        post(PATH, key, b"{"),
        post(PATH, key, b"[]"),
        post(PATH, key, chat(key)),
        post(PATH, key, chat(f"{key}/x")),
        post(PATH, key, chat("fake", stream=key)),
        post(PATH, key, chat("fake", stream_options=key, stream=True)),
        post(PATH, key, chat("fake", user=key)),
        post(PATH, key, chat(), f"x-api-key: {key}x"),
        post(PATH, key, chat(), f"x-request-id: {key}"),
        post(PATH, key, chat(), f"idempotency-key: {key}"),
        post(PATH, None, chat(), f"authorization: Basic {key}"),
        post(PATH, None, chat(), f"authorization: {key}"),
        post(PATH, None, chat(), f"cookie: key={key}"),
        post(PATH + f"?api_key={key}", None, chat()),
        post(f"/v1/{key}", None, chat()),
        post(PATH, key, chat(), content_type=key),
        post(PATH, key, chat(), f"content-encoding: {key}"),
        post("/v1/audio/transcriptions", key, b"x", content_type=f"multipart/form-data; boundary={key}"),
        f"GET /v1/models/{key} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n\r\n".encode(),
        f"GET /{key} HTTP/1.1\r\nhost: a\r\n\r\n".encode(),
        f"GET /readyz?verbose={key} HTTP/1.1\r\nhost: {key}\r\n\r\n".encode(),
        f"{key} /v1/models HTTP/1.1\r\nhost: a\r\n\r\n".encode(),
    ]


async def _every_row(url: str) -> bytes:
    connection = await asyncpg.connect(url)
    try:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        rows = [await connection.fetch(f'SELECT t::text AS row FROM "{table[0]}" AS t') for table in tables]
        return "\n".join(row["row"] for found in rows for row in found).encode()
    finally:
        await connection.close()


async def _every_value(redis: Redis) -> bytes:
    pieces: list[bytes] = []
    async for key in redis.scan_iter(count=1_000):
        pieces += [key, await redis.dump(key) or b""]
    return b"\n".join(pieces)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=st.binary(max_size=200).filter(lambda value: not set(value) & set(b"\r\n\x00")))
async def test_no_header_value_whatever_gets_in_or_breaks_anything(
    gateway: Gateway, provider: FakeProvider, value: bytes
) -> None:
    provider.received.clear()
    found = statuses(await _quick(gateway.port, _request(b"authorization: " + value)))
    assert all(status in {400, 401, 429, 431} for status in found)
    assert provider.received == []


async def _quick(port: int, request: bytes) -> bytes:
    """Everything up to the close that we ask for."""
    head, _, body = request.partition(b"\r\n\r\n")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head + b"\r\nconnection: close\r\n\r\n" + body)
        return await asyncio.wait_for(reader.read(-1), 10)
    except ConnectionError:
        return b""
    finally:
        writer.close()
