"""The gateway as it runs for users: API processes on a real port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from tests.harness.stores import TestStores

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def config_for(*base_urls: str, models: tuple[str, ...] = ("fake",), more: str = "") -> str:
    """An aap.toml with one provider per address, and models that all of them serve."""
    lines: list[str] = []
    for at, base_url in enumerate(base_urls):
        lines.append(f'[providers.p{at}]\nkind = "openai"\nbase_url = "{base_url}"\napi_key = "sk-upstream-{at}"')
        lines.append(f"[providers.p{at}.deadlines]\nconnect_seconds = 2\nfirst_byte_seconds = 5\nidle_seconds = 3\n")
    for model in models:
        deployments = ", ".join(f'{{ provider = "p{at}", model = "{model}" }}' for at in range(len(base_urls)))
        lines.append(f'[models."{model}"]\ndeployments = [{deployments}]')
    return "\n".join([*lines, more])


class Gateway:
    """Some API processes that share a port. `log` is what they wrote."""

    def __init__(self, stores: TestStores, directory: Path, config: str, **environ: str) -> None:
        self.port = free_port()
        self.directory = directory
        self.config_path = directory / "aap.toml"
        self.config_path.write_text(config)
        self._log_path = directory / f"gateway-{self.port}.log"
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AAP_", "OPENAI_"))},
            **stores.environ(),
            "AAP_PORT": str(self.port),
            "AAP_CONFIG": str(self.config_path),
            "AAP_DATA_DIR": str(directory),
            "AAP_DRAIN_SECONDS": "2",
            "AAP_METRICS_ACCESS": "loopback",
            **environ,
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def calls(self) -> list[dict[str, object]]:
        """The log lines of ended calls."""
        lines = [line for line in self.log.splitlines() if '"call.ended"' in line]
        return [msgspec.json.decode(line) for line in lines]

    async def start(self, processes: int = 1) -> Self:
        for _ in range(processes):
            await self.add_process()
        return self

    async def add_process(self, module: str = "gateway.server", *arguments: str) -> subprocess.Popen[bytes]:
        reading, writing = os.pipe()
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**self._environ, "AAP_READY_FD": str(writing)},
                pass_fds=(writing,),
                stdout=log,
                stderr=log,
            )
        os.close(writing)
        self.processes.append(process)
        loop = asyncio.get_running_loop()
        ready = await asyncio.wait_for(loop.run_in_executor(None, os.read, reading, 1), 30)
        os.close(reading)
        assert ready == b"1", self.log
        return process

    def terminate(self) -> None:
        for process in self.processes:
            process.terminate()

    async def wait(self, timeout_seconds: float = 20) -> list[int]:
        """Wait until every process has ended; return their codes."""
        loop = asyncio.get_running_loop()
        waits = [loop.run_in_executor(None, process.wait, timeout_seconds) for process in self.processes]
        return list(await asyncio.gather(*waits))

    async def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                # A stopped process does not die of SIGTERM.
                process.send_signal(signal.SIGCONT)
                process.terminate()
        try:
            await self.wait(10)
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            await self.wait(10)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.stop()
