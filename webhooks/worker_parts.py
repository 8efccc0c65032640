"""What a worker works with, how fast, and how much it takes on."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from core.clock import Clock
from core.egress import EgressPolicy
from core.sealing import Sealer
from webhooks.attempts import Sender


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How long each act rests between two rounds, and after one for which PostgreSQL was down."""

    poll_seconds: float = 1.0
    spread_seconds: float = 0.25
    """What is written with the group commit of calls is not announced."""
    round_seconds_min: float = 0.01
    """Who is woken more often than that goes on at this pace."""
    take_seconds_min: float = 0.05
    """Looking for endpoints that nobody has costs a step along the index for each that is due something."""
    beat_seconds: float = 1.0
    lease_seconds: float = 10.0
    tidy_seconds: float = 5.0
    measure_seconds: float = 10.0
    delete_seconds: float = 3_600.0
    expiring_seconds: float = 300.0
    retry_seconds: float = 0.5
    drain_seconds: float = 25.0
    """Longer than an attempt takes at the most (`attempts.py`)."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """How much a worker takes on."""

    endpoints_max: int = 2_000
    """Of more endpoints that always have something to send, it has some at a time."""
    process_max: int = 2_048
    """Attempts under way."""


class WorkerParts(msgspec.Struct, frozen=True):
    """What a worker works with."""

    sender: Sender
    sealer: Sealer
    policy: Callable[[], EgressPolicy]
    clock: Clock
