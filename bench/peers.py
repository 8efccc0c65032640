"""`make bench-peers`: our gateway beside LiteLLM, TensorZero and Portkey in one run, on this machine.

The peers are installed under bench/.peers/ when first asked for; one that cannot be installed or started says so in the
table. The matrix is that of `python -m bench`, with longer warm-ups because some peers are slow to answer at all.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

import msgspec
from rich.console import Console

from bench.__main__ import PACED_MODEL, Start, measure, scenarios
from bench.gateway_subject import our_gateway
from bench.peer_subjects import litellm_proxy, portkey_gateway, tensorzero_gateway
from bench.report import OURS, Report, exit_code_of, show
from bench.rounds import Scenario, as_json
from bench.subjects import bare_relay, haproxy, mock_provider

WARMUP_SECONDS = 1.0


def peer_scenarios() -> list[Scenario]:
    """Take the default matrix with warm-ups and windows long enough for 100 requests/s."""
    return [
        msgspec.structs.replace(
            cell,
            warmup_seconds=WARMUP_SECONDS,
            window_seconds=max(2.0, 6.0 if cell.is_stream else cell.concurrency / 50),
        )
        for cell in scenarios(is_full=False)
    ]


def run(wanted: list[str], rounds: int, console: Console) -> Report:
    """Measure the wanted subjects side by side; they are all up during the whole run."""
    with tempfile.TemporaryDirectory(prefix="aap-bench-") as folder:
        directory = Path(folder)
        with mock_provider(directory) as direct:
            models = ("mock", PACED_MODEL)
            starts: dict[str, Start] = {
                "HAProxy": lambda: haproxy(directory, direct.port),
                "bare relay": lambda: bare_relay(directory, direct.port),
                OURS: lambda: our_gateway(directory, direct.port, PACED_MODEL),
                "LiteLLM": lambda: litellm_proxy(directory, direct.port, models),
                "TensorZero": lambda: tensorzero_gateway(directory, direct.port, models),
                "Portkey": lambda: portkey_gateway(directory, direct.port),
            }
            chosen = {
                name: start
                for name, start in starts.items()
                if not wanted or any(each.casefold() in name.casefold() for each in wanted)
            }
            return measure(
                {"direct": lambda: contextlib.nullcontext(direct), **chosen}, peer_scenarios(), rounds, console
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="how often each scenario is repeated")
    parser.add_argument("--only", nargs="+", default=[], metavar="SUBJECT", help="for example: gateway litellm portkey")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round as JSON")
    arguments = parser.parse_args()
    console = Console()
    report = run(arguments.only, arguments.rounds, console)
    show(report, console, "Beside the peers: one process on one core; mock provider, load and stores on the other")
    if arguments.json:
        arguments.json.write_text(as_json(report), encoding="utf-8")
    return exit_code_of(report)


if __name__ == "__main__":
    sys.exit(main())
