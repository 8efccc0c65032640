"""Rate limits, budgets, allowances: reserve what a call may use, settle what it did. By script, exact across processes.

When Redis is down: limits hold per process, at limit ÷ live gateways (`keys/local_quota.py`), so that all gateways
together stay near the limit; calls under a hard budget are refused (QuotaUnverifiable); those under a plan's allowance
go on, and are counted when Redis is back. A settlement that cannot be sent is sent when Redis is back (100,000 commands
of them at most; until then the reservation stays taken, which is the safe side). A Redis that has lost a budget or an
allowance is told by PostgreSQL what was used before anything is admitted.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec

from core.database import DOWN
from core.redis import Scripts
from core.resp import RedisUnavailable, Reply, ScriptCall
from keys.allowances import NOTHING_COUNTED, Allowance, Counted
from keys.budgets import period_bounds
from keys.caps import Cap, CapAuthority, seed_call
from keys.dimensions import DIMENSIONS
from keys.errors import BudgetExhausted, PlanLimitReached, QuotaUnverifiable, RateLimitReached, RequestTooLarge
from keys.limits import QuotaPlan, Window, window_of
from keys.local_quota import LocalQuota

# Lua takes some thousands of values at a time; this many keep one command short for the others.
_SETTLED_AT_ONCE: Final = 128
_EXHAUSTED: Final = 2
_UNKNOWN: Final = 3
# A call under several budgets and allowances may meet each of them for the first time.
_SEEDS_MAX: Final = 16
# Calls that Redis had admitted before it forgot them are in PostgreSQL by then, unless that is slow: what is written
# later, two seconds at most, is missing until `reconcile` finds it (docs/failure-modes.md).
_SEED_PAUSE_SECONDS: Final = 0.05


class Spend(NamedTuple):
    """The most that a call can cost, and when it began: that says to which period of a cap it belongs."""

    nano_usd_max: int
    started_ms: int


NOTHING: Final = Spend(0, 0)
"""What a call under no hard budget and no allowance reserves."""


class Reservation(msgspec.Struct, eq=False):
    """What was set aside for one call. Given back by `settle`, once, however the call ends."""

    request_id: str
    plan: QuotaPlan
    tokens: int
    nano_usd_max: int = 0
    cap_keys: tuple[bytes, ...] = ()
    shown: Reply | None = None
    """The tightest limit of requests and of tokens, for the caller: see `keys.limits.window_of`."""
    is_local: bool = False
    is_settled: bool = False
    was_sent: bool = True

    @property
    def requests(self) -> Window | None:
        """The tightest limit of requests; None where none holds, or nobody could be asked."""
        return window_of(self.shown, 0)

    @property
    def tokens_window(self) -> Window | None:
        """The tightest limit of tokens; None as above."""
        return window_of(self.shown, 3)


class Quota:
    """Reserves and settles. Counts how often the local fallback had to decide."""

    def __init__(self, scripts: Scripts, local: LocalQuota, authority: CapAuthority | None = None) -> None:
        self._scripts = scripts
        self._local = local
        self._authority = authority
        self._seeding: dict[bytes, asyncio.Task[Exception | None]] = {}
        self._settling: dict[QuotaPlan, list[tuple[Reservation, int, bytes]]] = {}
        self.local_decisions = 0

    async def reserve(
        self, request_id: str, plan: QuotaPlan, prompt_tokens: int, output_tokens: int, spend: Spend = NOTHING
    ) -> Reservation:
        """Set aside one request, its tokens, a slot, its cost and its part of allowances, or nothing at all.

        The output's share is cut to the smallest token limit: an estimate must not refuse what could fit
        (BerriAI/litellm#29191). Redis down: decided by this process alone, at its share of the limit.
        Errors: RateLimitReached; BudgetExhausted; PlanLimitReached; QuotaUnverifiable; RequestTooLarge when the prompt
        alone can never fit.
        """
        tokens = prompt_tokens + output_tokens
        if tokens > plan.tokens_max:
            if prompt_tokens > plan.tokens_max:
                limit = int(plan.tokens_max)
                raise RequestTooLarge(scope=plan.tokens_scope, limit_tokens=limit, requested_tokens=prompt_tokens)
            tokens = int(plan.tokens_max)
        reservation = Reservation(request_id, plan, tokens)
        if plan.caps:
            reservation.nano_usd_max = spend.nano_usd_max
            reservation.cap_keys = plan.cap_keys(spend.started_ms)
        if plan.is_empty:
            return reservation
        if plan.denied_until_seconds:
            _deny_again(plan)
        if self._settling:
            self.flush()  # in order: what was given back before this call came is there for it
        reply = await self._ask(reservation)
        if reply is not None and reply[0] == _UNKNOWN:
            reply = await self._ask_with_seeds(reservation, reply, spend)
        if reply is None:
            return reservation
        if reply[0] != 1:
            raise _refusal(reservation, reply, spend)
        reservation.shown = reply[4:]
        return reservation

    async def _ask_with_seeds(self, reservation: Reservation, unknown: Reply, spend: Spend) -> Reply | None:
        """Tell Redis the caps that it does not know, one after the other, and ask again. As `_ask`."""
        for _ in range(_SEEDS_MAX):
            try:
                await self._seed(reservation.plan, unknown[1] - 1, spend)
            except QuotaUnverifiable:
                if reservation.plan.budgets:
                    raise
                return self._reserve_locally(reservation)
            reply = await self._ask(reservation)
            if reply is None or reply[0] != _UNKNOWN:
                return reply
            unknown = reply
        # Told and forgotten at once, again and again: that Redis is not to be relied upon.
        return self._reserve_locally(reservation)

    async def _ask(self, reservation: Reservation) -> Reply | None:
        """Return what Redis says; None when this process had to decide, and admits the call."""
        try:
            answer = self._scripts.run(_call(reservation, b"reserve", reservation.tokens))
        except RedisUnavailable:
            # Never sent: Redis has nothing to be told afterwards.
            reservation.was_sent = False
            return self._reserve_locally(reservation)
        try:
            return await answer
        except RedisUnavailable:
            return self._reserve_locally(reservation)
        except asyncio.CancelledError:
            # The command is on its way: what it takes is given back right behind it.
            self.settle(reservation, 0)
            raise

    async def _seed(self, plan: QuotaPlan, index: int, spend: Spend) -> None:
        """Tell Redis what PostgreSQL knows of a cap: once for all calls of this process that meet it unknown.

        A call may join a seed whose read of PostgreSQL has begun, although the pause before it was for calls that were
        admitted before this one came. It has reserved nothing yet, and asks again. As long as Redis does not know the
        cap, nobody is admitted: so what is read is whole, and stays so until it is told. If another gateway was
        faster, and has admitted calls that were not read, Redis knows the cap, and what is told changes nothing. If
        it has forgotten it once more since, then what is told lacks them whoever joins: the one who began would tell
        the same, and a later seed of the joining call's own would change nothing either.

        A call that is cancelled leaves the others their seed. A failure is told to all who wait for it, and the next
        call tries anew. Errors: QuotaUnverifiable when either store is down.
        """
        authority, cap = self._authority, plan.caps[index]
        if authority is None:
            raise QuotaUnverifiable
        key = plan.cap_keys(spend.started_ms)[index]
        seeding = self._seeding.get(key)
        if seeding is None:
            moment = datetime.fromtimestamp(spend.started_ms / 1000, UTC)
            seeding = asyncio.create_task(self._tell(authority, cap, moment))
            self._seeding[key] = seeding
            seeding.add_done_callback(lambda _: self._seeding.pop(key))
        failure = await asyncio.shield(seeding)
        if failure is not None:
            raise QuotaUnverifiable from failure

    async def _tell(self, authority: CapAuthority, cap: Cap, moment: datetime) -> Exception | None:
        """Read what PostgreSQL knows of the period around *moment*, and tell Redis. Returns why it could not."""
        starts_at = period_bounds(cap.period, moment)[0]
        await asyncio.sleep(_SEED_PAUSE_SECONDS)
        try:
            standing = await authority.standing(cap, starts_at)
            await self._scripts.run(seed_call(cap, starts_at, standing, moment))
        except (*DOWN, RedisUnavailable) as error:
            return error
        return None

    async def reserve_one(self, request_id: str, allowance: Allowance, started_ms: int) -> Reservation:
        """Set aside one unit of an allowance, and nothing else: for what is no call to a model.

        Settle it with `Counted(1)` when it has happened and PostgreSQL knows. Errors: PlanLimitReached.
        """
        plan = QuotaPlan(allowance.organization_id, [], [allowance])
        return await self.reserve(request_id, plan, 0, 0, Spend(0, started_ms))

    def settle(
        self,
        reservation: Reservation,
        tokens_used: int | None,
        nano_usd: int = 0,
        counted: Counted = NOTHING_COUNTED,
    ) -> None:
        """Give back what was reserved and not used, and the slot; charge the caps. Idempotent; never waits or fails.

        *nano_usd* and *counted* are what the ledger says: budgets are charged the one, allowances the other. No
        *tokens_used* (None) keeps the tokens as reserved. More than reserved leaves the buckets in debt.
        """
        if reservation.is_settled:
            return
        reservation.is_settled = True
        if reservation.is_local:
            self._local.settle(reservation.plan, reservation.tokens, tokens_used)
        if reservation.plan.is_empty or not reservation.was_sent:
            return
        # Also after a local decision: Redis may have run a reservation whose answer came too late.
        if not self._settling:
            asyncio.get_running_loop().call_soon(self.flush)
        plan = reservation.plan
        amounts = plan.amounts(nano_usd, counted) if plan.caps else b""
        settled = (reservation, -1 if tokens_used is None else tokens_used, amounts)
        self._settling.setdefault(plan, []).append(settled)

    def flush(self) -> None:
        """Send what was settled in this tick of the event loop: the calls of one plan in one command."""
        settling, self._settling = self._settling, {}
        for plan, settled in settling.items():
            for start in range(0, len(settled), _SETTLED_AT_ONCE):
                self._scripts.deliver(_settlement(plan, settled[start : start + _SETTLED_AT_ONCE]))

    def renew(self, reservations: list[Reservation]) -> None:
        """Keep the concurrency slots of calls that are still running. Redis down: done when it is back."""
        for reservation in reservations:
            if not reservation.is_settled and not reservation.is_local and not reservation.plan.is_empty:
                self._scripts.deliver(_call(reservation, b"renew", 0))

    def _reserve_locally(self, reservation: Reservation) -> None:
        if reservation.plan.budgets:
            # Redis may have run the command, or will: nothing of it is to stay.
            self.settle(reservation, 0)
            raise QuotaUnverifiable
        self.local_decisions += 1
        try:
            self._local.reserve(reservation.plan, reservation.tokens)
        except RateLimitReached:
            # Redis may still run the command that it was too slow for.
            self.settle(reservation, 0)
            raise
        reservation.is_local = True


def _refusal(reservation: Reservation, reply: Reply, spend: Spend) -> Exception:
    plan = reservation.plan
    if reply[0] == 0:
        return _denied(plan, reply)
    cap = plan.caps[reply[1] - 1]
    used = reply[2] + reply[3]
    ends_at = period_bounds(cap.period, datetime.fromtimestamp(spend.started_ms / 1000, UTC))[1]
    if isinstance(cap, Allowance):
        needed = _taken(reservation).of(cap.unit)
        return PlanLimitReached(cap.unit, cap.limit, cap.limit - used, needed, ends_at)
    left = cap.limit_nano_usd - used
    renewed_at = None if cap.period == "total" else ends_at
    return BudgetExhausted(cap.scope, cap.period, left, spend.nano_usd_max, renewed_at)


def _taken(reservation: Reservation) -> Counted:
    """Return what a call holds of allowances until it ends."""
    return Counted(1, reservation.tokens)


def _denied(plan: QuotaPlan, reply: Reply) -> RateLimitReached:
    index = reply[1] - 1
    dimension = DIMENSIONS[index % 5]
    wait_seconds = reply[2] / 1000
    error = RateLimitReached(
        scope=plan.scopes[index // 5].scope, dimension=dimension, limit=reply[3], retry_after_seconds=wait_seconds
    )
    error.shown = reply[4:]
    if dimension.startswith("requests"):
        # Requests are never given back: until the refill nothing can be admitted, and Redis need not be asked.
        plan.denied_until_seconds = time.monotonic() + wait_seconds
        plan.denial = error
    return error


def _deny_again(plan: QuotaPlan) -> None:
    left_seconds = plan.denied_until_seconds - time.monotonic()
    if left_seconds <= 0 or plan.denial is None:
        plan.denied_until_seconds, plan.denial = 0.0, None
        return
    raise plan.denial.again(left_seconds)


def _call(reservation: Reservation, act: bytes, amount: int) -> ScriptCall:
    plan = reservation.plan
    request_id = reservation.request_id.encode()
    keys = (plan.record_prefix + request_id, *reservation.cap_keys)
    most = plan.amounts(reservation.nano_usd_max, _taken(reservation)) if plan.caps else b""
    return ScriptCall(plan.shape, keys, (act, request_id, _number(amount), most))


def _settlement(plan: QuotaPlan, settled: list[tuple[Reservation, int, bytes]]) -> ScriptCall:
    keys: list[bytes] = []
    arguments = [b"%d" % len(settled)]
    for reservation, used, amounts in settled:
        request_id = reservation.request_id.encode()
        keys.append(plan.record_prefix + request_id)
        arguments += (request_id, _number(used), amounts)
    if plan.caps:
        for reservation, _, _ in settled:
            keys += reservation.cap_keys
    return ScriptCall(plan.settle_shape, tuple(keys), tuple(arguments))


def _number(value: int) -> bytes:
    return str(value).encode()
