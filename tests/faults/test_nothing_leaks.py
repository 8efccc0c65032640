"""Calls of every kind, ended in every way, and processes killed under them: no reservation, no slot, no token is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from redis.asyncio import Redis

from core.database import Database
from keys.limits import RateLimits
from tests.faults.conftest import PATH
from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import Exchange, FakeProvider, answer, chat_answer, chunk
from tests.harness.quota_view import leases, records
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

_CALLS = 10_000 if os.environ.get("AAP_TEST_SCALE") == "full" else 600
_TOGETHER = 40
_KILLS = 3
# As documented in keys/quota.py: after this long the slots of a killed process are free again.
_LEASE_SECONDS = 60
_SEED = 20_261_120
# 100 tokens a second flow back: little beside what one leaked reservation (20,000 and more) would take.
_TOKENS_A_DAY = 8_640_000
_RESERVED_MIN = 20_000
_USED = (5, 7)


class Load(NamedTuple):
    """The places of one run, and what became of the calls."""

    gateway: Gateway
    tenants: list[Tenant]
    dice: random.Random
    ends: Counter[str]


def _provider(dice: random.Random) -> FakeProvider:
    """A provider that answers, breaks off, stalls and refuses by the dice."""
    made = FakeProvider()

    async def play(exchange: Exchange) -> None:
        fate = dice.random()
        if fate < 0.1:
            await answer(b'{"error":{"message":"x"}}', dice.choice([400, 429, 500, 503]))(exchange)
        elif fate < 0.15:
            exchange.reset()
        elif b'"stream":true' in exchange.received.body:
            await exchange.send_head()
            for number in range(dice.randrange(1, 6)):
                await exchange.send_events(chunk(f"w{number}"), end=False)
                await moment(0.002)
            if fate < 0.25:
                exchange.reset()
                return
            await exchange.send_events(chunk(finish="stop"), chunk(usage=_USED))
        else:
            await moment(dice.random() * 0.02)
            await answer(chat_answer(usage=_USED))(exchange)

    made.default = play
    return made


async def _one(load: Load) -> None:
    """One call of a random kind that ends in a random way."""
    dice = load.dice
    fate, streamed = dice.random(), dice.random() < 0.6
    key = "sk-wrong" if fate < 0.05 else dice.choice(load.tenants).key
    model = "nope" if 0.05 < fate < 0.1 else "fake"
    request = post(PATH, key, chat(model, stream=streamed, max_tokens=_RESERVED_MIN))
    try:
        connection = await RawConnection.open(load.gateway.port)
    except ConnectionError:
        load.ends["refused"] += 1
        return
    try:
        if 0.1 < fate < 0.15:
            await connection.send(request[: dice.randrange(len(request))])
            connection.reset()
            return
        await connection.send(request)
        if 0.15 < fate < 0.4:
            await moment(dice.random() * 0.02)
            connection.reset()
            load.ends["hung up"] += 1
            return
        load.ends[str((await connection.answer()).status)] += 1
    except (ConnectionError, asyncio.IncompleteReadError):
        load.ends["cut"] += 1
    finally:
        connection.reset()


async def _kill_now_and_then(load: Load, is_over: asyncio.Event) -> list[float]:
    """Kill a process with SIGKILL and start another, a few times over the run; return when."""
    killed_at: list[float] = []
    for number in range(1, _KILLS + 1):
        due = _CALLS * 0.8 * number / (_KILLS + 1)
        await eventually(lambda due=due: load.ends.total() > due or is_over.is_set(), 600)
        victim = load.gateway.processes[0]
        victim.kill()
        killed_at.append(time.time())
        await asyncio.to_thread(victim.wait)
        load.gateway.processes.remove(victim)
        await load.gateway.add_process()
    return killed_at


async def _run(load: Load) -> list[float]:
    is_over = asyncio.Event()
    killing = asyncio.create_task(_kill_now_and_then(load, is_over))
    left = iter(range(_CALLS))

    async def caller() -> None:
        for _ in left:
            await _one(load)

    await asyncio.gather(*(caller() for _ in range(_TOGETHER)))
    is_over.set()
    return await killing


async def _left(redis: Redis, tenants: list[Tenant]) -> tuple[set[str], dict[str, float]]:
    """The request ids of unsettled reservations, and the taken slots with their expiry."""
    ids: set[str] = set()
    taken: dict[str, float] = {}
    for tenant in tenants:
        ids |= {key.decode().rpartition(":")[2] for key in await records(redis, tenant.organization_id)}
        taken |= await leases(redis, tenant.organization_id)
    return ids, taken


async def test_no_reservation_no_slot_and_no_token_is_lost(
    stores: TestStores, database: Database, redis: Redis, workdir: Path
) -> None:
    """Guarantee: what remains belongs to killed processes only, and expires with the lease."""
    dice = random.Random(_SEED)
    provider = await _provider(random.Random(_SEED + 1)).start()
    limits = {"key": RateLimits(tokens_per_day=_TOKENS_A_DAY, concurrent_requests=500)}
    tenants = [
        await new_tenant(database, stores.pepper, policy=policy, limits=limits)
        for policy in ("drain", "drain", "abort")
    ]
    started_at = time.time()
    async with Gateway(stores, workdir, config_for(provider.base_url)) as gateway:
        await gateway.add_process()
        load = Load(gateway, tenants, dice, Counter())
        killed_at = await _run(load)
        assert load.ends["200"] > _CALLS / 4
        with contextlib.suppress(AssertionError):
            await eventually(lambda: _is_quiet(redis, tenants, killed_at), 10)
        living = await _of_the_living(redis, tenants, killed_at)
        lines = {str(line["request_id"]): line for line in gateway.calls()}
        unsettled = [lines.get(request_id, {}) for request_id in living]
        assert Counter((line.get("quota_mode"), line.get("outcome")) for line in unsettled) == {}
        ids, _ = await _left(redis, tenants)
        assert len(ids) <= 2 * _TOGETHER * _KILLS
        used = Counter[str]()
        for line in gateway.calls():
            used[str(line.get("key_id"))] += int(str(line.get("input_tokens", 0))) + int(
                str(line.get("output_tokens", 0))
            )
        provider.default = answer(chat_answer(usage=(0, 0)))
        for tenant in tenants:
            await _assert_tokens_are_back(gateway, tenant, used[tenant.key_id], ids, redis, started_at)
        assert '"call.broke"' not in gateway.log
    await provider.close()


async def _of_the_living(redis: Redis, tenants: list[Tenant], killed_at: list[float]) -> list[str]:
    """What is taken and cannot belong to a killed process: without a lease, without a record, or renewed since."""
    ids, taken = await _left(redis, tenants)
    late = {name for name, ends in taken.items() if ends > killed_at[-1] + _LEASE_SECONDS}
    return sorted((ids ^ taken.keys()) | late)


async def _is_quiet(redis: Redis, tenants: list[Tenant], killed_at: list[float]) -> bool:
    """Whether nothing of a living call is left, now and a moment later."""
    if await _of_the_living(redis, tenants, killed_at):
        return False
    await moment(0.2)
    return not await _of_the_living(redis, tenants, killed_at)


async def _assert_tokens_are_back(
    gateway: Gateway, tenant: Tenant, used: int, ids: set[str], redis: Redis, started_at: float
) -> None:
    own = {key.decode().rpartition(":")[2] for key in await records(redis, tenant.organization_id)}
    assert own <= ids
    request = post(PATH, tenant.key, chat(max_tokens=1))
    remaining = int((await call(gateway.port, request)).headers["x-ratelimit-remaining-tokens"])
    held = len(own) * (_RESERVED_MIN + 100)
    refilled = (time.time() - started_at + 1) * _TOKENS_A_DAY / 86_400
    # A killed process also loses its last log lines, at most a tenth of a second of calls of a dozen tokens.
    assert remaining >= _TOKENS_A_DAY - used - held - 100 - _KILLS * 2_000
    assert remaining <= min(_TOKENS_A_DAY, _TOKENS_A_DAY - used - len(own) * _RESERVED_MIN + refilled)
