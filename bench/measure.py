"""CPU time and memory of a subject's processes, read from /proc (Linux only).

A subject is a process tree. The gateway's stores may leave the tree (a PostgreSQL postmaster daemonizes), so processes
that live in the subject's directory belong to it too. CPU time is user + system, in steps of 10 ms; RSS counts shared
pages once per process, so a tree's sum is an upper bound and `rss_bytes` is that of its largest API process.
"""

import os
from pathlib import Path

import msgspec

_PROC = Path("/proc")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Process(msgspec.Struct, frozen=True):
    """One line of /proc/<pid>/stat."""

    pid: int
    parent_pid: int
    name: str
    cpu_seconds: float
    started_ticks: int
    rss_bytes: int


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """A subject at one moment. `others` are processes that answer nobody: a supervisor, a background worker."""

    api_cpu_seconds: float = 0.0
    others_cpu_seconds: float = 0.0
    redis_cpu_seconds: float = 0.0
    postgres_cpu_seconds: float = 0.0
    rss_bytes: int = 0
    rss_tree_bytes: int = 0
    api_started_ticks: int = 0  # of the largest API process, since boot

    def since(self, earlier: "Reading") -> "Reading":
        """Give the CPU time that went by, with this moment's memory."""
        return Reading(
            api_cpu_seconds=self.api_cpu_seconds - earlier.api_cpu_seconds,
            others_cpu_seconds=self.others_cpu_seconds - earlier.others_cpu_seconds,
            redis_cpu_seconds=self.redis_cpu_seconds - earlier.redis_cpu_seconds,
            postgres_cpu_seconds=self.postgres_cpu_seconds - earlier.postgres_cpu_seconds,
            rss_bytes=self.rss_bytes,
            rss_tree_bytes=self.rss_tree_bytes,
            api_started_ticks=self.api_started_ticks,
        )


def read_subject(pid: int, directory: Path | None = None, api_mark: str = "") -> Reading:
    """Read the tree below a pid, and whatever lives in the directory.

    With a mark only the processes that have it in their command line are API processes; without, all but the stores.
    """
    cpu_seconds = {"api": 0.0, "redis": 0.0, "postgres": 0.0, "others": 0.0}
    api = []
    for process in members_of(pid, directory):
        kind = kind_of(process, api_mark)
        cpu_seconds[kind] += process.cpu_seconds
        if kind == "api":
            api.append(process)
    largest = max(api, key=lambda process: process.rss_bytes, default=None)
    return Reading(
        api_cpu_seconds=cpu_seconds["api"],
        others_cpu_seconds=cpu_seconds["others"],
        redis_cpu_seconds=cpu_seconds["redis"],
        postgres_cpu_seconds=cpu_seconds["postgres"],
        rss_bytes=largest.rss_bytes if largest else 0,
        rss_tree_bytes=sum(process.rss_bytes for process in api),
        api_started_ticks=largest.started_ticks if largest else 0,
    )


def members_of(pid: int, directory: Path | None = None) -> list[Process]:
    """List the processes of a subject, each once."""
    processes = {process.pid: process for process in _processes()}
    wanted = {pid}
    if directory is not None:
        wanted |= {each for each in processes if each != os.getpid() and _lives_in(each, directory)}
    while True:
        children = {each.pid for each in processes.values() if each.parent_pid in wanted}
        if children <= wanted:
            return [processes[each] for each in sorted(wanted) if each in processes]
        wanted |= children


def kind_of(process: Process, api_mark: str = "") -> str:
    """Tell stores from API processes by name, and API processes from others by their command line."""
    for store, name in (("redis", "redis-server"), ("postgres", "postgres")):
        if process.name.startswith(name):
            return store
    if not api_mark:
        return "api"
    try:
        command = (_PROC / str(process.pid) / "cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return "others"
    return "api" if api_mark.encode() in command else "others"


def pin(pid: int, core: int) -> None:
    """Move a process with all its threads to one core; a process that has just ended is no matter."""
    try:
        threads = [int(entry.name) for entry in (_PROC / str(pid) / "task").iterdir()]
    except OSError:
        return
    for thread in threads:
        try:
            os.sched_setaffinity(thread, {core})
        except ProcessLookupError:
            continue


class CoreTime(msgspec.Struct, frozen=True):
    """One core's time since boot, in ticks."""

    busy_ticks: int
    all_ticks: int

    def busy_percent_since(self, earlier: "CoreTime") -> float:
        """Give the share of the time that the core was not idle."""
        return 100 * (self.busy_ticks - earlier.busy_ticks) / max(1, self.all_ticks - earlier.all_ticks)


def read_core(core: int) -> CoreTime:
    """Read one core's line of /proc/stat; idle and iowait are fields 4 and 5 of proc(5), stolen time counts as busy."""
    for line in (_PROC / "stat").read_text(encoding="utf-8").splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            values = [int(each) for each in ticks[:8]]
            return CoreTime(busy_ticks=sum(values) - values[3] - values[4], all_ticks=sum(values))
    return CoreTime(busy_ticks=0, all_ticks=0)


def _processes() -> list[Process]:
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                found.append(_parse(int(entry.name), (entry / "stat").read_text(encoding="utf-8", errors="replace")))
            except OSError:  # it ended while we looked
                continue
    return found


def _parse(pid: int, line: str) -> Process:
    name, _, rest = line.partition("(")[2].rpartition(")")
    fields = rest.split()  # fields[0] is field 3 of proc(5): the state
    return Process(
        pid=pid,
        parent_pid=int(fields[1]),
        name=name,
        cpu_seconds=(int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND,
        started_ticks=int(fields[19]),
        rss_bytes=int(fields[21]) * PAGE_BYTES,
    )


def _lives_in(pid: int, directory: Path) -> bool:
    try:
        if (_PROC / str(pid) / "cwd").readlink().is_relative_to(directory):
            return True
        return str(directory).encode() in (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
