"""Which deployment serves a call: by weight among the healthy ones, and not one that just failed.

A deployment that fails five times in a row is rested for ten seconds; then a single call tries it. What is known of
a deployment's health lives in this process: it is learned quickly, and a shared opinion could rest a deployment that
only one machine cannot reach.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from typing import Final

from inference.catalog import Deployment, Model
from inference.errors import NoDeploymentAvailable

_FAILURES_MAX: Final = 5
_REST_SECONDS: Final = 10.0
# A provider's Retry-After is obeyed up to here; a minute later its limits have moved on.
_REST_SECONDS_MAX: Final = 60.0


class _Health:
    __slots__ = ("failures", "is_trying", "rests_until")

    def __init__(self) -> None:
        self.failures = 0
        self.rests_until = 0.0
        self.is_trying = False


class Router:
    """Chooses deployments, and remembers how they did."""

    def __init__(self) -> None:
        self._health: dict[str, _Health] = {}
        self._random = random.Random()  # noqa: S311 - spreads load; nothing depends on guessing it

    def choose(self, model: Model, failed: Collection[Deployment]) -> Deployment:
        """Return where to send the call: not to one in *failed* unless there is no other.

        Errors: NoDeploymentAvailable when every deployment is being rested.
        """
        deployments = model.deployments
        if len(deployments) == 1 and deployments[0].id not in self._health:
            return deployments[0]
        ready = [deployment for deployment in deployments if self._is_ready(deployment)]
        if not ready:
            raise NoDeploymentAvailable(self._shortest_rest_seconds(deployments))
        fresh = [deployment for deployment in ready if deployment not in failed] or ready
        chosen = self._weighted(fresh)
        health = self._health.get(chosen.id)
        if health is not None and health.rests_until:
            # This call tries it; if nothing is heard of it (a caller who hangs up), the next may after another rest.
            health.is_trying = True
            health.rests_until = time.monotonic() + _REST_SECONDS
        return chosen

    def has_other(self, model: Model, failed: Collection[Deployment]) -> bool:
        """Tell whether a deployment is ready that has not failed this call."""
        return any(self._is_ready(d) for d in model.deployments if d not in failed)

    def succeeded(self, deployment: Deployment) -> None:
        """Forget what was held against *deployment*."""
        if self._health:
            self._health.pop(deployment.id, None)

    def failed(self, deployment: Deployment, *, rest_seconds: float | None = None) -> None:
        """Note a failure. *rest_seconds* rests it at once: what a provider's Retry-After asks for."""
        health = self._health.setdefault(deployment.id, _Health())
        health.failures += 1
        health.is_trying = False
        if rest_seconds is not None:
            health.rests_until = time.monotonic() + min(rest_seconds, _REST_SECONDS_MAX)
        elif health.failures >= _FAILURES_MAX:
            health.rests_until = time.monotonic() + _REST_SECONDS

    def released(self, deployment: Deployment) -> None:
        """Note that a call ended without telling anything about *deployment*."""
        health = self._health.get(deployment.id)
        if health is not None and health.is_trying:
            health.is_trying = False
            health.rests_until = time.monotonic()

    def state_of(self, deployment: Deployment) -> str:
        """Return `closed` (in use), `open` (rested) or `half_open` (being tried): the breaker's usual words."""
        health = self._health.get(deployment.id)
        if health is None or not health.rests_until:
            return "closed"
        return "half_open" if health.is_trying or health.rests_until <= time.monotonic() else "open"

    def _is_ready(self, deployment: Deployment) -> bool:
        health = self._health.get(deployment.id)
        if health is None or not health.rests_until:
            return True
        return health.rests_until <= time.monotonic()

    def _weighted(self, deployments: list[Deployment]) -> Deployment:
        weights = [deployment.weight for deployment in deployments]
        if len(deployments) == 1 or not any(weights):
            return deployments[0]
        return self._random.choices(deployments, weights)[0]

    def _shortest_rest_seconds(self, deployments: tuple[Deployment, ...]) -> float:
        now = time.monotonic()
        rests = [health.rests_until - now for d in deployments if (health := self._health.get(d.id))]
        return max(0.1, min(rests, default=1.0))
