"""Providers of another wire format, through litellm's translation: Anthropic's and Gemini's own answers go in."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tests.harness.gateway import Gateway
from tests.harness.provider import Exchange, FakeProvider, answer
from tests.harness.raw import call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant

PATH = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("a", "b", "c")]


@pytest.fixture(scope="module")
async def litellm_gateway(stores: TestStores, shared_provider: FakeProvider) -> AsyncIterator[Gateway]:
    root = shared_provider.base_url.removesuffix("/v1")
    config = f"""
    [providers.anthropic]
    kind = "litellm"
    base_url = "{root}"
    api_key = "sk-ant-test"
    [providers.gemini]
    kind = "litellm"
    base_url = "{root}"
    api_key = "gemini-test"
    [models.claude]
    deployments = [{{ provider = "anthropic", model = "claude-sonnet-4-5" }}]
    [models.gemini]
    deployments = [{{ provider = "gemini", model = "gemini-2.5-flash" }}]
    """
    async with Gateway(stores, Path(tempfile.mkdtemp(prefix="aap-")), config) as made:
        yield made


def anthropic_message(*content: dict[str, object], stop: str = "end_turn") -> bytes:
    return msgspec.json.encode(
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-sonnet-4-5",
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {"input_tokens": 12, "output_tokens": 34},
        }
    )


def anthropic_stream(*blocks: tuple[dict[str, object], list[dict[str, object]]]) -> list[tuple[str, dict[str, object]]]:
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [],
        "usage": {"input_tokens": 12, "output_tokens": 1},
    }
    events: list[tuple[str, dict[str, object]]] = [("message_start", {"message": message})]
    for at, (block, deltas) in enumerate(blocks):
        events.append(("content_block_start", {"index": at, "content_block": block}))
        events += [("content_block_delta", {"index": at, "delta": delta}) for delta in deltas]
        events.append(("content_block_stop", {"index": at}))
    events.append(("message_delta", {"delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 34}}))
    events.append(("message_stop", {}))
    return events


def played(events: list[tuple[str, dict[str, object]]]):
    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        for name, event in events:
            data = msgspec.json.encode({"type": name, **event})
            await exchange.send_chunk(b"event: %b\ndata: %b\n\n" % (name.encode(), data))
        await exchange.end()

    return play


class TestAnthropic:
    async def test_completes(self, litellm_gateway: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
        provider.scripts.append(answer(anthropic_message({"type": "text", "text": "bonjour"})))
        got = await call(litellm_gateway.port, post(PATH, tenant.key, chat("claude", max_tokens=50)))
        assert got.status == 200, got.body
        completion = got.json()
        assert completion["object"] == "chat.completion"
        assert completion["choices"][0]["message"]["content"] == "bonjour"
        assert completion["usage"]["prompt_tokens"] == 12
        assert completion["usage"]["completion_tokens"] == 34
        received = provider.received[-1]
        assert received.path == "/v1/messages"
        assert received.header("x-api-key") == "sk-ant-test"
        assert received.json()["max_tokens"] == 50

    async def test_streams_three_parallel_tool_calls_each_with_its_index(
        self, litellm_gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        """Guarantee: official clients use `index` as an array position; a text block before shifts nothing."""
        blocks = [({"type": "text", "text": ""}, [{"type": "text_delta", "text": "let me see"}])]
        blocks += [
            (
                {"type": "tool_use", "id": f"toolu_{name}", "name": name, "input": {}},
                [
                    {"type": "input_json_delta", "partial_json": '{"x":'},
                    {"type": "input_json_delta", "partial_json": "1}"},
                ],
            )
            for name in ("a", "b", "c")
        ]
        provider.scripts.append(played(anthropic_stream(*blocks)))
        request = chat("claude", stream=True, tools=TOOLS, max_tokens=50, stream_options={"include_usage": True})
        got = await call(litellm_gateway.port, post(PATH, tenant.key, request))
        events = [event.removeprefix(b"data: ") for event in got.body.split(b"\n\n") if event]
        assert events[-1] == b"[DONE]", litellm_gateway.log
        chunks = [msgspec.json.decode(event) for event in events[:-1]]
        roles = ["role" in choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert roles == [True] + [False] * (len(roles) - 1)
        found: dict[int, tuple[str, str]] = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                for part in choice["delta"].get("tool_calls") or ():
                    name, arguments = found.get(part["index"], ("", ""))
                    function = part["function"]
                    found[part["index"]] = (
                        name or function.get("name") or "",
                        arguments + (function["arguments"] or ""),
                    )
        assert found == {at: (name, '{"x":1}') for at, name in enumerate("abc")}
        assert chunks[-1]["usage"]["completion_tokens"] == 34
        assert chunks[-1]["choices"] == []

    async def test_usage_is_hidden_from_who_did_not_ask_and_counted_all_the_same(
        self, litellm_gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(
            played(anthropic_stream(({"type": "text", "text": ""}, [{"type": "text_delta", "text": "hi"}])))
        )
        got = await call(litellm_gateway.port, post(PATH, tenant.key, chat("claude", stream=True, max_tokens=50)))
        assert b"hi" in got.body
        assert b'"usage"' not in got.body
        assert (await call(litellm_gateway.port, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")).status == 200

    async def test_a_parameter_that_the_provider_lacks_is_refused_by_name(
        self, litellm_gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        got = await call(litellm_gateway.port, post(PATH, tenant.key, chat("claude", logit_bias={"1": 2})))
        assert got.status == 400
        assert (got.error()["code"], got.error()["param"]) == ("unsupported_parameter", "logit_bias")
        assert provider.received == []

    @pytest.mark.parametrize(
        "smuggled",
        [
            {"api_base": "http://169.254.169.254/"},
            {"base_url": "http://10.0.0.1"},
            {"mock_response": "free"},
            {"fallbacks": ["gpt-4o"]},
            {"extra_headers": {"x": "y"}},
            {"custom_llm_provider": "openai"},
            {"_skip_mcp_handler": False},
        ],
        ids=lambda smuggled: next(iter(smuggled)),
    )
    async def test_litellms_own_settings_cannot_be_smuggled_in(
        self, smuggled: dict[str, object], litellm_gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        got = await call(litellm_gateway.port, post(PATH, tenant.key, chat("claude", **smuggled)))
        assert (got.status, got.error()["param"]) == (400, next(iter(smuggled)))
        assert provider.received == []

    async def test_nothing_is_fetched_for_a_caller(
        self, litellm_gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        """Guarantee: a picture's address is not requested by the gateway: it could be an inner one."""
        for model in ("claude", "gemini"):
            part = {"type": "image_url", "image_url": {"url": f"{provider.base_url}/picture.png"}}
            body = msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": [part]}]})
            got = await call(litellm_gateway.port, post(PATH, tenant.key, body))
            assert got.status == 400
        assert provider.received == []

    async def test_its_refusals_are_openais(
        self, litellm_gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        refusal = {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long"}}
        provider.scripts.append(answer(msgspec.json.encode(refusal), 400))
        got = await call(litellm_gateway.port, post(PATH, tenant.key, chat("claude", max_tokens=5)))
        assert got.status == 400
        assert "prompt is too long" in str(got.error()["message"])

    async def test_its_rate_limit_is_a_429(
        self, litellm_gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.default = answer(b'{"type":"error","error":{"type":"rate_limit_error","message":"slow down"}}', 429)
        got = await call(litellm_gateway.port, post(PATH, tenant.key, chat("claude", max_tokens=5)))
        assert (got.status, got.error()["code"]) == (429, "rate_limit_exceeded")


class TestGemini:
    async def test_completes(self, litellm_gateway: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
        body = {
            "candidates": [
                {"content": {"role": "model", "parts": [{"text": "ciao"}]}, "finishReason": "STOP", "index": 0}
            ],
            "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 4, "totalTokenCount": 7},
        }
        provider.scripts.append(answer(msgspec.json.encode(body)))
        got = await call(litellm_gateway.port, post(PATH, tenant.key, chat("gemini")))
        assert got.status == 200, got.body
        assert got.json()["choices"][0]["message"]["content"] == "ciao"
        assert got.json()["usage"]["total_tokens"] == 7
