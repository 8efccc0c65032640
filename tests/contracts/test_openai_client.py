"""The official `openai` client, unmodified, against a running gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from core.database import Database
from keys.lifecycle import NewKey
from keys.limits import RateLimits
from tests.harness.gateway import Gateway
from tests.harness.provider import Exchange, FakeProvider, answer
from tests.harness.raw import call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
HELLO = [{"role": "user", "content": "Hello!"}]


@contextlib.asynccontextmanager
async def client_for(gateway: Gateway, key: str, retries: int = 0) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=retries) as client:
        yield client


class TestDemo:
    """What a first user does, with no provider configured."""

    async def test_lists_models(self, demo: Gateway, tenant: Tenant) -> None:
        async with client_for(demo, tenant.key) as client:
            assert [model.id async for model in client.models.list()] == ["demo"]
            assert (await client.models.retrieve("demo")).owned_by == "demo"

    async def test_completes(self, demo: Gateway, tenant: Tenant) -> None:
        async with client_for(demo, tenant.key) as client:
            completion = await client.chat.completions.create(model="demo", messages=HELLO)
        assert "Hello!" in (completion.choices[0].message.content or "")
        assert completion._request_id is not None
        assert completion._request_id.startswith("req_")

    async def test_streams(self, demo: Gateway, tenant: Tenant) -> None:
        async with client_for(demo, tenant.key) as client:
            chunks = [
                chunk async for chunk in await client.chat.completions.create(model="demo", messages=HELLO, stream=True)
            ]
            with_usage = [
                chunk
                async for chunk in await client.chat.completions.create(
                    model="demo", messages=HELLO, stream=True, stream_options={"include_usage": True}
                )
            ]
        assert "Hello!" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert all(chunk.usage is None for chunk in chunks)
        assert with_usage[-1].usage is not None
        assert with_usage[-1].choices == []

    async def test_accumulates_a_stream_with_parallel_tool_calls(self, demo: Gateway, tenant: Tenant) -> None:
        tools = [TOOL, {**TOOL, "function": {**TOOL["function"], "name": "time"}}]
        async with (
            client_for(demo, tenant.key) as client,
            client.chat.completions.stream(model="demo", messages=HELLO, tools=tools) as stream,
        ):
            final = await stream.get_final_completion()
        calls = final.choices[0].message.tool_calls or []
        assert [call.function.name for call in calls] == ["weather", "time"]
        assert final.choices[0].finish_reason == "tool_calls"

    async def test_calls_tools_and_takes_their_results(self, demo: Gateway, tenant: Tenant) -> None:
        async with client_for(demo, tenant.key) as client:
            asked = await client.chat.completions.create(model="demo", messages=HELLO, tools=[TOOL])
            call = (asked.choices[0].message.tool_calls or [])[0]
            assert (call.function.name, call.function.arguments) == ("weather", '{"city":"demo"}')
            answered = await client.chat.completions.create(
                model="demo",
                tools=[TOOL],
                messages=[
                    *HELLO,
                    asked.choices[0].message.model_dump(exclude_none=True),
                    {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
                ],
            )
        assert "sunny" in (answered.choices[0].message.content or "")

    async def test_embeds_in_both_encodings(self, demo: Gateway, tenant: Tenant) -> None:
        async with client_for(demo, tenant.key) as client:
            packed = await client.embeddings.create(model="demo", input=["a", "b"])
            plain = await client.embeddings.create(model="demo", input=["a", "b"], encoding_format="float")
        assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, rel=1e-6)
        assert packed.data[0].embedding != packed.data[1].embedding

    async def test_completes_text(self, demo: Gateway, tenant: Tenant) -> None:
        async with client_for(demo, tenant.key) as client:
            assert "once" in (await client.completions.create(model="demo", prompt="once")).choices[0].text


class TestErrors:
    """Each failure is the exception class that the client's users catch."""

    async def test_authentication(self, demo: Gateway, tenant: Tenant) -> None:
        wrong = tenant.key[:-1] + ("a" if tenant.key[-1] != "a" else "b")
        async with client_for(demo, wrong) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.chat.completions.create(model="demo", messages=HELLO)
        assert caught.value.code == "invalid_api_key"
        assert caught.value.request_id is not None
        assert wrong not in str(caught.value)

    async def test_not_found(self, demo: Gateway, tenant: Tenant) -> None:
        async with client_for(demo, tenant.key) as client:
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(model="nope", messages=HELLO)
            assert caught.value.code == "model_not_found"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("no/such")

    async def test_bad_request(self, demo: Gateway, tenant: Tenant) -> None:
        async with client_for(demo, tenant.key) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(model=3, messages=HELLO)  # type: ignore[arg-type]
        assert caught.value.param == "model"

    async def test_permission_denied(self, demo: Gateway, database: Database, stores: TestStores) -> None:
        tenant = await new_tenant(database, stores.pepper, NewKey(name="t", scopes=["models:read"], models=["other"]))
        async with client_for(demo, tenant.key) as client:
            with pytest.raises(openai.PermissionDeniedError):
                await client.chat.completions.create(model="demo", messages=HELLO)
            assert [model.id async for model in client.models.list()] == []

    async def test_rate_limit(self, demo: Gateway, database: Database, stores: TestStores) -> None:
        tenant = await new_tenant(database, stores.pepper, limits={"key": RateLimits(requests_per_day=1)})
        async with client_for(demo, tenant.key) as client:
            await client.chat.completions.create(model="demo", messages=HELLO)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model="demo", messages=HELLO)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) > 80_000

    async def test_unprocessable_and_server_errors(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        async with client_for(gateway, tenant.key) as client:
            provider.scripts.append(answer(b'{"error":{"message":"m","type":"t","param":null,"code":null}}', 422))
            with pytest.raises(openai.UnprocessableEntityError):
                await client.chat.completions.create(model="org/fake", messages=HELLO)
            provider.scripts.extend([answer(b"{}", 500)] * 3)
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model="org/fake", messages=HELLO)

    async def test_an_error_after_the_first_byte(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_events(
                b'{"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}', end=False
            )
            exchange.reset()

        provider.scripts.append(play)
        async with client_for(gateway, tenant.key) as client:
            stream = await client.chat.completions.create(model="fake", messages=HELLO, stream=True)
            with pytest.raises(openai.APIError) as caught:
                async for _ in stream:
                    pass
        assert "provider" in caught.value.message

    async def test_insufficient_quota_at_the_provider_is_not_the_callers(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(
            answer(b'{"error":{"message":"pay","type":"insufficient_quota","code":"insufficient_quota"}}', 429)
        )
        async with client_for(gateway, tenant.key) as client:
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model="fake", messages=HELLO)


class TestRetries:
    async def test_the_client_waits_as_long_as_it_is_told(
        self, demo: Gateway, database: Database, stores: TestStores
    ) -> None:
        """A limit of 600 a minute refills one request in 100 ms: the client's own retry gets through."""
        tenant = await new_tenant(database, stores.pepper, limits={"key": RateLimits(requests_per_minute=600)})
        async with client_for(demo, tenant.key, retries=5) as client:
            calls = [client.chat.completions.create(model="demo", messages=HELLO) for _ in range(601)]
            done = await asyncio.gather(*calls)
        assert len(done) == 601


class TestPassThrough:
    async def test_models_with_slashes(self, gateway: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
        async with client_for(gateway, tenant.key) as client:
            assert (await client.models.retrieve("org/fake")).id == "org/fake"

    async def test_other_header_forms(self, gateway: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
        """What Anthropic's and Azure's clients send instead of `Authorization`."""
        for name in ("x-api-key", "api-key"):
            got = await call(gateway.port, post("/v1/chat/completions", None, chat(), f"{name}: {tenant.key}"))
            assert got.status == 200
