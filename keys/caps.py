"""Caps: whatever may be used up to an amount in a period, be it money (a hard budget) or what a plan includes.

PostgreSQL knows what was used; Redis holds it, and what running calls have reserved, so that a call is admitted in one
command (`keys/quota.lua`). A Redis that does not know a cap in its present period is told.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from importlib.resources import files
from typing import Final, Protocol

import msgspec

from core.resp import Script, ScriptCall, ScriptShape
from keys.allowances import Allowance
from keys.budgets import Budget, period_bounds

Cap = Budget | Allowance
# A cap's state outlives its period for those calls that end after it.
_STATE_DAYS_MORE: Final = 2
_STATE_DAYS_MAX: Final = 40
SEED_SCRIPT: Final = Script(files("keys").joinpath("budget_seed.lua").read_text())


class Standing(msgspec.Struct, frozen=True):
    """What PostgreSQL knows of a cap: what was used, and the most that each running call may still use."""

    spent: int
    held: tuple[tuple[str, int], ...]


class CapAuthority(Protocol):
    """Who knows what was used."""

    async def standing(self, cap: Cap, starts_at: datetime) -> Standing:
        """Return what was used in the period that began at *starts_at*. Errors: those of `core.database.DOWN`."""
        ...


def limit_of(cap: Cap) -> int:
    """Return how much of it there is in a period."""
    return cap.limit if isinstance(cap, Allowance) else cap.limit_nano_usd


def state_key(cap: Cap, starts_at: datetime) -> bytes:
    """Return where Redis holds what is used and reserved of *cap* in the period that began at *starts_at*."""
    started = int(starts_at.timestamp())
    return b"q:{%b}:$:%b:%d" % (cap.organization_id.encode(), cap.id.encode(), started)


def seed_call(cap: Cap, starts_at: datetime, standing: Standing, now: datetime) -> ScriptCall:
    """Return the command that tells Redis what PostgreSQL knows. It changes nothing where Redis knows already."""
    ends_at = period_bounds(cap.period, now)[1] if cap.period != "total" else now + timedelta(days=365)
    kept = min(ends_at + timedelta(days=_STATE_DAYS_MORE), now + timedelta(days=_STATE_DAYS_MAX)) - now
    held = [b"%d" % part if isinstance(part, int) else part.encode() for pair in standing.held for part in pair]
    arguments = (b"%d" % (kept // timedelta(milliseconds=1)), b"%d" % standing.spent, *held)
    return ScriptCall(ScriptShape(SEED_SCRIPT, keys=(), fixed=()), (state_key(cap, starts_at),), arguments)
