"""What gets measured: how each subject is started, found ready, and stopped again.

Each subject is a context manager that yields a Subject and ends only the process that it started. The gateway itself is
in bench/gateway_subject.py, the peers in bench/peer_subjects.py.
"""

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from bench.measure import Reading, read_subject

REPOSITORY = Path(__file__).resolve().parent.parent
_CORES = sorted(os.sched_getaffinity(0))
SUBJECT_CORE = _CORES[0]
LOAD_CORE = _CORES[min(1, len(_CORES) - 1)]  # with a single core the figures are of little use, but they come
READY_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0
POLL_SECONDS = 0.01


class SubjectFailedError(Exception):
    """A subject could not be started; the text says why and goes into the table."""


class Subject(msgspec.Struct, kw_only=True):
    """A started server and how to call it."""

    name: str
    port: int
    pid: int = 0  # 0: nothing stands between the caller and the mock
    directory: Path | None = None  # whatever lives here belongs to the subject too
    api_mark: str = ""  # a piece of the API processes' command line, where there are other processes too
    path: str = "/v1/chat/completions"
    headers: dict[str, str] = {}
    model_prefix: str = ""
    events_missing_max: int = 0  # peers may merge the role chunk or the finish chunk with a neighbour
    start_seconds: float = 0.0  # from the command to the first 200
    api_start_seconds: float = 0.0  # from the birth of the API process to the first 200
    notes: list[str] = msgspec.field(default_factory=list)

    def read(self) -> Reading:
        """Read the CPU time and memory of the subject's processes."""
        return read_subject(self.pid, self.directory, self.api_mark) if self.pid else Reading()


@contextlib.contextmanager
def running(
    command: Sequence[str], *, core: int, log: Path, environ: Mapping[str, str] | None = None, cwd: Path = REPOSITORY
) -> Iterator[subprocess.Popen]:
    """Run a command on one core with its output in a log; on the way out it gets SIGTERM, and SIGKILL if it stays."""
    own_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})  # the child inherits it, with every process that it starts
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env={**os.environ, **(environ or {})},
            )
    finally:
        os.sched_setaffinity(0, own_cores)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """Take a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def await_first_answer(subject: Subject, process: subprocess.Popen, log: Path, started_at: float) -> None:
    """Ask until a chat completion comes back with 200, and note how long that took.

    Errors: SubjectFailedError with the last answer or the end of the log.
    """
    problem = "no answer"
    while time.monotonic() - started_at < READY_SECONDS_MAX:
        if process.poll() is not None:
            raise SubjectFailedError(f"ended with code {process.returncode}: {tail_of(log)}")
        problem = ask_once(subject)
        if problem is None:
            now = time.monotonic()
            subject.start_seconds = now - started_at
            born_at = subject.read().api_started_ticks / os.sysconf("SC_CLK_TCK") if subject.pid else 0.0
            subject.api_start_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - born_at if born_at else 0.0
            return
        time.sleep(POLL_SECONDS)
    raise SubjectFailedError(f"not ready after {READY_SECONDS_MAX:.0f} s, last: {problem}; log: {tail_of(log)}")


def ask_once(subject: Subject) -> str | None:
    """Ask for one chat completion; None when it is a 200, else what came instead."""
    connection = http.client.HTTPConnection("127.0.0.1", subject.port, timeout=10)
    try:
        body = chat_body(subject.model_prefix + "mock", is_stream=False)
        connection.request("POST", subject.path, body, {"content-type": "application/json", **subject.headers})
        answer = connection.getresponse()
        text = answer.read(400).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()
    return None if answer.status == 200 else f"status {answer.status}: {text}"


def chat_body(model: str, *, is_stream: bool) -> str:
    """Write a request body of about 1 kB."""
    body = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You answer in one short sentence. " * 6},
            {"role": "user", "content": "Tell me what a gateway is for, please. " * 14},
        ],
        "max_tokens": 64,
        "temperature": 0.7,
        **({"stream": True} if is_stream else {}),
    }
    return msgspec.json.encode(body).decode()


def tail_of(log: Path, characters: int = 300) -> str:
    """Give the end of a log on one line."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return " ".join(text.split())[-characters:] or "(empty)"


@contextlib.contextmanager
def mock_provider(directory: Path) -> Iterator[Subject]:
    """Start the mock on the load generator's core; measured itself it is the direct line."""
    log = directory / "mock.log"
    command = [
        sys.executable,
        "-m",
        "bench.mock_provider",
        "--port",
        str(port := free_port()),
        "--core",
        str(LOAD_CORE),
    ]
    with running(command, core=LOAD_CORE, log=log) as process:
        subject = Subject(name="direct", port=port)
        await_first_answer(subject, process, log, time.monotonic())
        yield subject


@contextlib.contextmanager
def haproxy(directory: Path, mock_port: int) -> Iterator[Subject]:
    """Start HAProxy with one thread in front of the mock: the practical limit of a proxy that parses HTTP."""
    program = shutil.which("haproxy", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise SubjectFailedError("not installed (Debian: apt-get install haproxy)")
    port = free_port()
    config = directory / "haproxy.cfg"
    config.write_text(_HAPROXY_CONFIG.format(port=port, mock_port=mock_port), encoding="utf-8")
    log = directory / "haproxy.log"
    started_at = time.monotonic()
    with running([program, "-db", "-f", str(config)], core=SUBJECT_CORE, log=log) as process:
        subject = Subject(name="HAProxy", port=port, pid=process.pid)
        await_first_answer(subject, process, log, started_at)
        yield subject


_HAPROXY_CONFIG = """\
global
    nbthread 1
    maxconn 8192
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    http-reuse always
    # Without it HAProxy holds small chunks back (MSG_MORE), and a first token waits 200 ms.
    option http-no-delay
frontend entrance
    bind 127.0.0.1:{port}
    default_backend provider
backend provider
    server mock 127.0.0.1:{mock_port}
"""


@contextlib.contextmanager
def bare_relay(directory: Path, mock_port: int) -> Iterator[Subject]:
    """Start the smallest honest proxy on our own parts."""
    log = directory / "bare_relay.log"
    started_at = time.monotonic()
    port = free_port()
    command = [sys.executable, "-m", "bench.bare_relay", "--port", str(port), "--upstream-port", str(mock_port)]
    with running(command, core=SUBJECT_CORE, log=log) as process:
        subject = Subject(name="bare relay", port=port, pid=process.pid)
        await_first_answer(subject, process, log, started_at)
        yield subject
