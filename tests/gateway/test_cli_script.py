"""`.venv/bin/aap`, the command that bootstrap.py writes."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

import bootstrap
from core.version import VERSION


@pytest.mark.parametrize("name", ["plain", "with a space", 'it\'s $HOME "quoted"', "long-" + "x" * 140])
def test_it_runs_wherever_the_environment_is(tmp_path: Path, name: str) -> None:
    """Guarantee: neither a space nor a long path breaks the command, and its arguments arrive as they are."""
    directory = tmp_path / name / ".venv"
    venv.create(directory, with_pip=False, symlinks=True)
    bootstrap.link_project(directory, directory / "bin" / "python")
    # An environment without packages: it borrows ours.
    environ = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(directory / "bin" / "aap"), *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)

    assert run("version").stdout == f"{VERSION}\n", run("version").stderr
    wrong = run("no such $HOME command", "--json")
    assert wrong.returncode == 2
    assert "'no such $HOME command'" in wrong.stderr
