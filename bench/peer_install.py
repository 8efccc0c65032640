"""Installs each peer in an environment of its own under bench/.peers/, once.

Everything comes through the ordinary clients (pip, npm) with whatever index they are configured for. A peer that cannot
be installed is a line of text in the table. Versions are pinned to what the published figures were measured with; the
second choice of LiteLLM is for an index that does not have the first one's dependencies yet.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.subjects import SubjectFailedError

PEERS = Path(__file__).resolve().parent / ".peers"
# 1.82.7 and 1.82.8 carried a credential stealer (BerriAI/litellm#24512): nothing below 1.106 is ever taken.
LITELLM_CHOICES = ("litellm[proxy]==1.109.1", "litellm[proxy]>=1.106.2,<1.110")
TENSORZERO_CHOICES = ("tensorzero==2026.6.0",)
# Its declared range of @hono/node-server admits versions with which every stream is answered with status 500
# ("TypeError: immutable", Portkey-AI/gateway#1389), so the lowest of the range is pinned: a peer is measured working.
PORTKEY_MANIFEST = {
    "private": True,
    "dependencies": {"@portkey-ai/gateway": "1.15.2"},
    "overrides": {"@hono/node-server": "1.3.3"},
}
INSTALL_SECONDS_MAX = 600


def install_python_peer(name: str, choices: Sequence[str]) -> Path:
    """Make the peer's virtual environment unless it is there; returns its bin folder.

    Errors: SubjectFailedError with the end of pip's words about the last choice.
    """
    folder = PEERS / name
    done = folder / "installed.txt"
    if done.exists():
        return folder / "bin"
    PEERS.mkdir(exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], f"{name}: no virtual environment")
    for choice in choices:
        try:
            _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", choice], f"pip install {choice}")
        except SubjectFailedError:
            if choice == choices[-1]:
                raise
            continue
        done.write_text(choice + "\n", encoding="utf-8")
        break
    return folder / "bin"


def install_portkey() -> Path:
    """Make Portkey's npm folder unless it is there; returns its server script. Errors: SubjectFailedError."""
    npm = shutil.which("npm")
    if npm is None:
        raise SubjectFailedError("npm is not installed")
    folder = PEERS / "portkey"
    script = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    manifest = folder / "package.json"
    wanted = json.dumps(PORTKEY_MANIFEST, indent=1)
    if not script.exists() or not manifest.exists() or manifest.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        manifest.write_text(wanted, encoding="utf-8")
        # Its install script only patches sources that the published build does not use.
        options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
        _run([npm, "install", *options], "npm install @portkey-ai/gateway")
    return script


def version_of(bin_folder: Path, package: str) -> str:
    """Read the installed version of a peer's package."""
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run(
        [str(bin_folder / "python"), "-c", code], capture_output=True, text=True, check=False
    ).stdout.strip()


def _run(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired:
        raise SubjectFailedError(f"{what}: not finished after {INSTALL_SECONDS_MAX} s") from None
    if done.returncode != 0:
        raise SubjectFailedError(f"{what} failed: {' '.join(done.stderr.split())[-300:]}")
