"""Numbers of webhooks for Prometheus, left where an API process finds them (`gateway/metrics.py`)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from core.clock import Clock
from gateway.metrics import Histogram, NamedHistogram, Snapshot, leave
from webhooks.stats import DeliveryStats, Distribution


class WebhookMetrics:
    """What one webhook worker tells."""

    def __init__(self, directory: Path, stats: DeliveryStats, clock: Clock) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{os.getpid()}.json"
        self._stats = stats
        self._clock = clock

    async def keep_saving(self, pause_seconds: float) -> None:
        """Save again and again until cancelled."""
        while True:
            self.save()
            await asyncio.sleep(pause_seconds)

    def save(self) -> None:
        """Leave the numbers of now."""
        stats = self._stats
        counters = {f"aap_webhook_attempts\tresult={name}": float(count) for name, count in stats.results.items()}
        gauges = {
            "aap_webhook_deliveries_due": float(stats.due),
            "aap_webhook_oldest_due_seconds": stats.oldest_due_seconds(self._clock.monotonic_seconds()),
            "aap_webhook_endpoints_taken": float(stats.endpoints),
            "aap_webhook_attempts_in_flight": float(stats.in_flight),
        }
        histograms = {
            "aap_webhook_attempt_duration_seconds": _named(stats.durations),
            "aap_webhook_first_attempt_delay_seconds": _named(stats.waits),
        }
        leave(self._path, Snapshot(os.getpid(), {}, counters, gauges, histograms))


def _named(distribution: Distribution) -> NamedHistogram:
    return NamedHistogram(distribution.bounds, Histogram(list(distribution.counts), distribution.total))
