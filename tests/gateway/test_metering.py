"""From a call over a real socket to its entry: usage, price, cost, budgets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from metering.prices import add_price
from metering.rating import PriceTerms, Rates, Step
from tests.harness.eventually import eventually
from tests.harness.place import Place, open_place
from tests.harness.provider import Exchange, FakeProvider, answer, chat_answer, chunk, stream
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

PATH = "/v1/chat/completions"
# $2 and $8 per million.
RATES = Rates(input_tokens=2_000_000_000, cached_input_tokens=500_000_000, output_tokens=8_000_000_000)


def terms(rates: Rates = RATES, **tiers: Rates) -> PriceTerms:
    return PriceTerms(tiers={"default": (Step(rates=rates),), **{k: (Step(rates=v),) for k, v in tiers.items()}})


@pytest.fixture(scope="session")
async def place(
    stores: TestStores, shared_provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Place]:
    priced = terms(priority=Rates(input_tokens=4_000_000_000, output_tokens=10**10))
    prices = {"priced": priced, "unpriced": None}
    async with open_place(stores, shared_provider.base_url, tmp_path_factory.mktemp("metering"), prices) as made:
        yield made


def usage_answer(usage: dict[str, Any], **more: Any) -> bytes:
    return msgspec.json.encode({**msgspec.json.decode(chat_answer()), "usage": usage, **more})


class TestEntries:
    async def test_an_answer_is_entered_as_its_provider_reports_it(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        usage = {
            "prompt_tokens": 1_000,
            "completion_tokens": 50,
            "total_tokens": 1_050,
            "prompt_tokens_details": {"cached_tokens": 600},
            "completion_tokens_details": {"reasoning_tokens": 20},
        }
        provider.scripts.append(answer(usage_answer(usage)))
        got = await call(place.port, post(PATH, tenant.key, chat("priced")))
        # 400 x $2 + 600 x $0.50 + 50 x $8, per million.
        assert (got.status, got.headers["x-request-cost-usd"]) == (200, "0.0015")
        entry = await place.entry(tenant)
        units = ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens")
        assert [entry[name] for name in units] == [400, 600, 30, 20]
        assert entry["cost_nano_usd"] == entry["charge_nano_usd"] == 1_500_000
        assert (entry["quality"], entry["status"], entry["requests"], entry["outcome"]) == ("exact", 200, 1, "done")
        assert entry["request_id"] == got.headers["x-request-id"]
        assert (entry["key_id"], entry["project_id"]) == (tenant.key_id, tenant.project_id)
        assert (entry["model"], entry["deployment"], entry["operation"]) == ("priced", "p0/priced", "chat")
        assert entry["price_id"] == entry["charge_price_id"] is not None
        assert await place.intents(tenant) == 0

    async def test_the_tier_that_was_served_is_the_tier_that_is_billed(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        provider.scripts.append(answer(usage_answer(usage, service_tier="priority")))
        got = await call(place.port, post(PATH, tenant.key, chat("priced")))
        assert got.headers["x-request-cost-usd"] == "0.0005"
        assert (await place.entry(tenant))["service_tier"] == "priority"

    async def test_a_stream_is_entered_by_its_last_chunk(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(stream("a", "b", usage=(100, 10)))
        got = await call(place.port, post(PATH, tenant.key, chat("priced", stream=True)))
        assert b"usage" not in got.body
        assert b"cost_usd" not in got.body
        entry = await place.entry(tenant)
        assert (entry["input_tokens"], entry["output_tokens"], entry["cost_nano_usd"]) == (100, 10, 280_000)
        assert entry["quality"] == "exact"
        assert entry["first_byte_ms"] is not None

    async def test_a_stream_says_its_cost_to_who_asks(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(stream("a", usage=(100, 10)))
        body = chat("priced", stream=True, stream_options={"include_usage": True, "include_cost": True})
        got = await call(place.port, post(PATH, tenant.key, body))
        [line] = [line for line in got.body.split(b"\n\n") if b"cost_usd" in line]
        told = msgspec.json.decode(line.removeprefix(b"data: "))
        assert told["usage"] == {
            "prompt_tokens": 100,
            "completion_tokens": 10,
            "total_tokens": 110,
            "cost_usd": "0.00028",
        }
        assert provider.received[-1].json()["stream_options"] == {"include_usage": True}

    async def test_a_refusal_of_the_provider_is_entered_and_costs_nothing(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(answer(b'{"error":{"message":"no"}}', status=400))
        got = await call(place.port, post(PATH, tenant.key, chat("priced")))
        assert got.status == 400
        entry = await place.entry(tenant)
        assert (entry["cost_nano_usd"], entry["requests"], entry["status"]) == (0, 0, 400)
        assert not entry["is_unpriced"]

    async def test_an_unpriced_model_is_entered_as_such_and_never_as_free(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        got = await call(place.port, post(PATH, tenant.key, chat("unpriced")))
        assert (got.status, "x-request-cost-usd" in got.headers) == (200, False)
        entry = await place.entry(tenant)
        assert (entry["is_unpriced"], entry["price_id"], entry["output_tokens"]) == (True, None, 7)

    async def test_an_organizations_own_price_is_charged_and_the_providers_cost_stands_beside_it(
        self, place: Place, provider: FakeProvider, stores: TestStores
    ) -> None:
        tenant = await new_tenant(place.database, stores.pepper)
        own = Rates(input_tokens=10**9, output_tokens=10**9)
        async with place.database.transaction() as session:
            await add_price(session, "priced", terms(own), organization_id=tenant.organization_id)

        async def charged() -> str:
            return (await call(place.port, post(PATH, tenant.key, chat("priced")))).headers["x-request-cost-usd"]

        # 5 in, 7 out: $1 a million each, once the gateway has read the new price.
        async def is_new() -> bool:
            return await charged() == "0.000012"

        await eventually(is_new, 10)
        entry = (await eventually(lambda: place.entries(tenant)))[-1]
        await eventually(lambda: _is_last(place, tenant, 12_000))
        entry = (await place.entries(tenant))[-1]
        assert (entry["charge_nano_usd"], entry["cost_nano_usd"]) == (12_000, 66_000)
        assert entry["price_id"] != entry["charge_price_id"]


async def _is_last(place: Place, tenant: Tenant, charge: int) -> bool:
    return (await place.entries(tenant))[-1]["charge_nano_usd"] == charge


class TestIntents:
    async def test_no_byte_goes_to_the_caller_before_the_intent_is_durable(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        seen = asyncio.Event()
        go_on = asyncio.Event()

        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_events(chunk("a"), end=False)
            seen.set()
            await go_on.wait()
            await exchange.send_events(chunk(finish="stop"), chunk(usage=(5, 7)))

        provider.scripts.append(play)
        connection = await RawConnection.open(place.port)
        await connection.send(post(PATH, tenant.key, chat("priced", stream=True)))
        await connection.head()
        assert await place.intents(tenant) == 1
        go_on.set()
        await eventually(lambda: place.entries(tenant))
        assert await place.intents(tenant) == 0
        connection.close()

    async def test_calls_that_nobody_worked_on_are_not_entered(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        for body in (chat("absent"), b"{"):
            assert (await call(place.port, post(PATH, tenant.key, body))).status in {400, 404}
        await call(place.port, post(PATH, tenant.key, chat("priced")))
        assert (await place.entry(tenant))["status"] == 200


class TestHardBudgets:
    async def test_a_full_budget_refuses_as_insufficient_quota_and_tells_not_to_retry(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await place.set_budget(tenant, 10_000_000)
        small = chat("priced", max_completion_tokens=10)
        got = await call(place.port, post(PATH, tenant.key, small))
        assert got.status == 200
        # Without a bound the model's longest answer must fit.
        got = await call(place.port, post(PATH, tenant.key, chat("priced")))
        assert (got.status, got.error()["type"], got.error()["code"]) == (429, "insufficient_quota", "budget_exhausted")
        assert got.headers["x-should-retry"] == "false"
        assert got.error()["param"] == "key.budget.month"
        assert len(await place.entries(tenant)) <= 1
        assert (await call(place.port, post(PATH, tenant.key, small))).status == 200

    async def test_a_model_without_a_price_is_refused(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await place.set_budget(tenant, 10**12, "project")
        got = await call(place.port, post(PATH, tenant.key, chat("unpriced", max_tokens=5)))
        assert (got.status, got.error()["code"]) == (403, "model_not_priced")
        assert provider.received == []

    async def test_a_soft_budget_refuses_nothing(self, place: Place, provider: FakeProvider, tenant: Tenant) -> None:
        await place.set_budget(tenant, 1, "organization", is_hard=False)
        for model in ("priced", "unpriced", "priced"):
            assert (await call(place.port, post(PATH, tenant.key, chat(model)))).status == 200

    async def test_what_a_request_does_not_bound_is_refused(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await place.set_budget(tenant, 10**15)
        part = {"type": "file", "file": {"file_id": "file-1"}}
        body = chat("priced", max_tokens=5, messages=[{"role": "user", "content": [part]}])
        assert (await call(place.port, post(PATH, tenant.key, body))).error()["code"] == "model_not_priced"
        assert provider.received == []
