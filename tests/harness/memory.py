"""How much memory a process has."""

from __future__ import annotations

from pathlib import Path

MEGABYTE = 2**20


def resident_bytes(pid: int) -> int:
    """What is in memory now."""
    return _field(pid, "VmRSS")


def resident_bytes_peak(pid: int) -> int:
    """The most that was in memory at once since the start, or since `forget_peak`."""
    return _field(pid, "VmHWM")


def forget_peak(pid: int) -> int:
    """Start a new measurement of the peak; return what is in memory now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return resident_bytes(pid)


def _field(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
