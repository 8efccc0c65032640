"""Plans over real sockets: what is included is answered, the rest refused; another plan holds within a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import msgspec
import pytest

from core.clock import SystemClock
from keys.allowances import AllowanceUnit, month_of
from keys.revocation import KeyChange, announce
from keys.tenants import set_plan
from metering.verify_redis import AllowanceInRedis, compare_allowances
from tests.harness.eventually import eventually
from tests.harness.place import Place, open_place
from tests.harness.provider import Exchange, FakeProvider, answer, chat_answer, chunk
from tests.harness.raw import RawAnswer, RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
PLANS = """
[plans.tiny.limits]
chat_requests_per_month = 2
[plans.words.limits]
tokens_per_month = 100
[plans.big.limits]
chat_requests_per_month = 4
[plans.unlimited]
"""


@pytest.fixture(scope="session")
async def place(
    stores: TestStores, shared_provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Place]:
    directory = tmp_path_factory.mktemp("plans")
    async with open_place(stores, shared_provider.base_url, directory, {"fake": None}, PLANS) as made:
        await made.gateway.add_process()
        yield made


async def put_on(place: Place, tenant: Tenant, plan: str | None) -> None:
    async with place.database.transaction() as session:
        sequence = await set_plan(session, plan, organization_id=tenant.organization_id)
    change = KeyChange(sequence=sequence, organization_id=tenant.organization_id, key_id=None)
    assert (await announce(place.redis, change)).is_complete


async def say(place: Place, tenant: Tenant, **more: object) -> RawAnswer:
    return await call(place.port, post(CHAT, tenant.key, chat(**more)))  # type: ignore[arg-type]


async def refused_by(place: Place, tenant: Tenant) -> set[object]:
    """What refuses so many calls that both processes are among those who answer; None for one that is admitted."""
    found = [await say(place, tenant, max_completion_tokens=9) for _ in range(16)]
    return {None if one.status == 200 else one.error()["param"] for one in found}


async def used(place: Place, tenant: Tenant, unit: AllowanceUnit) -> int:
    """What Redis and PostgreSQL agree upon, once no call runs."""

    async def look() -> AllowanceInRedis | None:
        for one in await compare_allowances(place.database, place.redis, SystemClock()):
            if (one.organization_id, one.unit) == (tenant.organization_id, unit):
                return one if one.agrees and not one.held else None
        return None

    return (await eventually(look)).used


class TestChatRequests:
    async def test_what_is_included_is_answered_and_the_rest_refused_for_good(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await put_on(place, tenant, "tiny")
        assert [(await say(place, tenant)).status for _ in range(2)] == [200, 200]
        got = await say(place, tenant)
        assert (got.status, got.headers["x-should-retry"]) == (429, "false")
        assert "retry-after" not in got.headers
        error = got.error()
        assert (error["type"], error["code"]) == ("insufficient_quota", "plan_limit_reached")
        assert error["param"] == "organization.plan.chat_requests_per_month"
        renews_at = month_of(datetime.now(UTC))[1]
        assert f"2 chat requests a month. It is renewed at {renews_at:%Y-%m-%dT%H:%M:%SZ}" in str(error["message"])
        assert len(provider.received) == 2
        assert await used(place, tenant, "chat_requests") == 2

    async def test_what_is_no_chat_goes_on(self, place: Place, provider: FakeProvider, tenant: Tenant) -> None:
        await put_on(place, tenant, "tiny")
        body = msgspec.json.encode({"model": "fake", "input": "x"})
        for _ in range(4):
            assert (await call(place.port, post(EMBEDDINGS, tenant.key, body))).status == 200
        assert (await say(place, tenant)).status == 200
        assert await used(place, tenant, "chat_requests") == 1

    async def test_a_call_that_its_provider_refuses_takes_nothing(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await put_on(place, tenant, "tiny")
        for _ in range(3):
            provider.scripts.append(answer(b'{"error": {"message": "no"}}', 400))
            assert (await say(place, tenant)).status == 400
            assert await used(place, tenant, "chat_requests") == 0
        assert [(await say(place, tenant)).status for _ in range(3)] == [200, 200, 429]

    async def test_a_running_stream_holds_its_place_and_finishes(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        may_end = asyncio.Event()

        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_events(chunk("a"), end=False)
            await may_end.wait()
            await exchange.send_events(chunk(finish="stop"), chunk(usage=(5, 7)))

        await put_on(place, tenant, "tiny")
        provider.scripts.append(play)
        connection = await RawConnection.open(place.port)
        await connection.send(post(CHAT, tenant.key, chat(stream=True)))
        _, headers = await connection.head()
        assert [(await say(place, tenant)).status for _ in range(2)] == [200, 429]
        may_end.set()
        assert (await connection.body(headers)).endswith(b"data: [DONE]\n\n")
        connection.close()
        assert await used(place, tenant, "chat_requests") == 2


class TestTokens:
    async def test_they_count_as_reported_whatever_the_call(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await put_on(place, tenant, "words")
        provider.default = answer(chat_answer(usage=(30, 20)))
        assert (await say(place, tenant, max_completion_tokens=40)).status == 200
        assert await used(place, tenant, "tokens") == 50
        body = msgspec.json.encode({"model": "fake", "input": "x"})
        assert (await call(place.port, post(EMBEDDINGS, tenant.key, body))).status == 200
        assert await used(place, tenant, "tokens") > 50

    async def test_an_answer_that_may_not_fit_says_what_is_left(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await put_on(place, tenant, "words")
        error = (await say(place, tenant, max_completion_tokens=500)).error()
        assert (error["code"], error["param"]) == ("plan_limit_reached", "organization.plan.tokens_per_month")
        assert "has 100 of 100 left this month. Shorten it, or set a smaller max_completion_tokens" in str(
            error["message"]
        )
        assert provider.received == []


class TestChanges:
    async def test_another_plan_holds_on_every_process_and_keeps_what_was_used(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await put_on(place, tenant, "tiny")
        assert [(await say(place, tenant)).status for _ in range(3)] == [200, 200, 429]
        await put_on(place, tenant, "big")
        assert [(await say(place, tenant)).status for _ in range(3)] == [200, 200, 429]
        for plan in ("unlimited", None, "not-there-any-more"):
            await put_on(place, tenant, plan)
            assert {(await say(place, tenant)).status for _ in range(4)} == {200}

    async def test_a_changed_file_holds_within_a_second(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await put_on(place, tenant, "tiny")
        assert [(await say(place, tenant)).status for _ in range(3)] == [200, 200, 429]
        before = place.gateway.config_path.read_text()
        place.gateway.config_path.write_text(before.replace("chat_requests_per_month = 2", "tokens_per_month = 20000"))
        try:
            await eventually(lambda: self.is_so(place, tenant, None))
        finally:
            place.gateway.config_path.write_text(before)
        # Not by the tokens, which it had for a moment.
        await eventually(lambda: self.is_so(place, tenant, "organization.plan.chat_requests_per_month"))

    async def is_so(self, place: Place, tenant: Tenant, param: str | None) -> bool:
        return await refused_by(place, tenant) == {param}


async def test_a_redis_that_forgot_does_not_give_a_month_twice(
    place: Place, provider: FakeProvider, tenant: Tenant
) -> None:
    await put_on(place, tenant, "tiny")
    assert (await say(place, tenant)).status == 200
    assert await used(place, tenant, "chat_requests") == 1
    async for name in place.redis.scan_iter(f"q:{{{tenant.organization_id}}}:*"):
        await place.redis.delete(name)
    assert [(await say(place, tenant)).status for _ in range(2)] == [200, 429]
