"""Faults on purpose: which requests meet one, and what it does to them."""

from __future__ import annotations

import asyncio
from fnmatch import fnmatchcase
from typing import Literal

import msgspec

FaultKind = Literal[
    # The work is done and remembered; the answer never arrives.
    "drop_after_commit",
    # A 500 instead of the work; an idempotency key remembers the 500, as Stripe does, unless `is_saved` is false.
    "error_before_commit",
    # The work is done, and a 500 tells otherwise.
    "error_after_commit",
    # The work waits for `seconds`.
    "slow",
    # The connection is reset before anything is read from the request.
    "reset",
    # The work waits until the fault is released (in process only).
    "hold",
]


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which requests meet which fault: those of *method* and *path* (a glob), from the *nth* one, *times* times."""

    kind: FaultKind
    method: str = "*"
    path: str = "*"
    nth: int = 1
    times: int = 1
    seconds: float = 0.0
    is_saved: bool = True


class Fault:
    """A plan at work: how often it was met, and, for holds, the two moments that tests wait for."""

    def __init__(self, plan: FaultPlan) -> None:
        self.plan = plan
        self.seen = 0
        self.met = 0
        self.entered = asyncio.Event()
        self.released = asyncio.Event()

    def release(self) -> None:
        """Let held requests go on."""
        self.released.set()

    def matches(self, method: str, path: str) -> bool:
        """Whether this request meets the fault now; counts the request if the plan speaks of it."""
        plan = self.plan
        if plan.method not in {"*", method} or not fnmatchcase(path, plan.path):
            return False
        self.seen += 1
        if self.seen < plan.nth or self.met >= plan.times:
            return False
        self.met += 1
        return True


class Faults:
    """The faults that are planned; the first that matches a request is its only one."""

    def __init__(self) -> None:
        self.planned: list[Fault] = []

    def add(self, plan: FaultPlan) -> Fault:
        """Plan a fault."""
        fault = Fault(plan)
        self.planned.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults; held requests go on."""
        for fault in self.planned:
            fault.release()
        self.planned.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        return next((fault for fault in self.planned if fault.matches(method, path)), None)
