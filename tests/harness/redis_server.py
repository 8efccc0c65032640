"""Redis servers of a test's own: to be paused, killed and started again, alone or as a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from redis.asyncio import Redis

from core.embedded import redis_server_program
from tests.harness.eventually import eventually

_SLOTS = 16_384


class PrivateRedis:
    """A Redis server on a unix socket (or, with *port*, on TCP). Its data is gone with every stop unless kept."""

    def __init__(self, directory: Path, *options: str, port: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = port
        self._options = options
        self._socket = directory / "r.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}" if self.port else f"unix://{self._socket}"

    async def start(self) -> Self:
        where = (
            ("--port", str(self.port), "--bind", "127.0.0.1")
            if self.port
            else ("--port", "0", "--unixsocket", str(self._socket))
        )
        self._process = subprocess.Popen(
            [str(redis_server_program()), *where, "--dir", str(self.directory), "--save", "", *self._options],
            stdin=subprocess.DEVNULL,
            stdout=(self.directory / "log").open("ab"),
            stderr=subprocess.STDOUT,
        )
        await eventually(self._answers, 20)
        return self

    def pause(self) -> None:
        """Stop it as a machine stalls: connections stay open and nothing answers."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    async def kill(self) -> None:
        if self._process is not None:
            self.resume()
            self._process.kill()
            await asyncio.get_running_loop().run_in_executor(None, self._process.wait)
            self._process = None

    async def client(self) -> Redis:
        return cast("Any", Redis).from_url(self.url)

    def _send(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _answers(self) -> bool:
        family, address = (
            (socket.AF_INET, ("127.0.0.1", self.port)) if self.port else (socket.AF_UNIX, str(self._socket))
        )
        try:
            with socket.socket(family) as connection:
                connection.settimeout(1)
                connection.connect(cast("Any", address))
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.kill()


class RedisCluster:
    """Three masters that share the slots."""

    def __init__(self, directory: Path, nodes: int = 3) -> None:
        self._directory = directory
        self.nodes = [
            PrivateRedis(
                directory / f"n{at}",
                *(
                    "--cluster-enabled",
                    "yes",
                    "--cluster-node-timeout",
                    "1000",
                    "--cluster-require-full-coverage",
                    "yes",
                ),
                *("--appendonly", "yes", "--appendfsync", "always"),
                port=_cluster_port(),
            )
            for at in range(nodes)
        ]

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    async def start(self) -> Self:
        await asyncio.gather(*(node.start() for node in self.nodes))
        first, count = self.nodes[0], len(self.nodes)
        for at, node in enumerate(self.nodes):
            client = await node.client()
            slots = range(_SLOTS * at // count, _SLOTS * (at + 1) // count)
            await cast("Any", client).execute_command("CLUSTER", "ADDSLOTS", *slots)
            await cast("Any", client).execute_command("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
            if node is not first:
                await cast("Any", client).execute_command("CLUSTER", "MEET", "127.0.0.1", first.port)
            await client.aclose()
        await self.wait_ok()
        return self

    async def wait_ok(self, timeout_seconds: float = 30) -> None:
        """Return when every node knows every other one and all slots are served."""
        deadline = time.monotonic() + timeout_seconds
        for node in self.nodes:
            while not await self._is_ok(node):
                assert time.monotonic() < deadline, "the cluster did not come up"
                await asyncio.sleep(0.02)

    async def _is_ok(self, node: PrivateRedis) -> bool:
        client = await node.client()
        try:
            text = cast("Any", await cast("Any", client).execute_command("CLUSTER", "INFO"))
        finally:
            await client.aclose()
        known = (
            text
            if isinstance(text, dict)
            else dict(line.split(":", 1) for line in text.decode().split() if ":" in line)
        )
        return known["cluster_state"] == "ok" and int(known["cluster_known_nodes"]) == len(self.nodes)

    async def stop(self) -> None:
        for node in self.nodes:
            await node.kill()
        with contextlib.suppress(OSError):
            shutil.rmtree(self._directory)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.stop()


def _cluster_port() -> int:
    """A free port whose cluster bus (10,000 above it) is free too."""
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1] - 20_000
            if port < 1_024:
                continue
            with contextlib.suppress(OSError):
                bus.bind(("127.0.0.1", port + 10_000))
                with socket.socket() as again:
                    again.bind(("127.0.0.1", port))
                    return port
