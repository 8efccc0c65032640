"""A provider that fails in every way there is: each ends in a clear error, never in silence or a false `[DONE]`."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
from redis.asyncio import Redis

from tests.faults.conftest import PATH
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway
from tests.harness.provider import Exchange, FakeProvider, Script, answer, chat_answer, chunk, stream
from tests.harness.quota_view import nothing_is_taken
from tests.harness.raw import RawAnswer, call, chat, post
from tests.harness.tenant import Tenant

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _bytes_then(data: bytes, how: str) -> Script:
    """Send *data* as it is, then reset, close or stall."""

    async def play(exchange: Exchange) -> None:
        if data:
            await exchange.send(data)
        if how == "reset":
            exchange.reset()
        elif how == "close":
            exchange.writer.close()
        elif how == "half-close":
            exchange.writer.write_eof()
            await asyncio.wait_for(exchange.hung_up.wait(), 10)
        else:
            await asyncio.wait_for(exchange.hung_up.wait(), 10)

    return play


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _events(got: RawAnswer) -> list[bytes]:
    return [event.removeprefix(b"data: ") for event in got.body.split(b"\n\n") if event]


def _last_error(got: RawAnswer) -> dict[str, object]:
    """The error in a stream's last event."""
    assert b"[DONE]" not in got.body
    error = msgspec.json.decode(_events(got)[-1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def _is_settled(gateway: Gateway, tenant: Tenant, redis: Redis) -> dict[str, object]:
    line = await eventually(lambda: next((c for c in gateway.calls() if c.get("key_id") == tenant.key_id), None))
    await eventually(lambda: nothing_is_taken(redis, tenant.organization_id))
    return line


class TestBeforeTheHead:
    @pytest.mark.parametrize("how", ["reset", "close"])
    @pytest.mark.parametrize("streamed", [True, False])
    async def test_a_lost_connection_is_tried_again_and_then_a_502(
        self,
        gateway: Gateway,
        provider: FakeProvider,
        tenant: Tenant,
        model: str,
        redis: Redis,
        how: str,
        streamed: bool,
    ) -> None:
        provider.default = _bytes_then(b"", how)
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=streamed)))
        assert (got.status, got.error()["code"]) == (502, "upstream_unreachable")
        assert int(got.headers["retry-after"]) >= 1
        assert 1 < len(provider.received) <= 6
        assert (await _is_settled(gateway, tenant, redis))["outcome"] == "upstream_failed"

    async def test_one_reset_is_not_the_callers_business(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        provider.scripts.append(_bytes_then(b"", "reset"))
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert got.status == 200

    async def test_silence_ends_at_the_first_byte_deadline(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis
    ) -> None:
        provider.default = _bytes_then(b"", "stall")
        started = time.monotonic()
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert (got.status, got.error()["code"]) == (504, "upstream_timeout")
        assert 0.9 < time.monotonic() - started < 4
        assert int(got.headers["retry-after"]) >= 1
        await asyncio.wait_for(provider.exchanges[-1].hung_up.wait(), 1)
        await _is_settled(gateway, tenant, redis)


class TestInTheHead:
    @pytest.mark.parametrize("head", [b"H", b"HTTP/1.1 200 OK\r\ncontent-ty", b"HTTP/1.1 200 OK\r\n"])
    async def test_a_reset_is_a_502(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, head: bytes
    ) -> None:
        provider.default = _bytes_then(head, "reset")
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        assert (got.status, got.error()["code"]) == (502, "upstream_unreachable")

    @pytest.mark.parametrize(
        "head",
        [
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 abc OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
            b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\nhello",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\nhello\r\n",
            b"HTTP/1.1 200 OK\r\nx: " + b"x" * 200_000 + b"\r\n\r\n",
            b"\x00" * 100,
        ],
    )
    async def test_what_is_not_http_is_a_502(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, head: bytes
    ) -> None:
        provider.default = _bytes_then(head, "close")
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert (got.status, got.error()["code"]) == (502, "upstream_unreachable")

    async def test_an_injected_header_stays_out(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        provider.scripts.append(
            answer(chat_answer(), more="set-cookie: a=b\r\nx-request-id: theirs\r\nserver: theirs\r\n")
        )
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert got.status == 200
        assert "set-cookie" not in got.headers
        assert got.headers["x-request-id"].startswith("req_")
        assert "server" not in got.headers

    @pytest.mark.parametrize("status", [301, 302, 307, 204, 304, 600, 999])
    async def test_a_status_that_no_model_answers_with_is_a_502(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, status: int
    ) -> None:
        body = b"" if status in {204, 304} else b"{}"
        provider.default = answer(body, status, more="location: http://169.254.169.254/\r\n")
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert (got.status, got.error()["code"]) == (502, "upstream_unreachable")


class TestInABody:
    @pytest.mark.parametrize("how", ["reset", "close", "half-close"])
    async def test_a_body_that_breaks_off_is_a_502(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis, how: str
    ) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"
        provider.default = _bytes_then(head + b'{"id":', how)
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert (got.status, got.error()["code"]) == (502, "upstream_unreachable")
        assert (await _is_settled(gateway, tenant, redis))["tokens_estimated"] is True

    async def test_a_body_that_stalls_is_a_504(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"
        provider.default = _bytes_then(head + b'{"id":', "stall")
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert (got.status, got.error()["code"]) == (504, "upstream_timeout")

    async def test_bad_utf8_passes_through_as_it_came(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        body = b'{"x":"\xff\xfe\x00\xed\xa0\x80","usage":{"prompt_tokens":1,"completion_tokens":2}}'
        provider.scripts.append(answer(body))
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert (got.status, got.body) == (200, body)

    @pytest.mark.parametrize("body", [b"", b"[" * 100_000, b"null", b"not json"])
    async def test_odd_bodies_are_the_callers_and_break_nothing(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis, body: bytes
    ) -> None:
        provider.scripts.append(answer(body))
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert (got.status, got.body) == (200, body)
        assert (await _is_settled(gateway, tenant, redis))["tokens_estimated"] is True

    @pytest.mark.parametrize("count", [10**12, 10**18, 10**30, -(10**18)])
    async def test_an_absurd_usage_number_does_not_lock_the_tenant_out(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, count: int
    ) -> None:
        """Guarantee: a provider's mistake in one answer may cost its caller a minute, not a year."""
        provider.scripts.append(answer(b'{"usage":{"prompt_tokens":%d,"completion_tokens":1}}' % count))
        assert (await call(gateway.port, post(PATH, tenant.key, chat(model)))).status == 200
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert got.status == 200 or int(got.headers["retry-after"]) <= 600


class TestInAStream:
    @pytest.mark.parametrize("how", ["reset", "close", "half-close"])
    @pytest.mark.parametrize("rest", [b"", b'5a\r\ndata: {"id":"half'])
    async def test_a_stream_that_breaks_off_ends_in_an_error_event(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis, how: str, rest: bytes
    ) -> None:
        first = _chunked(b"data: " + chunk("a") + b"\n\n")
        provider.scripts.append(_bytes_then(_HEAD + first + rest, how))
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        assert _last_error(got)["code"] == "upstream_unreachable"
        line = await _is_settled(gateway, tenant, redis)
        assert (line["outcome"], line["tokens_estimated"]) == ("upstream_failed", True)

    @pytest.mark.parametrize(("reported", "billed"), [(1, 3), (90, 90)])
    async def test_a_usage_in_the_middle_of_a_stream_that_breaks_off_is_not_the_last_word(
        self,
        gateway: Gateway,
        provider: FakeProvider,
        tenant: Tenant,
        model: str,
        redis: Redis,
        reported: int,
        billed: int,
    ) -> None:
        """Guarantee: of what was reported and what was seen the larger is billed, as an estimate."""
        so_far = {"prompt_tokens": 70, "completion_tokens": reported, "total_tokens": 70 + reported}
        event = {**msgspec.json.decode(chunk("a")), "usage": so_far}
        events = (msgspec.json.encode(event), chunk("b"), chunk("c"))
        body = b"".join(_chunked(b"data: " + one + b"\n\n") for one in events)
        provider.scripts.append(_bytes_then(_HEAD + body, "reset"))
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        assert _last_error(got)["code"] == "upstream_unreachable"
        line = await _is_settled(gateway, tenant, redis)
        assert (line["input_tokens"], line["output_tokens"], line.get("tokens_estimated")) == (70, billed, True)

    @pytest.mark.parametrize("usage", [{}, {"cost": 0.5}, {"prompt_tokens_details": {}}])
    async def test_a_usage_without_a_count_is_none(
        self,
        gateway: Gateway,
        provider: FakeProvider,
        tenant: Tenant,
        model: str,
        redis: Redis,
        usage: dict[str, object],
    ) -> None:
        """Guarantee: a whole stream whose provider says nothing is estimated, and not free."""
        last = msgspec.json.encode({**msgspec.json.decode(chunk(usage=(1, 1))), "usage": usage})

        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_events(chunk("a"), chunk("b"), last)

        provider.scripts.append(play)
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True, text="x" * 4_000)))
        assert got.body.endswith(b"[DONE]\n\n")
        line = await _is_settled(gateway, tenant, redis)
        assert line["input_tokens"] > 1_000
        assert (line["output_tokens"] >= 2, line.get("tokens_estimated")) == (True, True)

    async def test_a_usage_that_came_first_is_not_the_last_word_either(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis
    ) -> None:
        cached = {"prompt_tokens": 100, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 80}}
        first = msgspec.json.encode({**msgspec.json.decode(chunk(usage=(1, 1))), "usage": cached})
        body = b"".join(_chunked(b"data: " + one + b"\n\n") for one in (first, *[chunk("a")] * 50))
        provider.scripts.append(_bytes_then(_HEAD + body, "reset"))
        await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        line = await _is_settled(gateway, tenant, redis)
        assert (line["input_tokens"], line["output_tokens"], line["tokens_estimated"]) == (100, 51, True)

    async def test_a_usage_that_came_last_is_the_last_word_whatever_breaks_behind_it(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis
    ) -> None:
        body = b"".join(_chunked(b"data: " + one + b"\n\n") for one in (chunk("a"), chunk(usage=(70, 5))))
        provider.scripts.append(_bytes_then(_HEAD + body, "reset"))
        await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        line = await _is_settled(gateway, tenant, redis)
        assert (line["output_tokens"], line.get("tokens_estimated")) == (5, None)

    async def test_a_stall_between_events_ends_at_the_idle_deadline(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis
    ) -> None:
        first = _chunked(b"data: " + chunk("a") + b"\n\n")
        provider.scripts.append(_bytes_then(_HEAD + first, "stall"))
        started = time.monotonic()
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        assert _last_error(got)["code"] == "upstream_timeout"
        assert 0.9 < time.monotonic() - started < 4
        await asyncio.wait_for(provider.exchanges[0].hung_up.wait(), 1)
        await _is_settled(gateway, tenant, redis)

    async def test_a_break_inside_a_large_event_still_ends_in_an_error_event_of_its_own(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        """Guarantee: the error does not run into what was already passed on of an unfinished event."""
        half = _chunked(b'data: {"x":"' + b"y" * 1_000_000)
        provider.scripts.append(_bytes_then(_HEAD + half, "reset"))
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        assert _last_error(got)["code"] == "upstream_unreachable"

    async def test_an_error_event_after_200_reaches_the_caller_and_the_log(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis
    ) -> None:
        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            error = b'{"error":{"message":"overloaded","type":"server_error","param":null,"code":"x"}}'
            await exchange.send_events(chunk("a"), error, end=False)
            await exchange.end()

        provider.scripts.append(play)
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        assert _last_error(got)["message"] == "overloaded"
        line = await _is_settled(gateway, tenant, redis)
        assert (line["outcome"], line["error_code"]) == ("upstream_failed", "upstream_error_after_first_byte")

    async def test_bad_utf8_in_events_passes_through_as_it_came(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis
    ) -> None:
        odd = b'{"choices":[{"delta":{"content":"\xff\xc3\x28\x00"}}],"usage":5}'
        provider.scripts.append(_sends(odd, chunk(usage=(3, 4))))
        got = await call(
            gateway.port, post(PATH, tenant.key, chat(model, stream=True, stream_options={"include_usage": True}))
        )
        assert odd in _events(got)
        line = await _is_settled(gateway, tenant, redis)
        assert (line["input_tokens"], line["output_tokens"]) == (3, 4)

    @pytest.mark.parametrize("garbage", [b"HTTP/1.1 200 OK\r\n\r\n", b"\x00\xff", b"0\r\n\r\n"])
    async def test_trailing_garbage_is_not_taken_for_the_next_answer(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, garbage: bytes
    ) -> None:
        async def play(exchange: Exchange) -> None:
            body = chat_answer("first")
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            await exchange.send(head + body + garbage)

        for _ in range(3):
            provider.scripts.extend([play, answer(chat_answer("second"))])
            assert b"first" in (await call(gateway.port, post(PATH, tenant.key, chat(model)))).body
            got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
            assert (got.status, b"second" in got.body) == (200, True)

    async def test_done_inside_a_text_is_not_the_end(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        provider.scripts.append(stream("data: [DONE]", "more"))
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        assert b"more" in got.body
        assert _events(got)[-1] == b"[DONE]"


class TestErrorStatuses:
    @pytest.mark.parametrize("status", [500, 502, 503, 504, 529])
    async def test_a_5xx_is_a_502_with_a_retry_after(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, redis: Redis, status: int
    ) -> None:
        provider.default = answer(b'{"error":"secret internals"}', status)
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        assert (got.status, got.error()["code"]) == (502, "upstream_unreachable")
        assert b"secret" not in got.body
        assert int(got.headers["retry-after"]) >= 1
        await _is_settled(gateway, tenant, redis)

    async def test_a_429_is_passed_on_with_its_retry_after_and_the_deployment_rests(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        body = b'{"error":{"message":"slow down","type":"requests","param":null,"code":"rate_limit_exceeded"}}'
        provider.default = answer(body, 429, more="retry-after: 7\r\n")
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert (got.status, got.body, got.headers["retry-after"]) == (429, body, "7")
        assert len(provider.received) == 1
        again = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert again.status == 503
        assert again.error()["code"] == "model_unavailable"
        assert 1 <= int(again.headers["retry-after"]) <= 7
        assert len(provider.received) == 1

    async def test_a_429_without_retry_after_is_passed_on_and_the_next_call_is_sent(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str
    ) -> None:
        body = b'{"error":{"message":"slow down","type":"requests","param":null,"code":"rate_limit_exceeded"}}'
        provider.scripts.append(answer(body, 429))
        got = await call(gateway.port, post(PATH, tenant.key, chat(model, stream=True)))
        assert (got.status, got.body) == (429, body)
        assert (await call(gateway.port, post(PATH, tenant.key, chat(model)))).status == 200

    @pytest.mark.parametrize(
        "value", ["-1", "1e9", "99999999999999999999", "nonsense", "Fri, 31 Dec 9999 23:59:59 GMT"]
    )
    async def test_an_odd_retry_after_breaks_nothing(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, model: str, value: str
    ) -> None:
        provider.scripts.append(answer(b"{}", 429, more=f"retry-after: {value}\r\n"))
        assert (await call(gateway.port, post(PATH, tenant.key, chat(model)))).status == 429
        got = await call(gateway.port, post(PATH, tenant.key, chat(model)))
        assert got.status == 200 or (got.status == 503 and int(got.headers["retry-after"]) <= 61)


def _sends(*events: bytes) -> Script:
    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        await exchange.send_events(*events)

    return play
