"""Starts the peers in front of the mock, each as production-like as makes it comparable.

None has a database, so none keeps a ledger; LiteLLM checks its master key, the others check nothing. What a peer does
less than our gateway is in its notes, under the table. Telemetry and downloads at start are switched off.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bench.peer_install import (
    LITELLM_CHOICES,
    TENSORZERO_CHOICES,
    install_portkey,
    install_python_peer,
    version_of,
)
from bench.subjects import SUBJECT_CORE, Subject, SubjectFailedError, await_first_answer, free_port, running, tail_of

EVENTS_MISSING_MAX = 3  # role, first content and finish may come merged; the text itself is not shortened by that
_MASTER_KEY = "sk-bench-master-key"


@contextlib.contextmanager
def litellm_proxy(directory: Path, mock_port: int, models: tuple[str, ...]) -> Iterator[Subject]:
    """Start the LiteLLM proxy with one worker, a master key and no database. Errors: SubjectFailedError."""
    bin_folder = install_python_peer("litellm", LITELLM_CHOICES)
    config = directory / "litellm.yaml"  # JSON is YAML
    upstream = {"api_base": f"http://127.0.0.1:{mock_port}/v1", "api_key": "sk-mock"}
    entries = [{"model_name": name, "litellm_params": {"model": f"openai/{name}", **upstream}} for name in models]
    settings = {"telemetry": False, "num_retries": 0, "set_verbose": False}
    general = {"master_key": _MASTER_KEY}
    config.write_text(
        json.dumps({"model_list": entries, "litellm_settings": settings, "general_settings": general}), encoding="utf-8"
    )
    port = free_port()
    command = [str(bin_folder / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    environ = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it downloads the list of prices at start
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "PATH": f"{bin_folder}:/usr/bin:/bin",
    }
    log = directory / "litellm.log"
    started_at = time.monotonic()
    with running(
        [*command, "--num_workers", "1"], core=SUBJECT_CORE, log=log, environ=environ, cwd=directory
    ) as process:
        subject = Subject(
            name="LiteLLM",
            port=port,
            pid=process.pid,
            headers={"authorization": f"Bearer {_MASTER_KEY}"},
            events_missing_max=EVENTS_MISSING_MAX,
            notes=[f"{version_of(bin_folder, 'litellm')}, one worker, master key, no database, no limits, no ledger"],
        )
        await_first_answer(subject, process, log, started_at)
        yield subject


@contextlib.contextmanager
def tensorzero_gateway(directory: Path, mock_port: int, models: tuple[str, ...]) -> Iterator[Subject]:
    """Start the TensorZero gateway that its Python package carries. Errors: SubjectFailedError.

    PyPI has no gateway program, only this package; its native library contains the whole HTTP gateway and can start it
    in the process of a Python interpreter (bench/tensorzero_host.py), which waits meanwhile.
    """
    bin_folder = install_python_peer("tensorzero", TENSORZERO_CHOICES)
    config = directory / "tensorzero.toml"
    text = "[gateway]\ndisable_pseudonymous_usage_analytics = true\nobservability.enabled = false\n"
    for name in models:
        text += f'[models."{name}"]\nrouting = ["mock"]\n[models."{name}".providers.mock]\ntype = "openai"\n'
        text += f'api_base = "http://127.0.0.1:{mock_port}/v1/"\nmodel_name = "{name}"\napi_key_location = "none"\n'
    config.write_text(text, encoding="utf-8")
    log = directory / "tensorzero.log"
    host = Path(__file__).resolve().parent / "tensorzero_host.py"
    started_at = time.monotonic()
    with running([str(bin_folder / "python"), str(host), str(config)], core=SUBJECT_CORE, log=log) as process:
        while "ready http://127.0.0.1:" not in (words := log.read_text(encoding="utf-8", errors="replace")):
            if process.poll() is not None or time.monotonic() - started_at > 30:
                raise SubjectFailedError(f"gave no address: {tail_of(log)}")
            time.sleep(0.01)
        port, _, path = words.partition("ready http://127.0.0.1:")[2].split()[0].partition("/")
        note = (
            "the HTTP gateway inside its Python package (RSS includes the interpreter), no auth, no limits, no ledger"
        )
        subject = Subject(
            name="TensorZero",
            port=int(port),
            pid=process.pid,
            path=f"/{path.strip('/')}/chat/completions",
            model_prefix="tensorzero::model_name::",
            events_missing_max=EVENTS_MISSING_MAX,
            notes=[f"{version_of(bin_folder, 'tensorzero')}: {note}"],
        )
        await_first_answer(subject, process, log, started_at)
        yield subject


@contextlib.contextmanager
def portkey_gateway(directory: Path, mock_port: int) -> Iterator[Subject]:
    """Start Portkey's Node server; the mock is named in its request headers. Errors: SubjectFailedError."""
    script = install_portkey()
    node = shutil.which("node")
    if node is None:
        raise SubjectFailedError("node is not installed")
    port = free_port()
    log = directory / "portkey.log"
    command = [node, str(script), f"--port={port}", "--headless"]
    started_at = time.monotonic()
    with running(command, core=SUBJECT_CORE, log=log, environ={"NODE_ENV": "production"}, cwd=directory) as process:
        package = json.loads((script.parent.parent / "package.json").read_text(encoding="utf-8"))
        subject = Subject(
            name="Portkey",
            port=port,
            pid=process.pid,
            headers={
                "authorization": "Bearer sk-mock",
                "x-portkey-provider": "openai",
                "x-portkey-custom-host": f"http://127.0.0.1:{mock_port}/v1",
            },
            events_missing_max=EVENTS_MISSING_MAX,
            notes=[f"{package['version']} on Node, keys not checked, no limits, no ledger"],
        )
        await_first_answer(subject, process, log, started_at)
        yield subject
