"""Rate limits: reserve what a call may use, settle what it did use. By script, exact across processes.

When Redis is down: limits hold per process, at limit ÷ live gateways (`keys/local_quota.py`), so that all gateways
together stay near the limit; a settlement that cannot be sent is sent when Redis is back (100,000 commands
of them at most; until then the reservation stays taken, which is the safe side).
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from core.redis import Scripts
from core.resp import RedisUnavailable, Reply, ScriptCall
from keys.dimensions import DIMENSIONS
from keys.errors import RateLimitReached, RequestTooLarge
from keys.limits import QuotaPlan, Window, window_of
from keys.local_quota import LocalQuota

# Lua takes some thousands of values at a time; this many keep one command short for the others.
_SETTLED_AT_ONCE: Final = 128


class Reservation:
    """What was set aside for one call. Given back by `settle`, once, however the call ends."""

    __slots__ = ("is_local", "is_settled", "plan", "request_id", "shown", "tokens", "was_sent")

    def __init__(self, request_id: str, plan: QuotaPlan, tokens: int) -> None:
        self.request_id = request_id
        self.plan = plan
        self.tokens = tokens
        self.shown: Reply | None = None
        """The tightest limit of requests and of tokens, for the caller: see `keys.limits.window_of`."""
        self.is_local = False
        self.is_settled = False
        self.was_sent = True

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

    def __init__(self, scripts: Scripts, local: LocalQuota) -> None:
        self._scripts = scripts
        self._local = local
        self._settling: dict[QuotaPlan, list[tuple[bytes, int]]] = {}
        self.local_decisions = 0

    async def reserve(self, request_id: str, plan: QuotaPlan, prompt_tokens: int, output_tokens: int) -> Reservation:
        """Set aside one request, its tokens and a slot, in every scope of *plan*, or nothing at all.

        The output's share is cut to the smallest token limit: an estimate must not refuse what could fit
        (BerriAI/litellm#29191). Redis down: decided by this process alone, at its share of the limit.
        Errors: RateLimitReached; RequestTooLarge when the prompt alone can never fit.
        """
        tokens = prompt_tokens + output_tokens
        if tokens > plan.tokens_max:
            if prompt_tokens > plan.tokens_max:
                limit = int(plan.tokens_max)
                raise RequestTooLarge(scope=plan.tokens_scope, limit_tokens=limit, requested_tokens=prompt_tokens)
            tokens = int(plan.tokens_max)
        reservation = Reservation(request_id, plan, tokens)
        if not plan.scopes:
            return reservation
        if plan.denied_until_seconds:
            _deny_again(plan)
        if self._settling:
            self.flush()  # in order: what was given back before this call came is there for it
        try:
            answer = self._scripts.run(_call(reservation, b"reserve", tokens))
        except RedisUnavailable:
            # Never sent: Redis has nothing to be told afterwards.
            reservation.was_sent = False
            return self._reserve_locally(reservation)
        try:
            reply = await answer
        except RedisUnavailable:
            return self._reserve_locally(reservation)
        except asyncio.CancelledError:
            # The command is on its way: what it takes is given back right behind it.
            self.settle(reservation, 0)
            raise
        if not reply[0]:
            raise _denied(plan, reply)
        reservation.shown = reply[4:]
        return reservation

    def settle(self, reservation: Reservation, tokens_used: int | None) -> None:
        """Give back what was reserved and not used, and the slot. Idempotent; never waits, never fails.

        None keeps the tokens as reserved. More than reserved leaves the buckets in debt.
        """
        if reservation.is_settled:
            return
        reservation.is_settled = True
        if reservation.is_local:
            self._local.settle(reservation.plan, reservation.tokens, tokens_used)
        if not reservation.plan.scopes or not reservation.was_sent:
            return
        # Also after a local decision: Redis may have run a reservation whose answer came too late.
        if not self._settling:
            asyncio.get_running_loop().call_soon(self.flush)
        settled = (reservation.request_id.encode(), -1 if tokens_used is None else tokens_used)
        self._settling.setdefault(reservation.plan, []).append(settled)

    def flush(self) -> None:
        """Send what was settled in this tick of the event loop: the calls of one plan in one command."""
        settling, self._settling = self._settling, {}
        for plan, settled in settling.items():
            for start in range(0, len(settled), _SETTLED_AT_ONCE):
                self._scripts.deliver(_settlement(plan, settled[start : start + _SETTLED_AT_ONCE]))

    def renew(self, reservations: list[Reservation]) -> None:
        """Keep the concurrency slots of calls that are still running. Redis down: done when it is back."""
        for reservation in reservations:
            if not reservation.is_settled and not reservation.is_local and reservation.plan.scopes:
                self._scripts.deliver(_call(reservation, b"renew", 0))

    def _reserve_locally(self, reservation: Reservation) -> Reservation:
        self.local_decisions += 1
        try:
            self._local.reserve(reservation.plan, reservation.tokens)
        except RateLimitReached:
            # Redis may still run the command that it was too slow for.
            self.settle(reservation, 0)
            raise
        reservation.is_local = True
        return reservation


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
    return ScriptCall(plan.shape, (plan.record_prefix + request_id,), (act, request_id, b"%d" % amount))


def _settlement(plan: QuotaPlan, settled: list[tuple[bytes, int]]) -> ScriptCall:
    keys = tuple([plan.record_prefix + request_id for request_id, _ in settled])
    arguments = [b"%d" % len(settled)]
    for request_id, used in settled:
        arguments += (request_id, b"%d" % used)
    return ScriptCall(plan.settle_shape, keys, tuple(arguments))
