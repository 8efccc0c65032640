"""Limits of requests, tokens and concurrency, and which of them hold for one call."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Final

import msgspec

from core.ids import KeyId, OrganizationId, ProjectId
from core.resp import Script, ScriptShape
from keys.allowances import Allowance, Counted
from keys.budgets import Budget, period_bounds
from keys.caps import SEED_SCRIPT, Cap, limit_of, state_key
from keys.dimensions import DIMENSIONS, LIMIT_MAX, LimitScope
from keys.errors import RateLimitReached

QUOTA_SCRIPT: Final = Script(files("keys").joinpath("quota.lua").read_text())
SETTLE_SCRIPT: Final = Script(files("keys").joinpath("settle.lua").read_text())
QUOTA_SCRIPTS: Final = (QUOTA_SCRIPT, SETTLE_SCRIPT, SEED_SCRIPT)
# A crashed gateway's slots come back after this long; a living one renews after a third of it.
LEASE_SECONDS: Final = 60


class RateLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Limits of one scope; None is no limit."""

    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent_requests: int | None = None

    def over(self, defaults: RateLimits) -> RateLimits:
        """Return these limits, with *defaults* where there is none."""
        values = {name: getattr(self, name) for name in DIMENSIONS}
        return RateLimits(**{n: getattr(defaults, n) if v is None else v for n, v in values.items()})

    def as_tuple(self) -> tuple[int | None, ...]:
        """Return the limits in the order of DIMENSIONS."""
        return tuple(getattr(self, name) for name in DIMENSIONS)


# Below what a fresh installation's stores and one provider account carry, and far above what a first user needs.
DEFAULT_ORGANIZATION_LIMITS: Final = RateLimits(
    requests_per_minute=10_000, tokens_per_minute=10_000_000, concurrent_requests=1_000
)


class DefaultLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[limits]` table of aap.toml: what holds where nothing else was set."""

    organization: RateLimits = DEFAULT_ORGANIZATION_LIMITS
    project: RateLimits = RateLimits()
    key: RateLimits = RateLimits()
    model: dict[str, RateLimits] = {}

    def problems(self) -> list[str]:
        """Return what is wrong with the numbers, one line each."""
        scopes = {"organization": self.organization, "project": self.project, "key": self.key}
        scopes |= {f"model.{name}": limits for name, limits in self.model.items()}
        return [
            f"limits.{scope}.{name}: expected a whole number from 1 to {LIMIT_MAX}, got {value}"
            for scope, limits in scopes.items()
            for name, value in zip(DIMENSIONS, limits.as_tuple(), strict=True)
            if value is not None and not 1 <= value <= LIMIT_MAX
        ]


class Window(msgspec.Struct, frozen=True, gc=False):
    """What a caller's headers say of requests or tokens: the limit, what remains, milliseconds until it is full."""

    limit: int
    remaining: int
    reset_ms: int


def window_of(shown: Sequence[int] | None, start: int) -> Window | None:
    """Return what six numbers of the script's answer say of requests (from 0) or of tokens (from 3)."""
    if shown is None or shown[start] < 0:
        return None
    return Window(shown[start], shown[start + 1], shown[start + 2])


class ScopedLimits(msgspec.Struct, frozen=True):
    """The limits of one scope of one call. *id* names its bucket."""

    scope: LimitScope
    id: str
    limits: RateLimits


class QuotaPlan:
    """All limits that hold for one key on one model, encoded for the Lua scripts once and used for every call."""

    __slots__ = (
        "_pack_amounts",
        "_period_keys",
        "_period_since_ms",
        "_period_until_ms",
        "budgets",
        "caps",
        "denial",
        "denied_until_seconds",
        "is_empty",
        "memo",
        "names",
        "organization_id",
        "record_prefix",
        "scopes",
        "settle_shape",
        "shape",
        "tokens_max",
        "tokens_scope",
    )

    def __init__(self, organization_id: OrganizationId, scopes: list[ScopedLimits], caps: Sequence[Cap] = ()) -> None:
        # Scopes without any limit cost nothing: they are not sent.
        self.scopes = [scoped for scoped in scopes if any(v is not None for v in scoped.limits.as_tuple())]
        self.organization_id = organization_id
        self.names = [f"{scoped.scope}:{scoped.id}" for scoped in self.scopes]
        # All keys of one organization share a hash tag, so that they live on one node of a cluster.
        tag = b"q:{%b}:" % organization_id.encode()
        self.record_prefix = tag + b"r:"
        self.budgets = tuple(cap for cap in caps if isinstance(cap, Budget) and cap.is_hard)
        """Those that can refuse. Soft ones are PostgreSQL's business alone."""
        self.caps: tuple[Cap, ...] = (*self.budgets, *(cap for cap in caps if isinstance(cap, Allowance)))
        """What is counted by period: hard budgets, then allowances."""
        self._pack_amounts = struct.Struct(f"<{len(self.caps)}d").pack
        self.is_empty = not self.scopes and not self.caps
        """Whether nothing limits these calls."""
        self._period_keys: tuple[bytes, ...] = ()
        self._period_since_ms = 0.0
        self._period_until_ms = 0.0
        self.shape, self.settle_shape = _shapes(tag, self.scopes, self.names, self.caps)
        smallest = min(_token_limits(self.scopes), default=(math.inf, ""))
        self.tokens_max, self.tokens_scope = smallest
        # Set by the quota while a limit of requests is known to be exhausted.
        self.denied_until_seconds = 0.0
        self.denial: RateLimitReached | None = None
        self.memo: dict[object, object] = {}
        """What callers of this plan have worked out once for all its calls, under names of their own."""

    @classmethod
    def for_call(
        cls,
        *,
        organization: tuple[OrganizationId, RateLimits],
        project: tuple[ProjectId, RateLimits],
        key: tuple[KeyId, RateLimits],
        model: tuple[str, RateLimits],
        caps: Sequence[Cap] = (),
    ) -> QuotaPlan:
        """Return the plan for one key on one model."""
        return cls(
            organization[0],
            [
                ScopedLimits("key", key[0], key[1]),
                ScopedLimits("project", project[0], project[1]),
                ScopedLimits("organization", organization[0], organization[1]),
                ScopedLimits("model", model[0], model[1]),
            ],
            caps,
        )

    def cap_keys(self, started_ms: int) -> tuple[bytes, ...]:
        """Return where Redis holds the caps' present periods, for a call that began at *started_ms*."""
        if not self.caps:
            return ()
        if not self._period_since_ms <= started_ms < self._period_until_ms:
            moment = datetime.fromtimestamp(started_ms / 1000, UTC)
            bounds = [period_bounds(cap.period, moment) for cap in self.caps]
            # Both ends: a call that began before midnight may come here after one that began behind it.
            self._period_since_ms = max(starts_at.timestamp() for starts_at, _ in bounds) * 1000
            self._period_until_ms = min(ends_at.timestamp() for _, ends_at in bounds) * 1000
            self._period_keys = tuple(
                state_key(cap, starts_at) for cap, (starts_at, _) in zip(self.caps, bounds, strict=True)
            )
        return self._period_keys

    def amounts(self, nano_usd: int, counted: Counted) -> bytes:
        """Return what a call takes of each cap, as the scripts read it: nothing where there is none."""
        if not self.caps:
            return b""
        return self._pack_amounts(
            *(counted.of(cap.unit) if isinstance(cap, Allowance) else nano_usd for cap in self.caps)
        )


def _shapes(
    tag: bytes, scopes: list[ScopedLimits], names: list[str], caps: Sequence[Cap]
) -> tuple[ScriptShape, ScriptShape]:
    limited = [
        name for scoped, name in zip(scopes, names, strict=True) if scoped.limits.concurrent_requests is not None
    ]
    numbers = [-1 if value is None else value for scoped in scopes for value in scoped.limits.as_tuple()]
    keys = [tag + b"buckets", *(tag + b"leases:" + name.encode() for name in limited)]
    packed = struct.pack(f"<{len(numbers)}d", *numbers)
    most = struct.pack(f"<{len(caps)}d", *map(limit_of, caps))
    fields = [name.encode() for name in names]
    lease_ms = b"%d" % (LEASE_SECONDS * 1000)
    return (
        ScriptShape(QUOTA_SCRIPT, keys=keys, fixed=[lease_ms, packed, most, *fields]),
        ScriptShape(SETTLE_SCRIPT, keys=keys, fixed=[b"%d" % len(caps), packed, *fields]),
    )


def _token_limits(scopes: list[ScopedLimits]) -> list[tuple[float, str]]:
    return [
        (limit, f"{scoped.scope} {name.replace('_', ' ')}")
        for scoped in scopes
        for name, limit in zip(DIMENSIONS[2:4], scoped.limits.as_tuple()[2:4], strict=True)
        if limit is not None
    ]
