"""One run of the crash matrix: calls to a provider that keeps its own books, and a death among them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from core.database import Database
from core.ids import moment_of
from core.writer import Writer
from metering.verify import Verification, verify
from tests.harness.eventually import eventually, moment
from tests.harness.failpoints import GATEWAY, WORKER
from tests.harness.gateway import ROOT, Gateway
from tests.harness.private_stores import PrivatePostgres, PrivateRedis
from tests.harness.provider import Exchange, FakeProvider, answer, chat_answer, chunk
from tests.harness.raw import RawConnection, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant

PATH = "/v1/chat/completions"
# A stream's tokens come this far apart, so that a window of two seconds is a number of tokens.
_TOKEN_SECONDS = 0.02
CHECKPOINT_SECONDS = 2.0
_CALLS = 14
# What was reported so long before its gateway's death must be in the ledger as it was reported.
_SETTLED_SECONDS = 1.0


class Victim(NamedTuple):
    """Who dies, and where. *point* is empty for stores, which die at a random moment."""

    kind: str
    point: str = ""
    side: str = ""
    countdown: int = 1


class Called(NamedTuple):
    """What is known of one call beside the ledger."""

    model: str
    truths: list[Truth]
    read_bytes: int
    died_at: float
    """When the gateway was killed; infinity if it was not."""


class Truth:
    """What the provider knows of one call."""

    def __init__(self, body: bytes) -> None:
        # As our own estimate of a prompt has it, so that a lost call's prompt is no source of difference.
        self.prompt = len(body) // 4 + 1
        self.output = 0
        self.reported_at: float | None = None
        self.token_times: list[float] = []


class Provider:
    """A provider that keeps its own books, by model: each call of a run names its own."""

    def __init__(self, server: FakeProvider) -> None:
        self.books: dict[str, list[Truth]] = {}
        self.server = server
        server.default = self._play

    async def _play(self, exchange: Exchange) -> None:
        body = exchange.received.json()
        truth = Truth(exchange.received.body)
        model = str(body["model"])
        self.books.setdefault(model, []).append(truth)
        tokens = int(str(body["max_tokens"]))
        if not body.get("stream"):
            await moment(_TOKEN_SECONDS * min(tokens, 10))
            truth.output, truth.reported_at = tokens, time.time()
            await answer(chat_answer(usage=(truth.prompt, tokens)))(exchange)
            return
        await exchange.send_head()
        for number in range(tokens):
            if exchange.hung_up.is_set():
                return
            truth.output += 1
            truth.token_times.append(time.time())
            await exchange.send_events(chunk(f"w{number}"), end=False)
            await moment(_TOKEN_SECONDS)
        truth.reported_at = time.time()
        await exchange.send_events(chunk(finish="stop"), chunk(usage=(truth.prompt, truth.output)))


def victims(seed: int) -> Victim:
    """The victim of a seed: every named point before and after, and every store, in turn."""
    points = [("gateway", name) for name in GATEWAY] + [("worker", name) for name in WORKER]
    every = [Victim(kind, name, side) for kind, name in points for side in ("before", "after")]
    every += [Victim("postgres"), Victim("redis")] * 5
    chosen = every[seed % len(every)]
    dice = random.Random(seed)
    if chosen.kind == "worker":
        return chosen
    # The first checkpoint is a gateway's start; the second comes two seconds later.
    return chosen._replace(countdown=2 if chosen.point == "checkpoint" else dice.randrange(1, _CALLS))


class Matrix:
    """The stores, provider and tenant of all runs, and one gateway for each."""

    def __init__(self, stores: TestStores, postgres: PrivatePostgres, redis: PrivateRedis, provider: Provider) -> None:
        self.stores, self.postgres, self.redis, self.provider = stores, postgres, redis, provider
        self.database = Database(stores.database_url, connections_max=2)
        self.writer = Writer(stores.database_url, statement_seconds_max=10)
        self.read_bytes: dict[str, int] = {}

    async def close(self) -> None:
        await self.writer.close()
        await self.database.close()

    async def run(self, seed: int, tenant: Tenant, models: list[str], gateway: Gateway) -> tuple[Victim, float]:
        """Do some calls while the seed's victim dies; return it, and when the gateway died, once all is at rest."""
        victim, dice = victims(seed), random.Random(seed)
        armed = [victim.point, victim.side, str(victim.countdown)] if victim.kind == "gateway" else []
        process = await start(gateway, *armed)
        died = asyncio.create_task(_death_of(process))
        calls = [asyncio.create_task(self._call(gateway, tenant, model, dice)) for model in models]
        await self._kill(victim, process, dice)
        await asyncio.gather(*calls)
        await self._end(process)
        died_at = await died
        await self._sweep(victim)
        return victim, died_at

    async def kill_late(self, tenant: Tenant, models: list[str], gateway: Gateway) -> float:
        """Kill a gateway when its streams have run for more than two windows; return when, once all is at rest."""
        process = await start(gateway)
        died = asyncio.create_task(_death_of(process))
        body = {model: chat(model, stream=True, max_tokens=1_000) for model in models}
        connections = [await RawConnection.open(gateway.port) for _ in models]
        for connection, model in zip(connections, models, strict=True):
            await connection.send(post(PATH, tenant.key, body[model]))
            self.read_bytes[model] = 1
        books = self.provider.books
        await eventually(lambda: all(books.get(m) and books[m][0].output > 230 for m in models), 30)
        process.kill()
        died_at = await died
        for connection in connections:
            connection.reset()
        await eventually(self._work, 30)
        return died_at

    def called(self, models: list[str], died_at: float) -> list[Called]:
        """What is known of the calls of a run."""
        return [Called(m, self.provider.books.get(m, []), self.read_bytes[m], died_at) for m in models]

    async def _call(self, gateway: Gateway, tenant: Tenant, model: str, dice: random.Random) -> None:
        await moment(dice.random() * 0.5)
        is_long = dice.random() < 0.25
        body = chat(model, stream=dice.random() < 0.7, max_tokens=dice.randrange(100, 160) if is_long else 10)
        leaves_after = dice.random() * 0.3 if dice.random() < 0.2 else None
        self.read_bytes[model] = 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            connection = await RawConnection.open(gateway.port)
            try:
                await connection.send(post(PATH, tenant.key, body))
                async with asyncio.timeout(leaves_after or 20):
                    await self._read(connection, model)
            finally:
                connection.reset()

    async def _read(self, connection: RawConnection, model: str) -> None:
        """Read a whole answer, and note how much of a good one has come."""
        status, headers = await connection.head()
        self.read_bytes[model] = int(status == 200)
        if "content-length" in headers:
            await connection.body(headers)
            return
        while piece := await connection.chunk():
            self.read_bytes[model] += len(piece)

    async def _kill(self, victim: Victim, process: subprocess.Popen[bytes], dice: random.Random) -> None:
        await moment(0.2 + dice.random() * 0.6)
        if victim.kind == "postgres":
            await self.postgres.stop_immediately()
            await moment(dice.random())
            await self.postgres.start()
        elif victim.kind == "redis":
            await self.redis.kill()
            await moment(dice.random() * 0.5)
            await self.redis.start()
        elif victim.kind == "worker":
            # The worker has something to do only when a gateway has died.
            process.kill()

    async def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Let what still runs come to its end, and the gateway too, if it lives."""
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, 30)

    async def _sweep(self, victim: Victim) -> None:
        """Have a worker do its work; one that dies of it is followed by another."""
        if victim.kind == "worker":
            await self._work(victim.point, victim.side, str(victim.countdown))
        await eventually(self._work, 30)

    async def _work(self, *armed: str) -> bool:
        [[up]] = await self.writer.fetch("SELECT extract(epoch FROM now() - pg_postmaster_start_time())::float8")
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.harness.failpoints",
            "worker",
            *armed,
            cwd=ROOT,
            env={**os.environ, **self.stores.environ(), "AAP_TEST_LEASE_SECONDS": str(min(0.2, up / 2))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        await worker.wait()
        return (await self.writer.fetch("SELECT count(*) FROM usage_intents"))[0][0] == 0

    async def entries(self, models: list[str]) -> dict[str, list[dict[str, Any]]]:
        """The ledger's entries by model."""
        rows = await self.writer.fetch("SELECT * FROM ledger_entries WHERE model = ANY($1)", models)
        found: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
        for row in rows:
            found[row["model"]].append(dict(row))
        return found

    async def verified(self) -> Verification:
        return await verify(self.database)


async def _death_of(process: subprocess.Popen[bytes]) -> float:
    """Return when the process was killed; infinity if it ended by itself."""
    code = await asyncio.to_thread(process.wait, 60)
    return time.time() if code == -signal.SIGKILL else math.inf


async def start(gateway: Gateway, *armed: str) -> subprocess.Popen[bytes]:
    """Start one process of *gateway*, armed."""
    return await gateway.add_process("tests.harness.failpoints", "gateway", *armed)


def problems(call: Called, entries: list[dict[str, Any]]) -> list[str]:
    """Return what the ledger has wrong of one call."""
    model, truths, read_bytes = call.model, call.truths, call.read_bytes
    usage = [entry for entry in entries if entry["kind"] == "usage"]
    if len(usage) > 1:
        return [f"{model}: entered {len(usage)} times"]
    if not usage:
        return [f"{model}: missing"] if truths or read_bytes else []
    prompt = sum(entry["input_tokens"] for entry in entries)
    output = sum(entry["output_tokens"] for entry in entries)
    if not truths:
        # Its gateway died in the moment between the intent and the provider: billed its prompt, by estimate.
        return [] if usage[0]["quality"] == "estimated" and output == 0 else [f"{model}: billed, and never asked for"]
    truth = truths[-1]
    if usage[0]["quality"] == "exact":
        right = prompt == truth.prompt and output == truth.output and truth.reported_at is not None
        refused = usage[0]["requests"] == 0 and output == 0
        return [] if right or refused else [f"{model}: {prompt}+{output} is not {truth.prompt}+{truth.output}"]
    if truth.reported_at is not None and truth.reported_at < call.died_at - _SETTLED_SECONDS:
        return [f"{model}: estimated, and reported {call.died_at - truth.reported_at:.2f} s before the gateway's death"]
    return _window_problems(model, usage[0], truth, output)


def _window_problems(model: str, entry: dict[str, Any], truth: Truth, output: int) -> list[str]:
    """An estimate knows all but the last window: what came after the last checkpoint that there should have been."""
    if entry["outcome"] != "gateway_lost":
        # The gateway lived and ended the call itself: it counted what it passed on.
        known = truth.output - 5
    else:
        died_at = (truth.token_times or [0.0])[-1]
        known = sum(at < died_at - CHECKPOINT_SECONDS - 0.7 for at in truth.token_times)
    began = moment_of(entry["request_id"]).timestamp()
    if known <= output <= truth.output + 3:
        return []
    ages = [round(at - began, 2) for at in truth.token_times[:: max(1, len(truth.token_times) // 4)]]
    return [
        f"{model}: {entry['outcome']}: {output} of {truth.output} tokens, {known} were to be known; tokens at {ages}"
    ]


def calls_of(run: int) -> list[str]:
    """The models of one run: no two runs share one."""
    return [f"m{number}" for number in range(run * _CALLS, (run + 1) * _CALLS)]
