"""A gateway whose log nobody reads: standard error is a full pipe."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from tests.harness.gateway import ROOT, Gateway


class PipedGateway(Gateway):
    """Its processes write their logs into a pipe; `read_log` empties it, and nothing else does."""

    def __init__(self, *arguments, **environ: str) -> None:
        super().__init__(*arguments, **environ)
        self._reading, self._writing = os.pipe()

    async def add_process(self) -> subprocess.Popen[bytes]:
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.server"],
            cwd=ROOT,
            env={**self._environ, "AAP_READY_FD": str(writing)},
            pass_fds=(writing,),
            stdout=subprocess.DEVNULL,
            stderr=self._writing,
        )
        os.close(writing)
        self.processes.append(process)
        ready = await asyncio.wait_for(asyncio.to_thread(os.read, reading, 1), 30)
        os.close(reading)
        assert ready == b"1"
        return process

    def read_log(self) -> bytes:
        """Take out what is in the pipe now."""
        os.set_blocking(self._reading, False)
        pieces: list[bytes] = []
        try:
            while piece := os.read(self._reading, 65_536):
                pieces.append(piece)
        except BlockingIOError:
            pass
        return b"".join(pieces)

    async def stop(self) -> None:
        for process in self.processes:
            process.kill()
        await self.wait(10)
        for descriptor in (self._reading, self._writing):
            os.close(descriptor)
