"""`aap serve`: stores, schema and processes, started in order, kept running, stopped in reverse."""

from __future__ import annotations

import asyncio
import base64
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Self

import structlog

from core import embedded
from core.embedded import EmbeddedUnavailable
from core.http1.proxies import ProxySettings
from core.settings import EdgeSettings, Pepper, SealingKey, Settings
from gateway.catalog_file import CatalogFile
from gateway.first_run import FirstKey, prepare
from gateway.lifeline import Lifeline
from gateway.metrics import clear

_READY_SECONDS_MAX: Final = 30.0
# Beyond the drain: interrupted streams get to say so, embedded parts close.
_STOP_SECONDS_EXTRA: Final = 15.0
# Without open streams a stop takes less, and there is nothing to explain.
_DRAIN_SAID_AFTER_SECONDS: Final = 0.5
_RESTART_PAUSE_SECONDS_MAX: Final = 10.0
# SIGHUP is what a closed terminal sends.
_STOPPING: Final = {int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGHUP)}
_LOOK_SECONDS: Final = 1.0
_log = structlog.get_logger(__name__)
Welcome = Callable[[FirstKey | None, CatalogFile | None], None]


class PortTaken(Exception):
    """Something else listens where we were told to."""


class ProcessFailed(Exception):
    """A process of ours ended before it was ready; its log says why."""


def serve(settings: Settings, *, with_worker: bool, welcome: Welcome, draining: Callable[[], None]) -> None:
    """Run until SIGTERM or SIGINT; *welcome* is called once when calls can be answered.

    *draining* is called when stopping takes a while, because calls are still open.

    A first key that was made for a start that then fails is told as well, without a catalog: it is never shown again.
    Errors: ProxyInvalid, EmbeddedUnavailable, PortTaken, ProcessFailed, ConfigurationInvalid, and the driver's when a
    store is down.
    """
    _require_free_port(settings.edge)
    # Every process reads them; better said once and here.
    ProxySettings.from_environ(os.environ)
    catalog_file = CatalogFile(settings.config_path, os.environ)
    with _Signals() as signals, embedded.stores(settings) as stores:
        first_key = asyncio.run(prepare(stores.database_url, stores.peppers[0], makes_tenant=settings.first_run))
        clear(settings.data_dir / "metrics")
        family = _Family(_environment(stores, settings), settings)
        try:
            try:
                family.start_api()
            except BaseException:
                if first_key is not None:
                    welcome(first_key, None)
                raise
            # Last: calls can be answered without workers, and sooner if those do not start beside them.
            if with_worker:
                family.start_workers(delivers_webhooks=bool(stores.sealing_keys))
            welcome(first_key, catalog_file)
            while not signals.wait(_LOOK_SECONDS) & _STOPPING:
                _revive(stores)
                family.restart_dead()
        finally:
            family.stop(signals, draining)


def work(settings: Settings) -> None:
    """Run the workers alone, on the stores that *settings* name, until SIGTERM or SIGINT."""
    with _Signals() as signals:
        family = _Family(os.environ, settings)
        try:
            family.start_workers(delivers_webhooks=bool(settings.sealing_keys))
            while not signals.wait(_LOOK_SECONDS) & _STOPPING:
                family.restart_dead()
        finally:
            family.stop(signals, lambda: None)


def _revive(stores: embedded.Stores) -> None:
    """Start embedded servers again that have died. One that will not start yet is tried again a second later."""
    try:
        stores.revive()
    except EmbeddedUnavailable as error:
        _log.error("embedded.down", error=str(error))


class _Signals:
    """Turns signals into values to wait for: no handler runs in the middle of anything."""

    def __enter__(self) -> Self:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)
        os.set_blocking(self._writing, False)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in (*_STOPPING, signal.SIGCHLD):
            # A handler must be there for the wake-up to happen; what is to be done is decided in `wait`.
            signal.signal(number, lambda _number, _frame: None)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number in (*_STOPPING, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(self._reading)
        os.close(self._writing)

    def wait(self, timeout_seconds: float) -> set[int]:
        """Return the signals that have come, waiting up to *timeout_seconds* for the first one."""
        select.select([self._reading], [], [], timeout_seconds)
        try:
            return set(os.read(self._reading, 4096))
        except BlockingIOError:
            return set()


class _Process:
    def __init__(self, module: str, environment: Mapping[str, str], lifeline: Lifeline) -> None:
        self.module = module
        self._lifeline = lifeline
        self.restarts = 0
        self.due_at = 0.0
        self._environment = environment
        self.running = self.spawn()

    def spawn(self) -> subprocess.Popen[bytes]:
        ready, told = os.pipe()
        self.ready = ready
        self.started_at = time.monotonic()
        try:
            return subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", self.module],
                env={**self._environment, **self._lifeline.environ(), "AAP_READY_FD": str(told)},
                pass_fds=(told, self._lifeline.inherited),
                stdin=subprocess.DEVNULL,
                # A session of its own: Ctrl-C reaches the supervisor, which stops everybody in order.
                start_new_session=True,
            )
        finally:
            os.close(told)


class _Family:
    """The processes of one `aap serve` or `aap worker`."""

    def __init__(self, environment: Mapping[str, str], settings: Settings) -> None:
        self._environment = environment
        self._settings = settings
        self._lifeline = Lifeline()
        self._processes: list[_Process] = []

    def start_api(self) -> None:
        """Start the API processes; return when each has opened the port. Errors: ProcessFailed."""
        api = [self._process("gateway.server") for _ in range(self._settings.edge.workers)]
        self._processes += api
        deadline = time.monotonic() + _READY_SECONDS_MAX
        for process in api:
            readable, _, _ = select.select([process.ready], [], [], max(0.0, deadline - time.monotonic()))
            if not readable or not os.read(process.ready, 1):
                raise ProcessFailed("an API process did not become ready; see the log above")

    def start_workers(self, *, delivers_webhooks: bool) -> None:
        """Start what works for all gateways. Without a sealing key there are no endpoints to deliver to."""
        self._processes.append(self._process("gateway.worker"))
        if delivers_webhooks:
            self._processes.append(self._process("gateway.webhook_worker"))

    def _process(self, module: str) -> _Process:
        return _Process(module, self._environment, self._lifeline)

    def restart_dead(self) -> None:
        """Start again what has ended, after a pause that grows with each time it fails soon."""
        now = time.monotonic()
        for process in self._processes:
            code = process.running.poll()
            if code is None:
                continue
            if not process.due_at:
                if now - process.started_at > 60:
                    process.restarts = 0
                pause_seconds = min(0.1 * 2**process.restarts, _RESTART_PAUSE_SECONDS_MAX)
                process.due_at = now + pause_seconds
                process.restarts += 1
                _log.error("process.ended", module=process.module, code=code, restarts_in_seconds=pause_seconds)
            if now >= process.due_at:
                os.close(process.ready)
                process.due_at = 0.0
                process.running = process.spawn()

    def stop(self, signals: _Signals, draining: Callable[[], None]) -> None:
        """Ask every process to drain; kill what does not end in time, or everything on a second Ctrl-C."""
        for process in self._processes:
            process.running.terminate()
        asked_at = time.monotonic()
        edge = self._settings.edge
        deadline = asked_at + edge.drain_notice_seconds + edge.drain_seconds + _STOP_SECONDS_EXTRA
        is_said = False
        while any(process.running.poll() is None for process in self._processes):
            if not is_said and time.monotonic() - asked_at > _DRAIN_SAID_AFTER_SECONDS:
                is_said = True
                draining()
            if signal.SIGINT in signals.wait(0.1) or time.monotonic() > deadline:
                for process in self._processes:
                    process.running.kill()
        for process in self._processes:
            process.running.wait()


def _environment(stores: embedded.Stores, settings: Settings) -> dict[str, str]:
    seeds = [base64.b64encode(key.seed).decode() for key in stores.webhook_signing_keys]
    return {
        **os.environ,
        "DATABASE_URL": stores.database_url,
        "REDIS_URL": stores.redis_url,
        "AAP_KEY_PEPPERS": _ring_text(stores.peppers),
        "AAP_SEALING_KEYS": _ring_text(stores.sealing_keys),
        "AAP_WEBHOOK_SIGNING_KEYS": ",".join(f"whsk_{seed}" for seed in seeds),
        "AAP_METRICS_ACCESS": settings.edge.metrics_access,
    }


def _ring_text(ring: Sequence[Pepper | SealingKey]) -> str:
    return ",".join(f"{key.id}:{key.key.hex()}" for key in ring)


def _require_free_port(settings: EdgeSettings) -> None:
    """Return if nobody listens there: our processes share the port, and a second `aap serve` would join them."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise PortTaken(f"{settings.host}:{settings.port}: {error.strerror}") from None
