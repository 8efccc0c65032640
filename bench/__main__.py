"""`make bench`: what our gateway costs beside the direct line, HAProxy and a bare relay.

Without arguments it takes less than three minutes. `--full` takes longer windows, more rounds and 500 and 1,000
streams. `--only` names subjects; `--json FILE` writes every round. The exit code is 1 if our own gateway failed: did
not start, or gave one wrong answer.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from rich.console import Console

from bench.gateway_subject import our_gateway, ungoverned_gateway
from bench.report import OURS, UNGOVERNED, Report, exit_code_of, footprint_of, show
from bench.rounds import Scenario, as_json, run_matrix, run_once
from bench.subjects import LOAD_CORE, Subject, SubjectFailedError, bare_relay, haproxy, mock_provider

PACED_MODEL = "mock-paced-40x80"
PACED_MODEL_FULL = "mock-paced-40x120"
Start = Callable[[], AbstractContextManager[Subject]]


def scenarios(*, is_full: bool) -> list[Scenario]:
    """List the matrix; a stream's ramp is as long as the stream, so that streams end and begin evenly."""
    window_seconds = 3.0 if is_full else 1.0
    cells = [
        Scenario(
            name=f"answers, {callers} callers",
            concurrency=callers,
            window_seconds=window_seconds,
            rounds_factor=4 if callers == 64 else 1,
        )
        for callers in (1, 8, 64, 256)
    ]
    cells.append(Scenario(name="63 events at once, 64", concurrency=64, is_stream=True, window_seconds=window_seconds))
    model, events = (PACED_MODEL_FULL, 120) if is_full else (PACED_MODEL, 80)
    cells += [
        Scenario(
            name=f"{streams} streams x 40 events/s",
            concurrency=streams,
            is_stream=True,
            model=model,
            stream_events=events,
            ramp_seconds=events / 40,
            window_seconds=6.0 if is_full else 2.0,
        )
        for streams in ((500, 1000) if is_full else (200,))
    ]
    return cells


def measure(starts: dict[str, Start], cells: Sequence[Scenario], rounds: int, console: Console) -> Report:
    """Start everything, run the matrix, stop everything. What cannot be started is a line in the table."""
    report = Report(rows=[], footprints=[], failures={})
    os.sched_setaffinity(0, {LOAD_CORE})  # the subjects' core is theirs alone
    with ExitStack() as stack, console.status("starting") as status:
        subjects = []
        for name, start in starts.items():
            status.update(f"starting {name}")
            try:
                subject = stack.enter_context(start())
            except SubjectFailedError as error:
                report.failures[name] = str(error)
                continue
            report.footprints.append(footprint_of(subject))
            subjects.append(subject)
        for subject in subjects:  # so that lazy imports and first allocations are not counted as a stream's memory
            status.update(f"warming up {subject.name}")
            run_once(subject, Scenario(name="warm-up", concurrency=8, window_seconds=0.5))
            run_once(subject, Scenario(name="warm-up", concurrency=8, is_stream=True, window_seconds=0.5))
        report.rows = run_matrix(subjects, cells, rounds, status.update)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="longer, 500 and 1,000 streams")
    parser.add_argument("--rounds", type=int, help="how often each scenario is repeated (2; with --full 3)")
    parser.add_argument(
        "--only", nargs="+", metavar="SUBJECT", help="haproxy, bare, gateway; the direct line always runs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round as JSON")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="aap-bench-") as folder:
        directory = Path(folder)
        with mock_provider(directory) as direct:
            paced = PACED_MODEL_FULL if arguments.full else PACED_MODEL
            ours: list[Subject] = []

            @contextlib.contextmanager
            def our_own() -> Iterator[Subject]:
                with our_gateway(directory, direct.port, paced) as subject:
                    ours.append(subject)
                    yield subject

            starts: dict[str, Start] = {
                "HAProxy": lambda: haproxy(directory, direct.port),
                "bare relay": lambda: bare_relay(directory, direct.port),
                OURS: our_own,
                UNGOVERNED: lambda: ungoverned_gateway(directory, ours),
            }
            wanted = [name.casefold() for name in arguments.only or []]
            starts = {
                name: start for name, start in starts.items() if not wanted or any(w in name.casefold() for w in wanted)
            }
            starts = {"direct": lambda: contextlib.nullcontext(direct), **starts}
            rounds = arguments.rounds or (3 if arguments.full else 2)
            report = measure(starts, scenarios(is_full=arguments.full), rounds, console)
    show(report, console, "One API process on one core; mock provider, load generator and stores on the other")
    if arguments.json:
        arguments.json.write_text(as_json(report), encoding="utf-8")
    return exit_code_of(report)


if __name__ == "__main__":
    sys.exit(main())
