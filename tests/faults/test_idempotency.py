"""Requests with an Idempotency-Key when something breaks: gateways die, PostgreSQL is away, callers leave or do not read."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import text

from core.database import Database
from core.ids import GatewayId, new_id
from core.settings import IdempotencySettings
from gateway.idempotency import Asked, Idempotency
from gateway.idempotency_claims import ClaimKey, Claims
from inference.endpoints import ENDPOINTS
from inference.exchange import Exchange as Call
from keys.authenticate import Authenticator
from keys.limits import DefaultLimits
from metering.sweeper import sweep
from metering.verify import verify
from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway, config_for
from tests.harness.idempotent import USED, Books, Gate, ask, connected, is_replayed, runs
from tests.harness.memory import MEGABYTE, forget_peak, resident_bytes_peak
from tests.harness.private_stores import PrivatePostgres, private_postgres, private_redis
from tests.harness.provider import Exchange, FakeProvider, Script, answer, chat_answer, chunk, stream
from tests.harness.raw import chat
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

_IS_FULL = os.environ.get("AAP_TEST_SCALE") == "full"
_LEASE_SECONDS = 5
_LEASE = {"AAP_GATEWAY_LEASE_SECONDS": str(_LEASE_SECONDS)}
_STREAM = chat(stream=True)
# (point, side, which of the runs of its function): where the gateway dies. The rest is for a full run.
_DEATHS = [
    ("write_intents", "after", 1),
    ("read", "after", 2),
    ("end_stream", "before", 1),
    ("write_entries", "after", 1),
    ("whole_answer", "before", 1),
    ("collect", "before", 1),
    ("collect", "after", 1),
    ("whole_answer", "after", 1),
    ("reserve", "before", 1),
    ("reserve", "after", 1),
    ("write_intents", "before", 1),
    ("connect", "before", 1),
    ("connect", "after", 1),
    ("admit", "after", 1),
    ("first_byte", "before", 1),
    ("first_byte", "after", 1),
    ("read", "after", 3),
    ("end_stream", "after", 1),
    ("settle", "before", 1),
    ("settle", "after", 1),
    ("charge", "before", 1),
    ("charge", "after", 1),
    ("write_entries", "before", 1),
]


class Place(NamedTuple):
    """Stores of our own, and two gateways that stay; the second keeps answers of any size."""

    stores: TestStores
    postgres: PrivatePostgres
    database: Database
    books: Books
    config: str
    one: Gateway
    other: Gateway

    async def sweep(self) -> None:
        await sweep(self.books.writer.fetch, lease_seconds=_LEASE_SECONDS)

    async def require_exact(self, tenant: Tenant, used: tuple[int, int]) -> None:
        """Fail unless the tenant's one call is in the ledger once, and with all corrections as the provider has it."""

        async def is_so() -> bool:
            return await self.books.used(tenant) == used

        await eventually(is_so)
        kinds = [entry["kind"] for entry in await self.books.entries(tenant)]
        assert kinds.count("usage") == 1
        assert (await verify(self.database)).drifts == []


@pytest.fixture(scope="module")
async def place(stores: TestStores, shared_provider: FakeProvider) -> AsyncIterator[Place]:
    directories = [Path(tempfile.mkdtemp(prefix="aap-")) for _ in range(2)]
    # Some answers here take longer than a lease.
    config = config_for(shared_provider.base_url).replace("first_byte_seconds = 5", "first_byte_seconds = 30")
    large = {**_LEASE, "AAP_IDEMPOTENCY_BYTES_MAX": str(64 * MEGABYTE)}
    async with (
        private_redis(directories[0]) as redis,
        private_postgres(directories[0], redis.url, stores.pepper) as (postgres, own),
        Gateway(own, directories[0], config, **_LEASE) as one,
        Gateway(own, directories[1], config, **large) as other,
    ):
        database, books = Database(own.database_url, connections_max=2), Books(own.database_url)
        yield Place(own, postgres, database, books, config, one, other)
        await books.close()
        await database.close()
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def victim(place: Place, workdir: Path) -> AsyncIterator[Gateway]:
    """A gateway that its test kills."""
    async with Gateway(place.stores, workdir, place.config, **_LEASE) as gateway:
        yield gateway


@pytest.fixture
async def caller(place: Place) -> Tenant:
    return await new_tenant(place.database, place.stores.pepper)


@pytest.fixture
def name() -> str:
    return new_id("req")


async def _kill(gateway: Gateway) -> None:
    gateway.processes[0].kill()
    await gateway.wait()


class TestDeaths:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "restart"])
    async def test_an_answer_outlives_the_gateway_that_gave_it(
        self, place: Place, victim: Gateway, provider: FakeProvider, caller: Tenant, name: str, number: signal.Signals
    ) -> None:
        """Guarantee: whoever has read an answer can have it again, also when its gateway died in the next moment."""
        provider.scripts.append(stream("a", "b"))
        first = await ask(victim, caller, name, _STREAM)
        victim.processes[0].send_signal(number)
        await victim.wait()
        again = await ask(place.other, caller, name, _STREAM)
        assert (is_replayed(again), again.body) == (True, first.body)
        assert len(provider.received) == 1

    async def test_a_stream_is_taken_over_when_the_lease_of_its_gateway_has_run_out(
        self, place: Place, victim: Gateway, provider: FakeProvider, caller: Tenant, name: str
    ) -> None:
        """Guarantee: under the same request id, so that the ledger has one call, and what the provider said of it.

        The claim of a gateway that lives is waited for, however long it works.
        """
        slow, gate = Gate(), Gate()
        provider.scripts.extend([slow.whole, gate.stream, stream("c", "d")])
        living = asyncio.create_task(ask(place.one, caller, name + "-slow", chat()))
        await slow.begun.wait()
        waiting = asyncio.create_task(ask(place.other, caller, name + "-slow", chat()))
        connection = await connected(victim, caller, name, _STREAM)
        _, headers = await connection.head()
        await _kill(victim)
        started = time.monotonic()
        calls = [asyncio.create_task(ask(place.other, caller, name, _STREAM)) for _ in range(3)]
        got = await asyncio.gather(*calls)
        assert 3 < time.monotonic() - started < _LEASE_SECONDS + 5
        assert {(one.status, one.body.endswith(b"data: [DONE]\n\n")) for one in got} == {(200, True)}
        assert sorted(map(is_replayed, got)) == [False, True, True]
        [first] = [one for one in got if not is_replayed(one)]
        assert first.headers["x-request-id"] == headers["x-request-id"]
        assert len(provider.received) == 3
        await place.require_exact(caller, USED)
        assert (await place.books.entries(caller))[0]["request_id"] == headers["x-request-id"]
        assert not waiting.done()
        slow.opened.set()
        assert (is_replayed(await living), is_replayed(await waiting)) == (False, True)
        connection.close()
        gate.opened.set()

    @pytest.mark.parametrize("sweeps", ["before", "meanwhile"])
    async def test_a_sweeper_that_has_made_an_estimate_of_it_is_corrected(
        self, place: Place, victim: Gateway, provider: FakeProvider, caller: Tenant, name: str, sweeps: str
    ) -> None:
        gate = Gate()
        provider.scripts.extend([gate.stream, stream("c")])
        connection = await connected(victim, caller, name, _STREAM)
        await connection.head()
        await _kill(victim)
        await place.books.age(caller)
        if sweeps == "before":
            await place.sweep()
            assert [entry["outcome"] for entry in await place.books.entries(caller)] == ["gateway_lost"]
        asked = asyncio.create_task(ask(place.other, caller, name, _STREAM))
        while sweeps == "meanwhile" and not asked.done():
            await place.sweep()
        assert (await asked).status == 200
        await place.require_exact(caller, USED)
        await place.sweep()
        await place.require_exact(caller, USED)
        connection.close()
        gate.opened.set()

    @pytest.mark.parametrize("death", _DEATHS if _IS_FULL else _DEATHS[:5], ids=str)
    async def test_wherever_it_dies_the_next_one_answers_and_the_call_is_in_the_ledger_once(
        self,
        place: Place,
        workdir: Path,
        provider: FakeProvider,
        caller: Tenant,
        name: str,
        death: tuple[str, str, int],
    ) -> None:
        point, side, countdown = death
        is_stream = point not in {"whole_answer", "collect"}
        body, end = (_STREAM, b"data: [DONE]\n\n") if is_stream else (chat(), b"}")
        read: list[bytes] = []

        async def whole(exchange: Exchange) -> None:
            await answer(chat_answer(f"call {len(provider.received)}", USED))(exchange)

        provider.default = _paced(provider, 0.02) if is_stream else whole
        gateway = Gateway(place.stores, workdir, place.config, **_LEASE)
        process = await gateway.add_process("tests.harness.failpoints", "gateway", point, side, str(countdown))
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            read.append((await ask(gateway, caller, name, body)).body)
        assert await asyncio.to_thread(process.wait, 10) == -signal.SIGKILL
        await place.books.age(caller)
        got = await ask(place.other, caller, name, body)
        assert (got.status, got.body.endswith(end)) == (200, True)
        # Who has read it all gets it again.
        assert read in ([], [got.body])
        asked = len(provider.received)
        assert (is_replayed(got), asked) in {(True, 1), (False, 1), (False, 2)}
        await place.sweep()
        # Who died between the last byte and the entry left an estimate, or had written the entry already.
        [usage] = [one for one in await eventually(lambda: place.books.entries(caller)) if one["kind"] == "usage"]
        is_known = not is_replayed(got) or usage["quality"] == "exact"
        await place.require_exact(caller, USED if is_known else (usage["input_tokens"], usage["output_tokens"]))

    async def test_a_gateway_that_was_only_held_up_changes_nothing_when_it_goes_on(
        self, place: Place, victim: Gateway, provider: FakeProvider, caller: Tenant, name: str
    ) -> None:
        """Guarantee: who has taken a claim over has it, and the ledger has one call."""
        gates = [Gate("held", "up"), Gate("taken", "over")]
        provider.scripts.extend(gate.stream for gate in gates)
        first = asyncio.create_task(ask(victim, caller, name, _STREAM))
        await gates[0].begun.wait()
        victim.processes[0].send_signal(signal.SIGSTOP)
        await place.books.age(caller)
        taken = asyncio.create_task(ask(place.other, caller, name, _STREAM))
        await gates[1].begun.wait()
        gates[0].opened.set()
        victim.processes[0].send_signal(signal.SIGCONT)
        assert (await first).body.endswith(b"data: [DONE]\n\n")
        assert await place.books.states(caller) == ["running"]
        gates[1].opened.set()
        assert (await ask(victim, caller, name, _STREAM)).body == (await taken).body != (await first).body
        await runs(0, victim, place.other)
        await place.require_exact(caller, USED)


def _paced(provider: FakeProvider, pause_seconds: float) -> Script:
    """A stream that says the how-manieth call it is, one event after the other."""

    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        for word in (f"call {len(provider.received)}", "b", "c"):
            await exchange.send_events(chunk(word), end=False)
            await moment(pause_seconds)
        await exchange.send_events(chunk(finish="stop"), chunk(usage=USED))

    return play


class TestStopping:
    async def test_who_joined_is_told_as_the_first_one_is_and_another_gateway_takes_it_at_once(
        self, place: Place, workdir: Path, provider: FakeProvider, caller: Tenant, name: str
    ) -> None:
        gate = Gate()
        provider.scripts.extend([gate.stream, stream("c")])
        async with Gateway(place.stores, workdir, place.config, **_LEASE, AAP_DRAIN_SECONDS="0.2") as victim:
            calls = [asyncio.create_task(ask(victim, caller, name, _STREAM)) for _ in range(3)]
            await runs(3, victim)
            await gate.begun.wait()
            victim.terminate()
            for got in await asyncio.gather(*calls):
                assert b'"code":"stream_interrupted"' in got.body
                assert b"[DONE]" not in got.body
            started = time.monotonic()
            got = await ask(place.other, caller, name, _STREAM)
            assert (is_replayed(got), got.body.endswith(b"[DONE]\n\n")) == (False, True)
            assert time.monotonic() - started < _LEASE_SECONDS - 2
        gate.opened.set()


class TestPostgresql:
    async def test_nobody_reads_done_before_the_answer_is_kept(
        self, place: Place, provider: FakeProvider, caller: Tenant, name: str
    ) -> None:
        gate = Gate()
        provider.scripts.append(gate.stream)
        readers = [await connected(place.one, caller, name, _STREAM) for _ in range(2)]
        for reader in readers:
            _, headers = await reader.head()
            assert b'"a"' in await reader.chunk()
        async with place.database.transaction() as session:
            await session.execute(text("LOCK TABLE idempotent_answers IN EXCLUSIVE MODE"))
            gate.opened.set()
            await eventually(lambda: place.books.rows("SELECT 1 FROM pg_locks WHERE NOT granted"))
            # Whatever was sent before this answer has arrived before it.
            assert (await ask(place.one, caller, "", chat())).status == 400
            assert [b"[DONE]" in bytes(reader.reader._buffer) for reader in readers] == [False, False]
        assert [(await reader.body(headers)).endswith(b"data: [DONE]\n\n") for reader in readers] == [True, True]
        for reader in readers:
            reader.close()

    async def test_a_claim_that_could_not_be_given_up_holds_nobody_for_longer_than_a_lease(
        self, place: Place, provider: FakeProvider, caller: Tenant, name: str
    ) -> None:
        gate = Gate()

        async def refuse(exchange: Exchange) -> None:
            await gate.opened.wait()
            await answer(b'{"error":{"message":"no"}}', status=400)(exchange)

        provider.scripts.extend([refuse, refuse])
        calls = [asyncio.create_task(ask(place.one, caller, name + end, chat())) for end in "ab"]
        await eventually(lambda: len(provider.received) == 2)
        # Whatever is said of claims now fails.
        await place.books.rows("ALTER TABLE idempotent_answers RENAME TO away")
        gate.opened.set()
        assert [(await one).status for one in calls] == [400, 400]
        await place.books.rows("ALTER TABLE away RENAME TO idempotent_answers")
        assert await place.books.states(caller) == ["running", "running"]
        # Its own gateway knows that nobody works on it. Another one waits for the end of the lease.
        own = await asyncio.wait_for(ask(place.one, caller, name + "a", chat()), _LEASE_SECONDS - 2)
        waiting = asyncio.create_task(ask(place.other, caller, name + "b", chat()))
        await runs(1, place.other)
        await place.books.age(caller)
        for got in (own, await waiting):
            assert (got.status, is_replayed(got)) == (200, False)

    @pytest.mark.parametrize("is_frozen", [False, True] if _IS_FULL else [False])
    async def test_nothing_is_sent_to_a_provider_while_nobody_can_tell_who_was_first(
        self, place: Place, provider: FakeProvider, caller: Tenant, name: str, is_frozen: bool
    ) -> None:
        postgres = place.postgres
        assert (await ask(place.other, caller, name + "-known", chat())).status == 200
        await (asyncio.to_thread(postgres.freeze) if is_frozen else postgres.stop())
        try:
            for key in (name, name + "-known"):
                got = await ask(place.other, caller, key, chat())
                assert (got.status, got.error()["code"]) == (503, "ledger_unavailable")
                assert int(got.headers["retry-after"]) >= 1
        finally:
            await (asyncio.to_thread(postgres.thaw) if is_frozen else postgres.start())
        assert len(provider.received) == 1

        async def is_back() -> bool:
            return (await ask(place.other, caller, name, chat())).status == 200

        await eventually(is_back, 10)
        assert is_replayed(await ask(place.other, caller, name + "-known", chat()))
        assert len(provider.received) == 2

    async def test_an_answer_that_ends_meanwhile_is_kept_when_it_is_back(
        self, place: Place, provider: FakeProvider, caller: Tenant, name: str
    ) -> None:
        """Guarantee: until then the gateway that has it gives it to who asks, and nobody asks the provider again."""
        gate = Gate()
        provider.scripts.append(gate.stream)
        first = asyncio.create_task(ask(place.one, caller, name, _STREAM))
        await gate.begun.wait()
        await place.postgres.stop()
        try:
            joiner = asyncio.create_task(ask(place.one, caller, name, _STREAM))
            await runs(2, place.one)
            gate.opened.set()
            assert (await first).body.endswith(b"data: [DONE]\n\n")
            late = await ask(place.one, caller, name, _STREAM)
            assert (await first).body == (await joiner).body == late.body
        finally:
            await place.postgres.start()
        other = await ask(place.other, caller, name, _STREAM)
        assert (is_replayed(other), other.body) == (True, late.body)
        assert len(provider.received) == 1
        entry = await eventually(lambda: place.books.entries(caller), 10)
        assert [(one["kind"], one["quality"]) for one in entry] == [("usage", "exact")]

    async def test_a_gateway_that_is_stopped_keeps_the_answers_that_wait_to_be_kept(
        self, place: Place, provider: FakeProvider, victim: Gateway, caller: Tenant, name: str
    ) -> None:
        gate = Gate()
        provider.scripts.append(gate.stream)
        first = asyncio.create_task(ask(victim, caller, name, _STREAM))
        await gate.begun.wait()
        await place.postgres.stop()
        try:
            gate.opened.set()
            whole = (await first).body
            victim.terminate()
        finally:
            await place.postgres.start()
        await victim.wait()
        again = await ask(place.other, caller, name, _STREAM)
        assert (is_replayed(again), again.body) == (True, whole)
        assert len(provider.received) == 1


class TestSlow:
    async def test_who_joins_and_does_not_read_holds_nobody_up_and_costs_no_memory(
        self, place: Place, provider: FakeProvider, caller: Tenant, name: str
    ) -> None:
        """Guarantee: it loses what is not held for it any more, and is told so; it never reads a false [DONE]."""
        go_on = asyncio.Event()
        provider.scripts.append(_large(500, go_on))
        first = await connected(place.one, caller, name, _STREAM)
        _, headers = await first.head()
        joiner = await connected(place.one, caller, name, _STREAM, reads=False)
        keeping_up = asyncio.create_task(ask(place.one, caller, name, _STREAM))
        await runs(3, place.one)
        before = forget_peak(place.one.processes[0].pid)
        go_on.set()
        whole = await asyncio.wait_for(first.body(headers), 20)
        assert whole.endswith(b"data: [DONE]\n\n")
        assert resident_bytes_peak(place.one.processes[0].pid) - before < 24 * MEGABYTE
        # Larger than what is kept, and yet who reads gets all of it.
        assert (await keeping_up).body == whole
        joiner.writer.transport.resume_reading()
        got = await joiner.answer()
        assert b'"code":"idempotent_answer_too_large"' in got.body
        assert b"[DONE]" not in got.body
        for connection in (first, joiner):
            connection.close()

    async def test_a_first_caller_who_does_not_read_holds_nobody_up_who_joins(
        self, place: Place, provider: FakeProvider, caller: Tenant, name: str
    ) -> None:
        """Guarantee: a client whose connection has died unnoticed gets its answer by asking again."""
        go_on = asyncio.Event()
        go_on.set()
        sent: list[int] = []
        provider.scripts.append(_large(500, go_on, sent))
        first = await connected(place.other, caller, name, _STREAM, reads=False)
        await _stands_still(sent)
        got = await asyncio.wait_for(ask(place.other, caller, name, _STREAM), 20)
        assert (is_replayed(got), got.body.endswith(b"data: [DONE]\n\n")) == (True, True)
        assert len(got.body) > 500 * 65_536
        first.reset()
        await runs(0, place.other)


def _large(count: int, go_on: asyncio.Event, sent: list[int] | None = None) -> Script:
    """A stream of *count* events of 64 kB behind a first one."""

    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        await exchange.send_events(chunk("begun"), end=False)
        await go_on.wait()
        for number in range(count):
            await exchange.send_events(chunk("x" * 65_536), end=False)
            if sent is not None:
                sent.append(number)
        await exchange.send_events(chunk(finish="stop"), chunk(usage=USED))

    return play


async def _stands_still(sent: list[int]) -> None:
    """Return when something was sent, and then nothing for a quarter of a second: everything on the way is full."""
    looks = [0]

    def same() -> bool:
        looks.append(len(sent))
        return len(looks) > 25 and looks[-1] > 0 and len(set(looks[-25:])) == 1

    await eventually(same, 20)
    assert len(sent) < 500


class TestHostile:
    async def test_more_than_a_hundred_who_join_are_turned_away(
        self, place: Place, provider: FakeProvider, caller: Tenant, name: str
    ) -> None:
        """Guarantee: who joins takes none of the caller's own limits, so there is another one."""
        gate = Gate()
        provider.scripts.append(gate.whole)
        first = asyncio.create_task(ask(place.other, caller, name, chat()))
        await gate.begun.wait()
        calls = [asyncio.create_task(ask(place.other, caller, name, chat())) for _ in range(120)]
        refused = [await next_one for next_one in itertools.islice(asyncio.as_completed(calls), 20)]
        assert {(one.status, one.error()["code"]) for one in refused} == {(409, "idempotent_request_in_progress")}
        assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
        gate.opened.set()
        statuses = [(await one).status for one in (first, *calls)]
        assert (statuses.count(200), statuses.count(409)) == (101, 20)
        assert len(provider.received) == 1

    async def test_ever_new_keys_leave_nothing_behind_in_the_process(
        self, place: Place, provider: FakeProvider, caller: Tenant
    ) -> None:
        provider.default = answer(chat_answer("x" * 20_000))
        numbers = itertools.count()

        async def many(count: int) -> None:
            for _ in range(count):
                assert (await ask(place.one, caller, f"key-{next(numbers)}", chat())).status == 200

        count = 10_000 if _IS_FULL else 800
        await asyncio.gather(*[many(20) for _ in range(10)])
        before = forget_peak(place.one.processes[0].pid)
        await asyncio.gather(*[many(count // 10) for _ in range(10)])
        # Kept in the process, the answers alone would take 20 MB for each thousand.
        assert resident_bytes_peak(place.one.processes[0].pid) - before < 8 * MEGABYTE

    async def test_cancelled_at_any_moment_a_claim_leaves_nothing_behind(self, place: Place, caller: Tenant) -> None:
        """Guarantee: nothing is remembered in the process, and no key is held by a request that is gone."""
        dice = random.Random(5)
        database = Database(place.stores.database_url, connections_max=5)
        claims = Claims(database, GatewayId(new_id("gw")), kept_seconds=60, lease_seconds=_LEASE_SECONDS)
        idempotency = Idempotency(claims, IdempotencySettings(retention_seconds=60, answer_bytes_max=100))
        authenticator = Authenticator(
            database, [place.stores.pepper], defaults=DefaultLimits, is_feed_live=lambda: False
        )
        exchange = Call(new_id("req"), ENDPOINTS[0])
        exchange.principal = await authenticator.authenticate(caller.key.encode(), lambda: "192.0.2.1")

        async def one(key: str) -> None:
            claim = idempotency.begin(Asked(ClaimKey(caller.key_id, key), b"digest"))
            try:
                await idempotency.find(exchange, claim)
                claim.recording.begin(200, b"text/plain", is_stream=False)
                if dice.random() < 0.5:
                    await idempotency.complete(claim)
            finally:
                await idempotency.close(claim)

        for _ in range(40):
            tasks = [asyncio.create_task(one(new_id("req"))) for _ in range(5)]
            await moment(dice.random() * 0.015)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await eventually(lambda: not idempotency._running and not idempotency._holds)
        assert set(await eventually(lambda: _no_claims_run(place, caller), 3)) <= {"done", "none"}
        await eventually(lambda: not idempotency._tasks)
        await database.close()

    @pytest.mark.parametrize("seed", range(20 if _IS_FULL else 1))
    async def test_whoever_leaves_whenever_all_who_read_a_whole_answer_read_the_same_one(
        self, place: Place, provider: FakeProvider, name: str, seed: int
    ) -> None:
        """Guarantee: cancelled at any point, a claim is completed or given up, and an answer that was read is kept."""
        dice = random.Random(seed)
        tenants = [
            await new_tenant(place.database, place.stores.pepper, policy=policy) for policy in ("abort", "drain")
        ]
        provider.default = _paced(provider, 0.003)
        whole: defaultdict[tuple[str, str], set[bytes]] = defaultdict(set)

        async def one(tenant: Tenant, key: str) -> None:
            await moment(dice.random() * 0.5)
            gateway = dice.choice([place.one, place.other])
            connection = await connected(gateway, tenant, key, _STREAM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(dice.random() * 0.04 if dice.random() < 0.7 else 30):
                    got = await connection.answer()
                    assert got.status == 200
                    whole[tenant.key_id, key].add(got.body)
            connection.reset()

        keys = [f"{name}-{number}" for number in range(12)]
        await asyncio.gather(*[one(tenant, key) for tenant in tenants for key in keys for _ in range(8)])
        await runs(0, place.one, place.other)
        for tenant in tenants:
            assert "running" not in await eventually(lambda t=tenant: _no_claims_run(place, t), 3)
            for key in keys:
                got = await ask(place.other, tenant, key, _STREAM)
                assert got.body.endswith(b"data: [DONE]\n\n")
                assert whole[tenant.key_id, key] <= {got.body}
        assert (await verify(place.database)).drifts == []


async def _no_claims_run(place: Place, tenant: Tenant) -> list[str] | None:
    states = await place.books.states(tenant)
    return None if "running" in states else states or ["none"]
