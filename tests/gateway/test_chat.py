"""POST /v1/chat/completions, over a real socket, against a scripted provider."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from core.database import Database
from keys.limits import RateLimits
from tests.harness.eventually import eventually
from tests.harness.forms import sent_form
from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import Exchange, FakeProvider, answer, chat_answer, chunk, stream
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

PATH = "/v1/chat/completions"


class TestOk:
    async def test_the_providers_body_arrives_byte_for_byte(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        body = b'{ "odd" :  "spacing",\n"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n'
        provider.scripts.append(answer(body))
        got = await call(gateway.port, post(PATH, tenant.key, chat()))
        assert (got.status, got.body) == (200, body)
        assert got.headers["content-type"] == "application/json"

    async def test_every_answer_has_the_official_headers(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        got = await call(gateway.port, post(PATH, tenant.key, chat()))
        assert got.headers["x-request-id"].startswith("req_")
        assert got.headers["openai-processing-ms"].isdigit()
        assert int(got.headers["x-ratelimit-remaining-requests"]) < int(got.headers["x-ratelimit-limit-requests"])
        assert int(got.headers["x-ratelimit-remaining-tokens"]) < int(got.headers["x-ratelimit-limit-tokens"])
        assert got.headers["x-ratelimit-reset-requests"].endswith("s")
        assert got.headers["x-ratelimit-reset-tokens"].endswith("s")

    async def test_the_provider_sees_its_own_credentials_and_never_the_callers(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        await call(gateway.port, post(PATH, tenant.key, chat()))
        received = provider.received[-1]
        assert received.header("authorization") == "Bearer sk-upstream-0"
        assert tenant.key.encode() not in received.head + received.body
        assert received.path == "/v1/chat/completions"

    async def test_unknown_fields_pass_through(self, gateway: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
        odd = {"max_tokens": 0, "seed": -9007199254740991, "logit_bias": {"foo": 0}, "new_in_2031": [1.50, {"x": None}]}
        await call(gateway.port, post(PATH, tenant.key, chat(**odd)))
        assert provider.received[-1].json().items() >= odd.items()

    async def test_a_repeated_model_reaches_the_provider_once(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        """Guarantee: what was checked is what the provider reads, whichever of two keys it would take."""
        body = b'{"model":"forbidden","messages":[],"model":"fake"}'
        got = await call(gateway.port, post(PATH, tenant.key, body))
        assert got.status == 200
        assert provider.received[-1].body.count(b'"model"') == 1
        assert provider.received[-1].json()["model"] == "fake"


class TestStream:
    async def test_usage_is_asked_for_and_hidden_from_who_did_not_ask(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(stream("a", "b"))
        got = await call(gateway.port, post(PATH, tenant.key, chat(stream=True)))
        assert provider.received[-1].json()["stream_options"] == {"include_usage": True}
        events = [event.removeprefix(b"data: ") for event in got.body.split(b"\n\n") if event]
        assert events[-1] == b"[DONE]"
        chunks = [msgspec.json.decode(event) for event in events[:-1]]
        assert all("usage" not in one for one in chunks)
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks) == "ab"

    async def test_usage_is_shown_to_who_asked(self, gateway: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
        provider.scripts.append(stream("a", usage=(3, 4)))
        request = chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
        got = await call(gateway.port, post(PATH, tenant.key, request))
        assert b'"usage":null' in got.body
        assert b'"total_tokens":7' in got.body
        assert provider.received[-1].json()["stream_options"] == {"include_usage": True, "include_obfuscation": False}

    async def test_limits_stand_in_the_head_of_a_stream(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(stream("a"))
        got = await call(gateway.port, post(PATH, tenant.key, chat(stream=True)))
        assert {"x-ratelimit-limit-requests", "x-ratelimit-remaining-tokens", "x-request-id"} <= got.headers.keys()
        assert got.headers["content-type"] == "text/event-stream"

    async def test_a_slow_first_token_is_bridged_by_comments(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        may_go_on = asyncio.Event()

        async def slow(exchange: Exchange) -> None:
            await exchange.send_head()
            await may_go_on.wait()
            await exchange.send_events(chunk("late"), chunk(finish="stop"))

        provider.scripts.append(slow)
        connection = await RawConnection.open(gateway.port)
        await connection.send(post(PATH, tenant.key, chat(stream=True)))
        status, headers = await connection.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert await connection.chunk() == b": keep-alive\n\n"
        assert await connection.chunk() == b": keep-alive\n\n"
        may_go_on.set()
        assert b"late" in await connection.chunk()
        connection.close()

    async def test_a_refusal_after_a_comment_comes_as_an_event(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        may_go_on = asyncio.Event()

        async def slow(exchange: Exchange) -> None:
            await may_go_on.wait()
            await answer(b'{"error":\n{"message":"too long"}}', 400)(exchange)

        provider.scripts.append(slow)
        connection = await RawConnection.open(gateway.port)
        await connection.send(post(PATH, tenant.key, chat(stream=True)))
        await connection.head()
        assert await connection.chunk() == b": keep-alive\n\n"
        may_go_on.set()
        event = await connection.chunk()
        while event == b": keep-alive\n\n":
            event = await connection.chunk()
        assert event == b'data: {"error":\ndata: {"message":"too long"}}\n\n'
        assert await connection.chunk() == b""
        connection.close()

    async def test_an_error_as_the_first_event_is_a_plain_error(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_chunk(
                b'data: {"error":{"message":"bad","type":"invalid_request_error","code":"x"}}\n\n'
            )
            await exchange.end()

        provider.scripts.append(play)
        got = await call(gateway.port, post(PATH, tenant.key, chat(stream=True)))
        assert (got.status, got.json()["error"]["message"]) == (400, "bad")

    async def test_an_upstream_that_breaks_off_ends_in_an_error_event_and_no_done(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_events(chunk("a"), end=False)
            exchange.reset()

        provider.scripts.append(play)
        got = await call(gateway.port, post(PATH, tenant.key, chat(stream=True)))
        *_, last = [event for event in got.body.split(b"\n\n") if event]
        assert msgspec.json.decode(last.removeprefix(b"data: "))["error"]["code"] == "upstream_unreachable"
        assert b"[DONE]" not in got.body


class TestRefused:
    async def test_unknown_model_in_openais_words(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        got = await call(gateway.port, post(PATH, tenant.key, chat("nope")))
        assert got.status == 404
        assert got.error() == {
            "message": "The model `nope` does not exist or you do not have access to it.",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_not_found",
        }

    async def test_no_key_wrong_key_and_garbage(self, gateway: Gateway, provider: FakeProvider) -> None:
        for key in (None, "sk-wrong", "' OR '1'='1", "sk-aap-" + "a" * 59):
            got = await call(gateway.port, post(PATH, key, chat()))
            assert got.status == 401
            assert got.error()["type"] == "invalid_request_error"
            assert got.error()["code"] == (None if key is None else "invalid_api_key")

    async def test_a_reached_limit_says_which_and_when(
        self, gateway: Gateway, provider: FakeProvider, database: Database, stores: TestStores
    ) -> None:
        tenant = await new_tenant(
            database, stores.pepper, limits={"project": RateLimits(requests_per_minute=1, tokens_per_minute=100_000)}
        )
        assert (await call(gateway.port, post(PATH, tenant.key, chat()))).status == 200
        got = await call(gateway.port, post(PATH, tenant.key, chat()))
        assert got.status == 429
        assert (got.error()["type"], got.error()["code"]) == ("requests", "rate_limit_exceeded")
        assert got.error()["param"] == "project.requests_per_minute"
        assert 1 <= int(got.headers["retry-after"]) <= 60
        assert got.headers["x-ratelimit-remaining-requests"] == "0"

    async def test_a_prompt_that_can_never_fit_is_told_the_number(
        self, gateway: Gateway, provider: FakeProvider, database: Database, stores: TestStores
    ) -> None:
        tenant = await new_tenant(database, stores.pepper, limits={"key": RateLimits(tokens_per_minute=50)})
        got = await call(gateway.port, post(PATH, tenant.key, chat(text="word " * 400)))
        assert (got.status, got.error()["code"]) == (400, "request_too_large")
        assert "50" in str(got.error()["message"])


class TestFallback:
    async def test_a_failing_provider_is_tried_again_and_then_reported_as_502(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.extend([answer(b"{}", 500)] * 3)
        got = await call(gateway.port, post(PATH, tenant.key, chat("other")))
        assert (got.status, got.error()["code"]) == (502, "upstream_unreachable")
        assert len(provider.received) == 3
        assert int(got.headers["retry-after"]) >= 1

    async def test_one_bad_answer_is_not_the_callers_business(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.extend([answer(b"{}", 503), answer(chat_answer("second"))])
        got = await call(gateway.port, post(PATH, tenant.key, chat()))
        assert got.status == 200
        assert b"second" in got.body

    async def test_the_operators_wrong_credentials_are_not_the_callers_401(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(answer(b'{"error":{"message":"Incorrect API key provided: sk-upstream-0"}}', 401))
        got = await call(gateway.port, post(PATH, tenant.key, chat("org/fake")))
        assert got.status == 502
        assert b"sk-upstream" not in got.body


class TestForms:
    async def test_a_form_names_the_deployments_own_model(
        self, stores: TestStores, provider: FakeProvider, tenant: Tenant, workdir: Path
    ) -> None:
        config = config_for(provider.base_url, models=("whisper-1",)).replace('[models."whisper-1"]', "[models.stt]")
        form = (
            b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nstt\r\n'
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\nstt\r\n--b--\r\n'
        )
        async with Gateway(stores, workdir, config) as gateway:
            request = post("/v1/audio/transcriptions", tenant.key, form, content_type="multipart/form-data; boundary=b")
            assert (await call(gateway.port, request)).status == 200
        assert sent_form(provider.received[-1]) == [("model", None, b"whisper-1"), ("file", "a.wav", b"stt")]


class TestCharges:
    async def test_a_call_that_no_provider_saw_takes_no_tokens(
        self, gateway: Gateway, provider: FakeProvider, database: Database, stores: TestStores
    ) -> None:
        """Guarantee: refusals of ours cost nothing of a daily limit of tokens, however often they are met."""
        tenant = await new_tenant(database, stores.pepper, limits={"key": RateLimits(tokens_per_day=100_000)})
        provider.default = answer(b'{"error":{"message":"no","type":"invalid_request_error"}}', 400)
        for _ in range(3):
            assert (await call(gateway.port, post(PATH, tenant.key, chat(text="word " * 2_000)))).status == 400
        provider.default = answer(chat_answer(usage=(1, 1)))
        got = await call(gateway.port, post(PATH, tenant.key, chat(max_tokens=1)))
        assert int(got.headers["x-ratelimit-remaining-tokens"]) > 99_900

    async def test_events_that_came_together_are_counted_one_by_one(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        async def burst(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_chunk(b"".join(b"data: " + chunk("x") + b"\n\n" for _ in range(400)))
            exchange.reset()

        provider.scripts.append(burst)
        await call(gateway.port, post(PATH, tenant.key, chat(stream=True)))
        await eventually(lambda: any(line.get("output_tokens", 0) == 400 for line in gateway.calls()))

    async def test_a_stream_that_ends_inside_an_event_is_not_passed_off_as_whole(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        async def cut(exchange: Exchange) -> None:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
            await exchange.send(head + b"data: " + chunk("a") + b'\n\ndata: {"id":"chatc')
            exchange.writer.close()

        provider.scripts.append(cut)
        got = await call(gateway.port, post(PATH, tenant.key, chat(stream=True)))
        assert b'"upstream_unreachable"' in got.body
        assert b"[DONE]" not in got.body
