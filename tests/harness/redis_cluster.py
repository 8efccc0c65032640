"""A Redis Cluster of a test's own, whose nodes can be killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from redis.asyncio import Redis

from core.embedded import redis_server_program
from tests.harness.eventually import eventually

_SLOTS = 16_384


class Node:
    """One server of the cluster, on TCP, with an append-only file that it starts again from."""

    def __init__(self, directory: Path, *options: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _cluster_port()

    async def start(self) -> Self:
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(redis_server_program()),
                    *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._directory)),
                    *self._options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        await eventually(self._answers, 20)
        return self

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._process = None

    def client(self) -> Redis:
        return cast("Any", Redis).from_url(f"redis://127.0.0.1:{self.port}")

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


class RedisCluster:
    """Three masters that share the slots."""

    def __init__(self, directory: Path, nodes: int = 3) -> None:
        self._directory = directory
        self.nodes = [
            Node(
                directory / f"n{at}",
                *("--cluster-enabled", "yes", "--cluster-node-timeout", "1000"),
                *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
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
            client = node.client()
            slots = range(_SLOTS * at // count, _SLOTS * (at + 1) // count)
            await cast("Any", client).execute_command("CLUSTER", "ADDSLOTS", *slots)
            await cast("Any", client).execute_command("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
            if node is not first:
                await cast("Any", client).execute_command("CLUSTER", "MEET", "127.0.0.1", first.port)
            await client.aclose()
        await self.wait_ok()
        return self

    async def wait_ok(self) -> None:
        """Return when every node knows every other one and all slots are served."""

        async def is_ok() -> bool:
            return all([await self._is_ok(node) for node in self.nodes])

        await eventually(is_ok, 30)

    async def _is_ok(self, node: Node) -> bool:
        client = node.client()
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
