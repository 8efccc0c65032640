"""A suspended organization: no new calls, everywhere within a second; running ones finish and are metered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from core.database import Database
from keys.lifecycle import NewKey
from keys.revocation import KeyChange, announce
from keys.scopes import ADMIN_SCOPES
from keys.tenants import set_status
from tests.harness.eventually import eventually
from tests.harness.place import Place, open_place
from tests.harness.provider import Exchange, FakeProvider, chunk
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

PATH = "/v1/chat/completions"


@pytest.fixture(scope="session")
async def place(
    stores: TestStores, shared_provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Place]:
    prices = {"fake": None}
    async with open_place(stores, shared_provider.base_url, tmp_path_factory.mktemp("suspended"), prices) as made:
        yield made


async def set_to(place: Place, tenant: Tenant, status: str, reason: str | None = None) -> None:
    async with place.database.transaction() as session:
        sequence = await set_status(session, status, reason, organization_id=tenant.organization_id)  # type: ignore[arg-type]
    change = KeyChange(sequence=sequence, organization_id=tenant.organization_id, key_id=None)
    assert (await announce(place.redis, change)).is_complete


class TestRefused:
    async def test_new_calls_are_refused_without_a_retry_and_go_on_once_it_is_resumed(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        assert (await call(place.port, post(PATH, tenant.key, chat()))).status == 200
        await set_to(place, tenant, "suspended", "payment_failed")
        got = await call(place.port, post(PATH, tenant.key, chat()))
        assert (got.status, got.headers["x-should-retry"]) == (429, "false")
        error = got.error()
        assert (error["type"], error["code"]) == ("insufficient_quota", "organization_suspended")
        assert "a payment has failed. Pay the open invoice" in str(error["message"])
        assert len(provider.received) == 1
        await set_to(place, tenant, "active")
        assert (await call(place.port, post(PATH, tenant.key, chat()))).status == 200

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/images/generations"])
    async def test_every_hot_route_refuses(self, place: Place, tenant: Tenant, path: str) -> None:
        await set_to(place, tenant, "suspended")
        body = msgspec.json.encode({"model": "fake", "prompt": "x", "input": "x"})
        assert (await call(place.port, post(path, tenant.key, body))).error()["code"] == "organization_suspended"

    async def test_an_operators_note_is_not_told(self, place: Place, tenant: Tenant) -> None:
        await set_to(place, tenant, "suspended", "looks like a stolen card")
        message = str((await call(place.port, post(PATH, tenant.key, chat()))).error()["message"])
        assert "stolen" not in message
        assert "the operator of this service" in message

    async def test_one_with_an_idempotency_key_may_be_sent_again_later(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        request = post(PATH, tenant.key, chat(), "idempotency-key: again")
        await set_to(place, tenant, "suspended")
        assert (await call(place.port, request)).error()["code"] == "organization_suspended"
        await set_to(place, tenant, "active")
        assert (await call(place.port, request)).status == 200


class TestStillWorks:
    async def test_an_answer_that_was_kept_is_given_again(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        request = post(PATH, tenant.key, chat(), "idempotency-key: kept")
        first = await call(place.port, request)
        await set_to(place, tenant, "suspended")
        again = await call(place.port, request)
        assert (first.status, again.status, again.body) == (200, 200, first.body)
        assert len(provider.received) == 1

    async def test_models_can_be_listed(self, place: Place, tenant: Tenant) -> None:
        await set_to(place, tenant, "suspended")
        head = f"GET /v1/models HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {tenant.key}\r\n\r\n"
        assert (await call(place.port, head.encode())).status == 200

    async def test_what_was_used_can_be_read(self, place: Place, database: Database, stores: TestStores) -> None:
        admin = await new_tenant(database, stores.pepper, NewKey(name="books", scopes=ADMIN_SCOPES))
        await set_to(place, admin, "suspended")
        head = f"GET /v1/organization/usage/completions?start_time=1 HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {admin.key}"
        assert (await call(place.port, f"{head}\r\n\r\n".encode())).status == 200

    async def test_a_running_stream_finishes_and_is_entered(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        may_end = asyncio.Event()

        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_events(chunk("a"), end=False)
            await may_end.wait()
            await exchange.send_events(chunk("b"), chunk(finish="stop"), chunk(usage=(5, 7)))

        provider.scripts.append(play)
        connection = await RawConnection.open(place.port)
        await connection.send(post(PATH, tenant.key, chat(stream=True)))
        _, headers = await connection.head()
        assert b'"a"' in await connection.chunk()
        await set_to(place, tenant, "suspended", "subscription_ended")
        may_end.set()
        assert (await connection.body(headers)).endswith(b"data: [DONE]\n\n")
        connection.close()
        entry = await eventually(lambda: place.entry(tenant))
        assert (entry["input_tokens"], entry["output_tokens"], entry["outcome"]) == (5, 7, "done")
