"""A process of many callers that share limits with other such processes: `python -m tests.harness.quota_callers`.

Reads a job from standard input, says "ready", waits for a line, and prints what was granted.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

import msgspec
import uvloop

from core.clock import SystemClock
from core.ids import OrganizationId, new_id
from core.redis import scripts_for
from keys.errors import RateLimitReached
from keys.limits import QUOTA_SCRIPTS, QuotaPlan, RateLimits, ScopedLimits
from keys.local_quota import LocalQuota
from keys.quota import Quota


class Job(msgspec.Struct):
    redis_url: str
    organization_id: OrganizationId
    limits: list[RateLimits]
    callers: int
    asks_per_caller: int
    seed: int
    # Whether slots are given back, or kept until the lease ends.
    gives_back: bool


class Result(msgspec.Struct):
    tokens: list[int]
    # When a slot was certainly held: from having heard of the grant until just before giving it back.
    held: list[tuple[float, float]]
    denied: int
    local: int


async def run(job: Job) -> Result:
    scripts = scripts_for(job.redis_url, QUOTA_SCRIPTS, deadline_seconds=30)
    await scripts.start()
    quota = Quota(scripts, LocalQuota(SystemClock(), lambda: 1))
    result = Result([], [], 0, 0)
    chance = random.Random(job.seed)
    scopes = [
        ScopedLimits(scope, "x", one)
        for scope, one in zip(("key", "project", "organization"), job.limits, strict=False)
    ]

    async def caller() -> None:
        for _ in range(job.asks_per_caller):
            tokens = chance.randint(1, 50)
            # A plan remembers denials; a new one asks Redis again.
            plan = QuotaPlan(job.organization_id, scopes)
            try:
                reservation = await quota.reserve(new_id("req"), plan, tokens, 0)
            except RateLimitReached:
                result.denied += 1
                continue
            began = time.monotonic()
            for _ in range(chance.randint(0, 20)):
                await asyncio.sleep(0)
            result.tokens.append(tokens)
            result.held.append((began, time.monotonic()))
            if job.gives_back:
                quota.settle(reservation, None)

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await asyncio.gather(*(caller() for _ in range(job.callers)))
    result.local = quota.local_decisions
    await scripts.close()
    return result


if __name__ == "__main__":
    _job = msgspec.json.decode(sys.stdin.readline(), type=Job)
    sys.stdout.write(msgspec.json.encode(uvloop.run(run(_job))).decode() + "\n")
