"""Numbers for Prometheus, under OpenTelemetry's GenAI names where it has one.

The processes of one machine answer on one port, so a scrape reaches any of them: each leaves its numbers in a file
beside the others', and whoever is asked adds them up. Counting a call costs about two microseconds;
prometheus-client's own multi-process histograms cost ten.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from inference.exchange import Exchange

# OpenTelemetry semantic conventions for GenAI: explicit bucket boundaries.
_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKENS: Final = tuple(float(4**power) for power in range(14))
_LABELS: Final = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")


class Histogram(msgspec.Struct):
    """Counts per bucket (the last is everything above), and the sum."""

    counts: list[int]
    total: float = 0.0

    @classmethod
    def over(cls, bounds: tuple[float, ...]) -> Histogram:
        """Return an empty histogram."""
        return cls([0] * (len(bounds) + 1))

    def observe(self, bounds: tuple[float, ...], value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(bounds, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        """Count all of another's."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@lru_cache(maxsize=1024)
def _outcome(status: int, outcome: str) -> str:
    return f"{status}\t{outcome}"


def _durations() -> Histogram:
    return Histogram.over(_SECONDS)


def _first_tokens() -> Histogram:
    return Histogram.over(_FIRST_TOKEN)


def _token_counts() -> Histogram:
    return Histogram.over(_TOKENS)


class Series(msgspec.Struct):
    """The calls of one operation on one provider and model."""

    duration: Histogram = msgspec.field(default_factory=_durations)
    first_token: Histogram = msgspec.field(default_factory=_first_tokens)
    input_tokens: Histogram = msgspec.field(default_factory=_token_counts)
    output_tokens: Histogram = msgspec.field(default_factory=_token_counts)
    outcomes: dict[str, int] = {}

    def add(self, other: Series) -> None:
        """Count all of another's."""
        self.duration.add(other.duration)
        self.first_token.add(other.first_token)
        self.input_tokens.add(other.input_tokens)
        self.output_tokens.add(other.output_tokens)
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + count


class NamedHistogram(msgspec.Struct):
    """A histogram with bounds of its own."""

    bounds: tuple[float, ...]
    histogram: Histogram


class Snapshot(msgspec.Struct):
    """All numbers of one process. Series are keyed by their labels joined with a tab.

    A counter may have one label: its name, a tab, the label's name, `=` and value.
    """

    pid: int
    series: dict[str, Series] = {}
    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    histograms: dict[str, NamedHistogram] = {}


Sampler = Callable[[], tuple[dict[str, float], dict[str, float]]]


class CallMetrics:
    """Counts calls in this process, and adds up the processes' numbers for a scrape."""

    def __init__(self, directory: Path, sample: Sampler) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._path = directory / f"{os.getpid()}.json"
        self._sample = sample
        self._series: dict[tuple[str, str, str], Series] = {}

    def count(self, exchange: Exchange, tokens: tuple[int, int], duration_seconds: float) -> None:
        """Count a call that has ended; *tokens* went in and out."""
        deployment = exchange.deployment
        key = (exchange.endpoint.operation, deployment.provider.name if deployment else "", exchange.model)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = Series(outcomes={})
        duration = series.duration  # `observe` by hand where every call comes by: three calls less
        duration.counts[bisect_left(_SECONDS, duration_seconds)] += 1
        duration.total += duration_seconds
        if exchange.first_byte_at:
            series.first_token.observe(_FIRST_TOKEN, exchange.first_byte_at - exchange.started_at)
        if deployment is not None:
            input_tokens, output_tokens = tokens
            taken, made = series.input_tokens, series.output_tokens
            taken.counts[bisect_left(_TOKENS, input_tokens)] += 1
            taken.total += input_tokens
            made.counts[bisect_left(_TOKENS, output_tokens)] += 1
            made.total += output_tokens
        outcome = _outcome(exchange.status, exchange.outcome)
        series.outcomes[outcome] = series.outcomes.get(outcome, 0) + 1

    def save(self) -> None:
        """Leave this process's numbers for the others. A full disk costs a scrape, not a call."""
        counters, gauges = self._sample()
        series = {"\t".join(key): found for key, found in self._series.items()}
        snapshot = Snapshot(os.getpid(), series, counters, gauges)
        leave(self._path, snapshot)

    def collect(self) -> Iterable[Metric]:
        """Return the sums over all processes of this machine."""
        self.save()
        return _families(_merged(self._directory))


def leave(path: Path, snapshot: Snapshot) -> None:
    """Leave *snapshot* for whoever is asked. A full disk costs a scrape."""
    fresh = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        fresh.write_bytes(msgspec.json.encode(snapshot))
        fresh.replace(path)


def clear(directory: Path) -> None:
    """Forget the numbers of an earlier run. Called once, before the processes start."""
    for path in directory.glob("*.json"):
        path.unlink(missing_ok=True)


def _merged(directory: Path) -> Snapshot:
    """Add up what every process left. Counters of a process that has ended stay, so that sums never fall."""
    whole = Snapshot(0, {}, {}, {}, {})
    for path in sorted(directory.glob("*.json")):
        try:
            part = msgspec.json.decode(path.read_bytes(), type=Snapshot)
        except (OSError, msgspec.DecodeError):
            continue
        for key, series in part.series.items():
            if key in whole.series:
                whole.series[key].add(series)
            else:
                whole.series[key] = series
        for name, value in part.counters.items():
            whole.counters[name] = whole.counters.get(name, 0) + value
        for name, found in part.histograms.items():
            if name in whole.histograms:
                whole.histograms[name].histogram.add(found.histogram)
            else:
                whole.histograms[name] = found
        if _is_running(part.pid):
            for name, value in part.gauges.items():
                whole.gauges[name] = _combined(name, whole.gauges.get(name), value)
    return whole


def _combined(name: str, so_far: float | None, value: float) -> float:
    """Add up what is counted; of what is up, or late, the worst process speaks for all."""
    if so_far is None:
        return value
    if name.endswith(("_up", "_live")):
        return min(so_far, value)
    # What everybody counts in the same store is not to be added up.
    return max(so_far, value) if name.endswith(("_seconds", "_due")) else so_far + value


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _families(whole: Snapshot) -> Iterator[Metric]:
    requests = CounterMetricFamily("aap_requests", "Calls that have ended.", labels=[*_LABELS, "status", "outcome"])
    duration = _histogram("gen_ai_server_request_duration_seconds", "From first header to last byte.", _LABELS)
    first = _histogram("gen_ai_server_time_to_first_token_seconds", "From first header to first event.", _LABELS)
    tokens = _histogram("gen_ai_client_token_usage", "Tokens of one call.", (*_LABELS, "gen_ai_token_type"))
    for key, series in sorted(whole.series.items()):
        labels = key.split("\t")
        for outcome, count in sorted(series.outcomes.items()):
            requests.add_metric([*labels, *outcome.split("\t")], count)
        _add(duration, labels, _SECONDS, series.duration)
        _add(first, labels, _FIRST_TOKEN, series.first_token)
        _add(tokens, [*labels, "input"], _TOKENS, series.input_tokens)
        _add(tokens, [*labels, "output"], _TOKENS, series.output_tokens)
    yield from (requests, duration, first, tokens)
    yield from _counters(whole.counters)
    for name, found in sorted(whole.histograms.items()):
        family = _histogram(name, name.replace("_", " "), ())
        _add(family, [], found.bounds, found.histogram)
        yield family
    for name, value in sorted(whole.gauges.items()):
        yield GaugeMetricFamily(name, name.replace("_", " "), value=value)


def _counters(counters: dict[str, float]) -> Iterator[Metric]:
    families: dict[str, CounterMetricFamily] = {}
    for key, value in sorted(counters.items()):
        name, _, label = key.partition("\t")
        label_name, _, label_value = label.partition("=")
        family = families.get(name)
        if family is None:
            labels = [label_name] if label else None
            family = families[name] = CounterMetricFamily(name, name.replace("_", " "), labels=labels)
        family.add_metric([label_value] if label else [], value)
    yield from families.values()


def _histogram(name: str, help_text: str, labels: tuple[str, ...]) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, help_text, labels=list(labels))


def _add(family: HistogramMetricFamily, labels: list[str], bounds: tuple[float, ...], histogram: Histogram) -> None:
    buckets: list[tuple[str, float]] = []
    running = 0
    for bound, count in zip((*map(str, bounds), "+Inf"), histogram.counts, strict=True):
        running += count
        buckets.append((bound, running))
    family.add_metric(labels, buckets=buckets, sum_value=histogram.total)
