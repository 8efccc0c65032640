"""The mock answers as an OpenAI-compatible provider does: the official client is the judge."""

import time

import httpx
import openai
import pytest

from bench.mock_answers import script_of
from bench.mock_provider import listen

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client():
    server = await listen(0)
    port = server.sockets[0].getsockname()[1]
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-mock", max_retries=0) as client:
        yield client
    server.close()
    await server.wait_closed()


class TestAnswers:
    async def test_a_completion_has_text_and_usage(self, client):
        answer = await client.chat.completions.create(model="mock", messages=MESSAGES)
        assert answer.choices[0].finish_reason == "stop"
        assert len(answer.choices[0].message.content.split()) == answer.usage.completion_tokens
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    async def test_one_connection_answers_again_and_again(self, client):
        answers = [await client.chat.completions.create(model="mock", messages=MESSAGES) for _ in range(5)]
        assert {answer.model for answer in answers} == {"mock"}

    async def test_embeddings_count_their_inputs(self, client):
        answer = await client.embeddings.create(model="mock-embedding", input=["one", "two"])
        as_floats = await client.embeddings.create(model="mock-embedding", input="one", encoding_format="float")
        assert [row.index for row in answer.data] == [0, 1]
        assert answer.data[0].embedding == pytest.approx(as_floats.data[0].embedding)

    async def test_the_list_of_models_names_the_mock(self, client):
        assert "mock" in [model.id async for model in client.models.list()]


class TestStreams:
    async def test_sixty_three_events_with_role_first_and_finish_last(self, client):
        stream = await client.chat.completions.create(model="mock", messages=MESSAGES, stream=True)
        chunks = [chunk async for chunk in stream]
        assert len(chunks) == 63
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 62 + ["stop"]
        assert all(chunk.usage is None for chunk in chunks)

    async def test_usage_comes_last_and_only_when_asked_for(self, client):
        stream = await client.chat.completions.create(
            model="mock-5", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert [len(chunk.choices) for chunk in chunks] == [1, 1, 1, 1, 1, 0]
        assert chunks[-1].usage.completion_tokens == 5

    async def test_a_paced_stream_keeps_its_rate(self, client):
        started_at = time.monotonic()
        stream = await client.chat.completions.create(model="mock-paced-100x21", messages=MESSAGES, stream=True)
        chunks = [chunk async for chunk in stream]
        assert len(chunks) == 21
        assert time.monotonic() - started_at > 0.18  # the second event may come at once, the other 19 take 10 ms each

    async def test_a_cut_stream_is_an_error_for_the_client(self, client):
        stream = await client.chat.completions.create(model="mock-cut", messages=MESSAGES, stream=True)
        with pytest.raises(httpx.RemoteProtocolError):
            [chunk async for chunk in stream]


class TestErrors:
    async def test_the_script_chooses_the_status(self, client):
        with pytest.raises(openai.InternalServerError, match="503"):
            await client.chat.completions.create(model="mock-status-503", messages=MESSAGES)

    async def test_an_unknown_model_is_not_found(self, client):
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="gpt-none", messages=MESSAGES)

    async def test_a_body_without_a_model_is_a_bad_request(self, client):
        with pytest.raises(openai.BadRequestError):
            await client.post("/chat/completions", body={"messages": []}, cast_to=object)


class TestScripts:
    @pytest.mark.parametrize(
        ("model", "events", "rate"),
        [("mock", 63, 0), ("mock-200", 200, 0), ("mock-paced-40", 120, 40), ("mock-paced-25x80", 80, 25)],
    )
    def test_a_model_name_is_a_script(self, model, events, rate):
        script = script_of(model)
        assert (script.events, script.events_per_second) == (events, rate)

    @pytest.mark.parametrize("model", ["", "mocking", "gpt-4o", "mock-paced-", "mock-status-1"])
    def test_any_other_name_is_none(self, model):
        assert script_of(model) is None
