"""Runs the matrix: every scenario, round after round, subject beside subject, and takes medians.

Figures of one subject wander by 30 % on a shared machine, so the subjects of a scenario take turns (A B C, A B C) and
only what was measured in the same run is compared.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.load import LoadPlan, LoadResult
from bench.measure import read_core
from bench.subjects import LOAD_CORE, REPOSITORY, Subject, chat_body

EVENTS_AT_ONCE = 63
_MEGABYTE = 1e6


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the matrix."""

    name: str
    concurrency: int
    is_stream: bool = False
    model: str = "mock"
    stream_events: int = EVENTS_AT_ONCE
    warmup_seconds: float = 0.3
    window_seconds: float = 1.0
    ramp_seconds: float = 0.0
    rounds_factor: int = 1
    """How many times as often as others it is repeated: where targets are judged, a neighbour's noise counts less."""

    @property
    def is_paced(self) -> bool:
        """Whether the events of its streams come one by one."""
        return self.model != "mock"


class Figures(msgspec.Struct, kw_only=True):
    """One subject in one scenario; None where a figure makes no sense. CPU is that of the API processes alone."""

    requests_per_second: float
    events_per_second: float | None = None
    cpu_us_per_request: float | None = None
    cpu_us_per_event: float | None = None
    redis_cpu_us_per_request: float | None = None
    postgres_cpu_us_per_request: float | None = None
    others_cpu_us_per_request: float | None = None  # supervisor and background worker
    latency_p50_us: float | None = None
    latency_p90_us: float | None = None
    latency_p99_us: float | None = None
    first_byte_p50_us: float | None = None
    first_byte_p99_us: float | None = None
    gap_p99_us: float | None = None
    load_core_percent: float | None = None  # near 100 the latencies are those of the load generator
    rss_megabytes: float | None = None
    rss_kilobytes_per_stream: float | None = None
    unanswered: int = 0
    errors: dict[str, int] = {}


class Row(msgspec.Struct, kw_only=True):
    """The median of all rounds, beside the rounds themselves."""

    scenario: Scenario
    subject: str
    median: Figures
    rounds: list[Figures]


def run_matrix(
    subjects: Sequence[Subject], scenarios: Sequence[Scenario], rounds: int, tell: Callable[[str], None]
) -> list[Row]:
    """Run everything. The paced scenarios go first, while the heaps are small and RSS per stream still shows."""
    rows = []
    for scenario in sorted(scenarios, key=lambda each: not each.is_paced):
        figures: dict[str, list[Figures]] = {subject.name: [] for subject in subjects}
        repeats = rounds * scenario.rounds_factor
        for number in range(repeats):
            for subject in subjects:
                tell(f"{scenario.name}: {subject.name}, round {number + 1} of {repeats}")
                figures[subject.name].append(run_once(subject, scenario))
        rows += [
            Row(scenario=scenario, subject=name, median=_median(each), rounds=each) for name, each in figures.items()
        ]
    return rows


def run_once(subject: Subject, scenario: Scenario) -> Figures:
    """Load one subject once, and read its CPU time exactly over the measured window."""
    plan = LoadPlan(
        host="127.0.0.1",
        port=subject.port,
        path=subject.path,
        headers=subject.headers,
        body=chat_body(subject.model_prefix + scenario.model, is_stream=scenario.is_stream),
        concurrency=scenario.concurrency,
        warmup_seconds=scenario.warmup_seconds,
        window_seconds=scenario.window_seconds,
        ramp_seconds=scenario.ramp_seconds,
        is_stream=scenario.is_stream,
        stream_events=max(1, scenario.stream_events - subject.events_missing_max) if scenario.is_stream else 0,
    )
    # A file: of some hundred kilobytes through a pipe a part was missing now and then.
    with tempfile.NamedTemporaryFile(prefix="aap-bench-load-") as file:
        return _watched(plan, subject, scenario, Path(file.name))


def _watched(plan: LoadPlan, subject: Subject, scenario: Scenario, result_path: Path) -> Figures:
    before = subject.read()
    command = [sys.executable, "-m", "bench.load", "--core", str(LOAD_CORE), "--result", str(result_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        process.stdin.write(msgspec.json.encode(plan))
        process.stdin.close()
        process.stdout.readline()  # open
        opened, core_opened = subject.read(), read_core(LOAD_CORE)
        process.stdout.readline()  # shut
        shut, core_shut = subject.read(), read_core(LOAD_CORE)
    text = result_path.read_bytes()
    try:
        result = msgspec.json.decode(text, type=LoadResult)
    except msgspec.DecodeError:
        kind = f"load generator ended with {process.returncode} after {len(text)} bytes: {text[-100:]!r}"
        return Figures(requests_per_second=0.0, errors={kind: 1})
    figures = _figures(result)
    figures.load_core_percent = core_shut.busy_percent_since(core_opened)
    if subject.pid:
        spent = shut.since(opened)
        figures.cpu_us_per_request = _per(spent.api_cpu_seconds, result.requests)
        figures.redis_cpu_us_per_request = _per(spent.redis_cpu_seconds, result.requests)
        figures.postgres_cpu_us_per_request = _per(spent.postgres_cpu_seconds, result.requests)
        figures.others_cpu_us_per_request = _per(spent.others_cpu_seconds, result.requests)
        figures.rss_megabytes = shut.rss_tree_bytes / _MEGABYTE
        if scenario.is_stream:
            figures.cpu_us_per_event = _per(spent.api_cpu_seconds, result.events)
        if scenario.is_paced and result.open_streams:
            grown_bytes = shut.rss_tree_bytes - before.rss_tree_bytes
            figures.rss_kilobytes_per_stream = grown_bytes / 1e3 / result.open_streams
    return figures


def _figures(result: LoadResult) -> Figures:
    errors = dict(result.errors)
    if not result.requests and not result.events and not errors:
        errors["no answer in the window"] = result.unanswered
    return Figures(
        requests_per_second=result.requests / result.window_seconds,
        events_per_second=result.events / result.window_seconds if result.events else None,
        latency_p50_us=percentile(result.latency_us, 50),
        latency_p90_us=percentile(result.latency_us, 90),
        latency_p99_us=percentile(result.latency_us, 99),
        first_byte_p50_us=percentile(result.first_byte_us, 50),
        first_byte_p99_us=percentile(result.first_byte_us, 99),
        gap_p99_us=percentile(result.gap_us, 99),
        unanswered=result.unanswered,
        errors=errors,
    )


def percentile(samples: Sequence[int], percent: float) -> float | None:
    """Give the smallest sample that at least so many percent do not exceed; None without samples."""
    if not samples:
        return None
    ordered = sorted(samples)
    return float(ordered[max(0, -int(-len(ordered) * percent // 100) - 1)])


def _per(cpu_seconds: float, count: int) -> float | None:
    return cpu_seconds * 1e6 / count if count else None


def _median(figures: Sequence[Figures]) -> Figures:
    """Take each figure's median over the rounds; errors are added up, for none may vanish.

    RSS per stream is that of the first round: later rounds start from a heap that has already grown.
    """
    medians: dict[str, float | None] = {}
    for name in Figures.__struct_fields__:
        if name not in {"errors", "unanswered"}:
            values = [getattr(each, name) for each in figures if getattr(each, name) is not None]
            medians[name] = statistics.median(values) if values else None
    medians["rss_kilobytes_per_stream"] = figures[0].rss_kilobytes_per_stream
    errors: dict[str, int] = {}
    for each in figures:
        for kind, count in each.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    return Figures(**medians, errors=errors, unanswered=max(each.unanswered for each in figures))


def as_json(document: object) -> str:
    """Write a document of structs as readable JSON."""
    return json.dumps(msgspec.to_builtins(document), indent=1)
