"""Callers that stop in the middle: of their request, and of reading the answer.

What has to take a minute has begun with the first fault test (`a_minute`), so that it costs the run no minute of its own.
"""

from __future__ import annotations

import asyncio
import time

from redis.asyncio import Redis

from tests.harness.eventually import eventually
from tests.harness.minute import Minute
from tests.harness.provider import Exchange
from tests.harness.quota_view import nothing_is_taken

_CALLER_SECONDS_MAX = 60


def _left_seconds(minute: Minute) -> float:
    return max(0.0, minute.began_at + _CALLER_SECONDS_MAX - time.monotonic())


def _line(minute: Minute, policy: str) -> dict[str, object] | None:
    key_id = minute.tenants[policy].key_id
    return next((c for c in minute.gateway.calls() if c.get("key_id") == key_id and c.get("stream")), None)


class TestAMinute:
    async def test_a_body_that_does_not_come_is_a_408(self, a_minute: Minute) -> None:
        await eventually(lambda: '"request_timeout"' in a_minute.gateway.log, _left_seconds(a_minute) + 3)
        got = await a_minute.half_body.answer()
        assert (got.status, got.error()["code"]) == (408, "request_timeout")

    async def test_under_abort_a_caller_who_does_not_read_is_cut_and_the_provider_stopped(
        self, a_minute: Minute, redis: Redis
    ) -> None:
        """Guarantee: neither the provider's connection nor its work outlives a caller who was given up."""
        line = await eventually(lambda: _line(a_minute, "abort"), _left_seconds(a_minute) + 3)
        assert (line["outcome"], line["tokens_estimated"]) == ("client_gone", True)
        exchange = next(one for one in a_minute.provider.exchanges if _is_cut(one))
        await asyncio.wait_for(exchange.hung_up.wait(), 1)
        await eventually(lambda: nothing_is_taken(redis, a_minute.tenants["abort"].organization_id))

    async def test_under_drain_a_caller_who_does_not_read_is_cut_and_the_provider_read_to_its_end(
        self, a_minute: Minute, redis: Redis
    ) -> None:
        line = await eventually(lambda: _line(a_minute, "drain"), _left_seconds(a_minute) + 6)
        assert line["outcome"] == "client_gone"
        assert (line["input_tokens"], line["output_tokens"]) == (11, 23)
        assert "tokens_estimated" not in line
        await eventually(lambda: nothing_is_taken(redis, a_minute.tenants["drain"].organization_id))


def _is_cut(exchange: Exchange) -> bool:
    return exchange.hung_up.is_set()
