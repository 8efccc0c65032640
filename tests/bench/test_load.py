"""The load generator counts right answers, and nothing else, as requests."""

import asyncio
import json
import os

import pytest

from bench.load import LoadPlan, TargetRefusedError, problem_of, run_load
from bench.measure import read_subject
from bench.mock_provider import listen
from bench.rounds import percentile

BRIEF = {"warmup_seconds": 0.02, "window_seconds": 0.15, "concurrency": 4}


def body_for(model, *, stream=False):
    return json.dumps({"model": model, "stream": stream, "messages": [{"role": "user", "content": "hello"}]})


@pytest.fixture
async def mock_port():
    server = await listen(0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


@pytest.fixture
async def canned():
    """Serve fixed bytes to whatever is asked, and keep the connection open."""
    servers = []

    async def serve(answer):
        async def answer_each(reader, writer):
            try:
                while await reader.readuntil(b"}]}"):
                    writer.write(answer)
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        servers.append(await asyncio.start_server(answer_each, "127.0.0.1", 0))
        return servers[-1].sockets[0].getsockname()[1]

    yield serve
    for server in servers:
        server.close()
        await server.wait_closed()


class TestRightAnswers:
    async def test_each_has_a_latency_and_a_first_byte(self, mock_port):
        result = await run_load(LoadPlan(host="127.0.0.1", port=mock_port, body=body_for("mock"), **BRIEF))
        assert result.requests == len(result.latency_us) > 0
        assert len(result.first_byte_us) == result.requests
        assert result.errors == {}

    async def test_streams_count_their_events(self, mock_port):
        plan = LoadPlan(
            host="127.0.0.1",
            port=mock_port,
            body=body_for("mock-10", stream=True),
            is_stream=True,
            stream_events=10,
            **BRIEF,
        )
        result = await run_load(plan)
        assert result.errors == {}
        assert result.requests > 0
        assert result.events >= 10 * (result.requests - plan.concurrency)

    async def test_open_streams_are_counted_at_the_end(self, mock_port):
        plan = LoadPlan(
            host="127.0.0.1", port=mock_port, body=body_for("mock-paced-40x500", stream=True), is_stream=True, **BRIEF
        )
        result = await run_load(plan)
        assert (result.requests, result.open_streams, result.unanswered) == (0, 4, 0)
        assert result.events > 0
        assert len(result.gap_us) > 0


class TestFailuresAreNotRequests:
    @pytest.mark.parametrize(
        ("model", "stream", "kind"),
        [
            ("mock-status-503", False, "status 503"),
            ("no-such-model", False, "status 404"),
            ("mock-cut", True, "cut off"),
            ("mock-5", True, "only 5 events"),
        ],
    )
    async def test_a_wrong_answer_has_its_kind(self, mock_port, model, stream, kind):
        plan = LoadPlan(
            host="127.0.0.1",
            port=mock_port,
            body=body_for(model, stream=stream),
            is_stream=stream,
            stream_events=10 if stream else 0,
            **BRIEF,
        )
        result = await run_load(plan)
        assert set(result.errors) == {kind}
        assert (result.requests, result.latency_us) == (0, [])

    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "short body"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 300\r\n\r\n" + b"x" * 300, "not a completion"),
            (b"SSH-2.0-nothing\r\n", "not HTTP"),
        ],
    )
    async def test_a_fast_and_wrong_server_is_not_fast(self, canned, answer, kind):
        result = await run_load(LoadPlan(host="127.0.0.1", port=await canned(answer), body=body_for("mock"), **BRIEF))
        assert result.requests == 0
        assert set(result.errors) == {kind}

    async def test_silence_is_unanswered(self, canned):
        result = await run_load(LoadPlan(host="127.0.0.1", port=await canned(b""), body=body_for("mock"), **BRIEF))
        assert (result.requests, result.unanswered) == (0, 4)

    async def test_a_closed_port_is_not_connected(self, unused_tcp_port):
        result = await run_load(LoadPlan(host="127.0.0.1", port=unused_tcp_port, body=body_for("mock"), **BRIEF))
        assert result.requests == 0
        assert set(result.errors) == {"not connected"}


class TestBounds:
    @pytest.mark.parametrize("host", ["192.0.2.1", "example.com", "0.0.0.0"])
    async def test_only_loopback_is_loaded(self, host):
        with pytest.raises(TargetRefusedError):
            await run_load(LoadPlan(host=host, port=80, body="{}", concurrency=1))

    async def test_only_for_a_bounded_time(self):
        with pytest.raises(TargetRefusedError):
            await run_load(LoadPlan(host="127.0.0.1", port=80, body="{}", concurrency=1, window_seconds=3600))


class TestFigures:
    def test_percentiles_are_samples(self):
        assert [percentile(range(1, 101), percent) for percent in (50, 90, 99, 100)] == [50, 90, 99, 100]
        assert percentile([7], 99) == 7
        assert percentile([], 50) is None

    def test_a_stream_without_its_end_is_wrong(self):
        plan = LoadPlan(host="127.0.0.1", port=80, body="{}", concurrency=1, is_stream=True, stream_events=1)
        assert problem_of(plan, b'data: {"a": 1}\n\n') == "no [DONE]"
        assert problem_of(plan, b'data: {"a": 1}\n\ndata: [DONE]\n\n') is None

    def test_a_process_has_cpu_time_and_memory(self):
        reading = read_subject(os.getpid())
        assert reading.api_cpu_seconds > 0
        assert reading.rss_tree_bytes >= reading.rss_bytes > 1_000_000
