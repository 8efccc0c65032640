"""Starts our gateway for the bench: one API process, embedded stores, a data directory of its own, one key.

It is started twice. The first start creates the stores and prints the first key; the second is the one that is timed
and measured, so that no initdb is in the figures.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.measure import kind_of, members_of, pin
from bench.report import UNGOVERNED
from bench.subjects import (
    LOAD_CORE,
    READY_SECONDS_MAX,
    REPOSITORY,
    STOP_SECONDS_MAX,
    SUBJECT_CORE,
    Subject,
    SubjectFailedError,
    await_first_answer,
    free_port,
    running,
    tail_of,
)

COMMAND_SECONDS_MAX = 30
_DIMENSIONS = ("requests-per-minute", "tokens-per-minute")  # of each scope: the two that OpenAI has
_API_MARK = "-m gateway.server"
_LIMIT = "50000000000"  # per minute, day or at once: checked on every call, met by none
_KEY = re.compile(r"sk-aap-\S+")


@contextlib.contextmanager
def our_gateway(directory: Path, mock_port: int, paced_model: str) -> Iterator[Subject]:
    """Start the gateway in front of the mock.

    Stores, supervisor and background worker are moved to the load generator's core: in production the
    stores are other machines, and the API process is what the figures are about. Errors: SubjectFailedError.
    """
    if not (REPOSITORY / "gateway" / "__main__.py").exists():
        raise SubjectFailedError("gateway/__main__.py is not there yet")
    home = directory / "gateway"
    home.mkdir()
    models = ("mock", paced_model)
    environ = {"AAP_CONFIG": str(_write_config(home, mock_port, models))}
    key = _first_key(home, environ, models)
    port = free_port()
    log = home / "second.log"
    started_at = time.monotonic()
    with running(_command(home, port), core=SUBJECT_CORE, log=log, environ=environ) as process:
        headers = {"authorization": f"Bearer {key}"}
        subject = Subject(
            name="our gateway", port=port, pid=process.pid, directory=home, api_mark=_API_MARK, headers=headers
        )
        await_first_answer(subject, process, log, started_at)
        for member in members_of(process.pid, home):
            if kind_of(member, _API_MARK) != "api":
                pin(member.pid, LOAD_CORE)
        yield subject


@contextlib.contextmanager
def ungoverned_gateway(directory: Path, started: Sequence[Subject]) -> Iterator[Subject]:
    """Start the gateway without quota and ledger, on the stores of the one in *started*. Errors: SubjectFailedError."""
    if not started:
        raise SubjectFailedError("it uses the stores of the gateway, which did not start")
    gateway = started[0]
    api = next(each for each in members_of(gateway.pid, gateway.directory) if kind_of(each, _API_MARK) == "api")
    entries = Path(f"/proc/{api.pid}/environ").read_bytes().decode().split("\0")
    # All but the descriptors that tie a process to its supervisor.
    environ = {k: v for k, _, v in (entry.partition("=") for entry in entries) if k and not k.endswith("_FD")}
    port = free_port()
    environ |= {"AAP_PORT": str(port), "AAP_DATA_DIR": str(directory / "ungoverned")}
    log = directory / "ungoverned.log"
    started_at = time.monotonic()
    command = [sys.executable, "-m", "bench.ungoverned_gateway"]
    with running(command, core=SUBJECT_CORE, log=log, environ=environ) as process:
        subject = Subject(name=UNGOVERNED, port=port, pid=process.pid, headers=gateway.headers)
        await_first_answer(subject, process, log, started_at)
        yield subject


def _write_config(home: Path, mock_port: int, models: Sequence[str]) -> Path:
    tables = "".join(
        f'[models."{name}"]\ndeployments = [{{ provider = "mock", model = "{name}" }}]\n' for name in models
    )
    config = home / "aap.toml"
    provider = f'[providers.mock]\nkind = "openai"\nbase_url = "http://127.0.0.1:{mock_port}/v1"\n'
    config.write_text(provider + tables, encoding="utf-8")
    return config


def _command(home: Path, port: int) -> list[str]:
    place = ["--host", "127.0.0.1", "--port", str(port), "--data-dir", str(home / "data")]
    return [sys.executable, "-m", "gateway", "serve", "--workers", "1", *place]


def _first_key(home: Path, environ: Mapping[str, str], models: Sequence[str]) -> str:
    """Create the stores, read the key that is printed once, lift the limits, and stop again."""
    log = home / "first.log"
    with running(_command(home, free_port()), core=SUBJECT_CORE, log=log, environ=environ) as process:
        key = _await_key(process, log)
        raise_limits(home, environ, models)
        set_prices(home, environ, models)
    deadline = time.monotonic() + STOP_SECONDS_MAX
    while members_of(process.pid, home):
        if time.monotonic() > deadline:
            left = ", ".join(f"{member.name} {member.pid}" for member in members_of(process.pid, home))
            raise SubjectFailedError(f"left running after SIGTERM: {left}")
        time.sleep(0.05)
    return key


def _await_key(process: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < deadline:
        match = _KEY.search(log.read_text(encoding="utf-8", errors="replace"))
        if match:
            return match[0]
        if process.poll() is not None:
            raise SubjectFailedError(f"ended with code {process.returncode}: {tail_of(log)}")
        time.sleep(0.05)
    raise SubjectFailedError(f"printed no key: {tail_of(log)}")


def raise_limits(home: Path, environ: Mapping[str, str], models: Sequence[str]) -> None:
    """Give organization, project, key and model limits of their own, so high that the bench meets none of them.

    All of them are checked on every call then, as the targets ask; the organization keeps a concurrency limit too.
    Errors: SubjectFailedError.
    """
    keys = json.loads(_aap(["keys", "list", "--json"], home, environ))
    scopes = [["organization"], ["project", keys[0]["project_id"]], ["key", keys[0]["id"]]]
    scopes += [["model", name] for name in models]
    limits = [word for name in _DIMENSIONS for word in (f"--{name}", _LIMIT)]
    for scope in scopes:
        concurrency = ["--concurrent-requests", _LIMIT] if scope == ["organization"] else []
        _aap(["limits", "set", *scope, *limits, *concurrency], home, environ)


def set_prices(home: Path, environ: Mapping[str, str], models: Sequence[str]) -> None:
    """Give every model a price, so that each call is rated and charged. Errors: SubjectFailedError."""
    for name in models:
        _aap(["prices", "set", name, "--input", "0.15", "--output", "0.60"], home, environ)


def _aap(words: Sequence[str], home: Path, environ: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *words],
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, **environ, "AAP_DATA_DIR": str(home / "data")},
    )
    if done.returncode != 0:
        said = " ".join((done.stderr + done.stdout).split())[-300:]
        raise SubjectFailedError(f"`aap {words[0]} {words[1]}` ended with code {done.returncode}: {said}")
    return done.stdout
