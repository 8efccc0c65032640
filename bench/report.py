"""Turns rows into one table with ratios, and holds them against the targets of performance.md."""

from collections.abc import Mapping, Sequence

import msgspec
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from bench.rounds import Figures, Row
from bench.subjects import Subject

OURS = "our gateway"
# The same without quota and ledger: what these two cost is the difference.
UNGOVERNED = "no quota, ledger"
_YARDSTICKS = ("direct", "HAProxy", "bare relay")
_COLUMNS = (
    *(
        "requests/s",
        "CPU µs\n/request",
        "CPU µs\n/event",
        "Redis µs\n/request",
        "PG µs\n/request",
        "others µs\n/request",
        "added µs\np50",
        "added µs\np99",
    ),
    *(
        "first byte\n+µs p50",
        "first byte\n+µs p99",
        "RSS idle\nMB",
        "RSS kB\n/stream",
        "start s\n(API)",
        "load core\n% busy",
    ),
)


class Footprint(msgspec.Struct, kw_only=True):
    """A subject before anybody called it."""

    subject: str
    rss_idle_megabytes: float | None = None  # the largest API process
    start_seconds: float | None = None
    api_start_seconds: float | None = None
    notes: list[str] = []


class Report(msgspec.Struct, kw_only=True):
    """One run of the bench, as it is written by --json."""

    rows: list[Row]
    footprints: list[Footprint]
    failures: dict[str, str]  # subject → why it could not be started


def footprint_of(subject: Subject) -> Footprint:
    """Take the idle memory and the start times of a subject; call it before the first load."""
    if not subject.pid:
        return Footprint(subject=subject.name)
    return Footprint(
        subject=subject.name,
        rss_idle_megabytes=subject.read().rss_bytes / 1e6,
        start_seconds=subject.start_seconds,
        api_start_seconds=subject.api_start_seconds,
        notes=subject.notes,
    )


def show(report: Report, console: Console, title: str) -> None:
    """Print the table, whatever failed, and the targets if our gateway was among the subjects."""
    ratios = [f"{'req/s' if name == 'direct' else 'CPU'}\n÷ {name}" for name in _YARDSTICKS]
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("scenario", no_wrap=True)
    table.add_column("subject", no_wrap=True)
    for heading in (*_COLUMNS, *ratios):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("failures", max_width=60, overflow="fold")
    footprints = {each.subject: each for each in report.footprints}
    previous = None
    for row in report.rows:
        if previous is not None and previous != row.scenario:
            table.add_section()
        peers = {each.subject: each.median for each in report.rows if each.scenario == row.scenario}
        name = "" if previous == row.scenario else row.scenario.name
        table.add_row(name, row.subject, *_cells(row, peers, footprints[row.subject]))
        previous = row.scenario
    if report.failures:
        table.add_section()
    for name, reason in report.failures.items():
        table.add_row("", name, *[""] * (len(_COLUMNS) + len(ratios)), reason)
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if console.width < width:  # rich would cut the figures; a terminal wraps or scrolls
        console = Console(width=width, file=console.file)
    console.print(table)
    for each in report.footprints:
        for note in each.notes:
            console.print(f"{each.subject}: {note}")
    verdicts = judge(report)
    if verdicts:
        console.print(_verdict_table(verdicts))


def exit_code_of(report: Report) -> int:
    """Give 1 if our gateway did not start or gave a wrong answer; a peer that is missing does not matter."""
    return int(OURS in report.failures or any(row.median.errors for row in report.rows if row.subject == OURS))


def _cells(row: Row, peers: Mapping[str, Figures], footprint: Footprint) -> list[str]:
    own, direct = row.median, peers.get("direct")
    added = [None] * 4
    if direct is not None and row.subject != "direct":
        names = ("latency_p50_us", "latency_p99_us", "first_byte_p50_us", "first_byte_p99_us")
        added = [_minus(getattr(own, name), getattr(direct, name)) for name in names]
    if row.scenario.is_stream:
        added[:2] = [None, None]  # a paced stream lasts as long as its script; what counts is the first byte
    else:
        added[2:] = [None, None]
    # Before the first load there is no difference between scenarios, so the footprint stands in the paced rows only.
    idle = (footprint.rss_idle_megabytes, footprint.api_start_seconds) if row.scenario.is_paced else (None, None)
    stores = (own.redis_cpu_us_per_request, own.postgres_cpu_us_per_request, own.others_cpu_us_per_request)
    if row.subject != OURS:
        stores = (None, None, None)
    figures = (own.cpu_us_per_request, own.cpu_us_per_event, *stores, *added)
    return [
        _number(own.requests_per_second, 0),
        *(_number(each, 0 if each is not None and abs(each) >= 100 else 1) for each in figures),
        _number(idle[0], 1),
        _number(own.rss_kilobytes_per_stream, 1),
        _number(idle[1], 2),
        _number(own.load_core_percent, 0),
        *(_number(ratio(row, peers, name), 2) for name in _YARDSTICKS),
        failures_of(own),
    ]


def ratio(row: Row, peers: Mapping[str, Figures], yardstick: str) -> float | None:
    """Divide by a yardstick of the same scenario: requests/s beside direct, CPU beside the others (events if paced)."""
    other = peers.get(yardstick)
    if other is None or row.subject == yardstick:
        return None
    name = "cpu_us_per_event" if row.scenario.is_paced else "cpu_us_per_request"
    name = "requests_per_second" if yardstick == "direct" else name
    own_figure, other_figure = getattr(row.median, name), getattr(other, name)
    return own_figure / other_figure if own_figure is not None and other_figure else None


def failures_of(figures: Figures) -> str:
    """Say what went wrong, most frequent first; nothing is hidden."""
    parts = [f"{count} x {kind}" for kind, count in sorted(figures.errors.items(), key=lambda pair: -pair[1])]
    return ", ".join(parts)


def _minus(own: float | None, other: float | None) -> float | None:
    return own - other if own is not None and other is not None else None


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


class Verdict(msgspec.Struct, frozen=True):
    """One target of performance.md and what this run says about it. Lower is better unless `is_floor`."""

    name: str
    measured: float | None
    must: float
    go_for: float
    is_floor: bool = False

    @property
    def word(self) -> str:
        """Tell how far it got."""
        if self.measured is None:
            return "not measured"
        sign = -1 if self.is_floor else 1
        if self.measured * sign <= self.go_for * sign:
            return "reached"
        return "within must" if self.measured * sign <= self.must * sign else "MISSED"


def judge(report: Report) -> list[Verdict]:
    """Hold our gateway against the targets that this run can speak about."""
    ours = [row for row in report.rows if row.subject == OURS]
    if not ours:
        return []
    verdicts = []
    footprint = next(each for each in report.footprints if each.subject == OURS)
    for row in ours:
        peers = {each.subject: each.median for each in report.rows if each.scenario == row.scenario}
        name, own = row.scenario.name, row.median
        if row.scenario.is_paced:
            direct = peers.get("direct", own)
            added = [_minus(own.first_byte_p50_us, direct.first_byte_p50_us)]
            added += [_minus(own.first_byte_p99_us, direct.first_byte_p99_us)]
            verdicts += [
                Verdict(f"{name}: added first byte p50, µs", added[0], 30_000, 5_000),
                Verdict(f"{name}: added first byte p99, µs", added[1], 150_000, 40_000),
                Verdict(f"{name}: CPU µs per lone event", own.cpu_us_per_event, 30, 20),
                Verdict(f"{name}: RSS kB per open stream", own.rss_kilobytes_per_stream, 40, 20),
            ]
        elif row.scenario.concurrency == 64 and not row.scenario.is_stream:
            verdicts += [
                Verdict(f"{name}: CPU µs per request", own.cpu_us_per_request, 100, 50),
                Verdict(f"{name}: CPU beside HAProxy, times", ratio(row, peers, "HAProxy"), 7, 3),
                Verdict(f"{name}: quota and ledger, % of the bare relay", _governing(own, peers), 100, 50),
            ]
            for peer, must, go_for in (("TensorZero", 1.5, 3), ("Portkey", 10, 20), ("LiteLLM", 80, 150)):
                other = peers.get(peer)
                if other is not None and other.requests_per_second:
                    times = own.requests_per_second / other.requests_per_second
                    verdicts.append(
                        Verdict(f"{name}: requests/s beside {peer}, times", times, must, go_for, is_floor=True)
                    )
    verdicts += [
        Verdict("API process: start to first 200, s", footprint.api_start_seconds, 1.5, 0.8),
        Verdict("API process: RSS idle, MB", footprint.rss_idle_megabytes, 120, 80),
    ]
    return verdicts


def _governing(own: Figures, peers: Mapping[str, Figures]) -> float | None:
    """Return what quota and ledger add to a request, in percent of what the bare relay takes for one."""
    without, bare = peers.get(UNGOVERNED), peers.get("bare relay")
    if own.cpu_us_per_request is None or without is None or bare is None:
        return None
    if without.cpu_us_per_request is None or not bare.cpu_us_per_request:
        return None
    return (own.cpu_us_per_request - without.cpu_us_per_request) / bare.cpu_us_per_request * 100


def _verdict_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(title="Targets", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("target", "measured", "must", "go for", ""):
        table.add_column(heading, justify="left" if heading in {"target", ""} else "right")
    for each in verdicts:
        bound = "≥" if each.is_floor else "≤"
        limits = (f"{bound} {each.must:,g}", f"{bound} {each.go_for:,g}")
        table.add_row(each.name, _number(each.measured, 2), *limits, each.word)
    return table
