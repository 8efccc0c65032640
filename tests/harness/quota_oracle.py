"""What keys/quota.lua and keys/settle.lua must answer, worked out independently; and the script itself on a clock that tests set."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from msgspec.structs import replace
from redis.asyncio import Redis

from core.redis import Scripts
from core.resp import Reply, Script, ScriptCall, ScriptShape
from keys.dimensions import DIMENSIONS
from keys.limits import QUOTA_SCRIPT, QuotaPlan, ScopedLimits, Window

_CLOCK = "test:clock"
_TIME = "call('TIME')"


class Answer(NamedTuple):
    """Granted, or what blocks; then what the headers say."""

    blocking: tuple[str, str, int, float] | None
    requests: Window | None
    tokens: Window | None


class Oracle:
    """Buckets in integer units: 1/60,000 of a token refilled each ms, 1/86,400 each second. *now_ms* is the only clock."""

    def __init__(self, scopes: list[ScopedLimits], lease_ms: int) -> None:
        self.scopes, self.lease_ms, self.now_ms = scopes, lease_ms, 1_750_000_000_000
        self.levels: dict[tuple[int, int], tuple[int, int]] = {}
        self.leases: list[dict[str, int]] = [{} for _ in scopes]
        self.records: dict[str, tuple[int, Answer]] = {}

    def reserve(self, request_id: str, tokens: int) -> Answer:
        if request_id in self.records:
            return self.records[request_id][1]
        found, shown, refused, after = [], {"requests": None, "tokens": None}, {"requests": None, "tokens": None}, {}
        for s, scoped in enumerate(self.scopes):
            for d, limit in enumerate(scoped.limits.as_tuple()[:4]):
                if limit is None:
                    continue
                kind = "requests" if d < 2 else "tokens"
                unit, step_ms = (60_000, 1) if d % 2 == 0 else (86_400, 1_000)
                before = self._level(s, d, limit)
                left = before - (1 if d < 2 else tokens) * unit
                after[s, d] = (left, self.now_ms // step_ms)
                if left < 0:
                    found.append((-(left // limit) * step_ms, (scoped.scope, DIMENSIONS[d], limit)))
                # A refused call takes nothing: it is shown what there is without it.
                for windows, level in ((shown, left), (refused, before)):
                    window = Window(limit, max(0, level // unit), -((level - limit * unit) // limit) * step_ms)
                    if windows[kind] is None or window.remaining < windows[kind].remaining:
                        windows[kind] = window
            running = sum(expires > self.now_ms for expires in self.leases[s].values())
            if scoped.limits.concurrent_requests is not None and running >= scoped.limits.concurrent_requests:
                found.append((1_000, (scoped.scope, DIMENSIONS[4], scoped.limits.concurrent_requests)))
        if found:
            wait_ms, what = max(found, key=lambda one: one[0])
            return Answer((*what, wait_ms / 1_000), refused["requests"], refused["tokens"])
        self.levels |= after
        for s in range(len(self.scopes)):
            self.leases[s][request_id] = self.now_ms + self.lease_ms
        self.records[request_id] = (tokens, Answer(None, shown["requests"], shown["tokens"]))
        return self.records[request_id][1]

    def settle(self, request_id: str, used: int | None) -> None:
        tokens, _ = self.records.pop(request_id, (None, None))
        if tokens is None:
            return
        for (s, d), (level, at) in self.levels.items():
            if d >= 2 and used is not None:
                unit = 60_000 if d == 2 else 86_400
                limit = self.scopes[s].limits.as_tuple()[d]
                self.levels[s, d] = (min(limit * unit, level + (tokens - used) * unit), at)
        for leases in self.leases:
            leases.pop(request_id, None)

    def has_live_lease(self, request_id: str) -> bool:
        return any(leases.get(request_id, 0) > self.now_ms for leases in self.leases)

    def renew(self, request_id: str) -> None:
        for leases in self.leases:
            if request_id in leases:
                leases[request_id] = self.now_ms + self.lease_ms

    def _level(self, s: int, d: int, limit: int) -> int:
        unit, step_ms = (60_000, 1) if d % 2 == 0 else (86_400, 1_000)
        if (s, d) not in self.levels:
            return limit * unit
        level, at = self.levels[s, d]
        return min(limit * unit, level + limit * (self.now_ms // step_ms - at))


class TimedScripts:
    """Runs the product's own scripts, with Redis's TIME replaced by a clock under the test's control."""

    def __init__(self, scripts: Scripts, redis: Redis) -> None:
        self._scripts, self._redis = scripts, redis
        self._timed: dict[Script, Script] = {}

    async def set_clock(self, now_ms: int) -> None:
        pipeline = self._redis.pipeline()
        pipeline.delete(_CLOCK)
        pipeline.rpush(_CLOCK, now_ms // 1_000, now_ms % 1_000 * 1_000 + 999)
        await pipeline.execute()

    @property
    def is_up(self) -> bool:
        return self._scripts.is_up

    def run(self, call: ScriptCall) -> asyncio.Future[Reply]:
        return self._scripts.run(self._with_clock(call))

    def deliver(self, call: ScriptCall) -> None:
        self._scripts.deliver(self._with_clock(call))

    async def start(self) -> None:
        await self._scripts.start()

    async def close(self) -> None:
        await self._scripts.close()

    def _with_clock(self, call: ScriptCall) -> ScriptCall:
        script = call.shape.script
        if script not in self._timed:
            source = script.source.decode()
            assert source.count(_TIME) == (1 if script is QUOTA_SCRIPT else 0)
            self._timed[script] = Script(source.replace(_TIME, f"call('LRANGE', '{_CLOCK}', 0, 1)"))
        shape = call.shape
        timed = ScriptShape(self._timed[script], keys=shape.keys, fixed=shape.fixed)
        return replace(call, shape=timed)


def fresh(plan: QuotaPlan) -> QuotaPlan:
    """The same plan without what was learned of earlier denials: every call then asks Redis."""
    return QuotaPlan(plan.organization_id, plan.scopes)
