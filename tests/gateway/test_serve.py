"""`aap serve` as a newcomer runs it: no variable set, nothing running, an empty directory."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from tests.harness.eventually import eventually
from tests.harness.gateway import ROOT, free_port
from tests.harness.raw import call, chat, post

_PRIVATE = ("AAP_", "DATABASE_URL", "REDIS_URL", "OPENAI_")


class Serving(NamedTuple):
    process: asyncio.subprocess.Process
    port: int
    banner: str

    @property
    def key(self) -> str | None:
        found = re.search(r"sk-aap-\w+", self.banner)
        return found[0] if found else None

    async def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        _, code = await asyncio.wait_for(asyncio.gather(self.process.stderr.read(), self.process.wait()), 30)
        return code


def environ(directory: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE)}
    return {**kept, "AAP_DATA_DIR": str(directory / "data"), "AAP_CONFIG": str(directory / "aap.toml"), **more}


async def command(directory: Path, *words: str, **more: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        *words,
        cwd=ROOT,
        env=environ(directory, **more),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def serve(directory: Path, **more: str) -> Serving:
    port = free_port()
    process = await command(directory, "serve", "--port", str(port), "--workers", "2", **more)
    assert process.stdout is not None
    try:
        banner = await asyncio.wait_for(process.stdout.readuntil(b"Ctrl-C"), 60)
    except (asyncio.IncompleteReadError, TimeoutError):
        process.kill()
        raise AssertionError((await process.stderr.read()).decode()) from None
    return Serving(process, port, banner.decode())


async def children(pid: int) -> list[tuple[int, str]]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [(child, Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")) for child in found]


async def test_from_nothing_to_an_answer_and_again(workdir: Path) -> None:
    """Guarantee: the printed key works, the first call is priced, data survives a restart, nothing is left running."""
    first = await serve(workdir)
    assert first.key is not None
    assert (await call(first.port, post("/v1/chat/completions", first.key, chat("demo")))).status == 200
    listed = await command(workdir, "keys", "list", "--json")
    out, _ = await listed.communicate()
    assert [key["name"] for key in msgspec.json.decode(out)] == ["first key"]
    assert await first.stop() == 0
    verified = await command(workdir, "ledger", "verify", "--json")
    out, _ = await verified.communicate()
    assert (msgspec.json.decode(out)["rated"], verified.returncode) == (1, 0)
    used = await command(workdir, "usage", "--json")
    out, _ = await used.communicate()
    [row] = msgspec.json.decode(out)
    assert (row["requests"], row["unpriced_requests"], row["charge_usd"] > "0") == (1, 0, True)

    second = await serve(workdir)
    assert second.key is None
    assert (await call(second.port, post("/v1/chat/completions", first.key, chat("demo")))).status == 200
    assert await second.stop(signal.SIGTERM) == 0
    with pytest.raises(ConnectionRefusedError):
        await call(second.port, b"")
    assert not (workdir / "data" / "postgres" / "postmaster.pid").exists()
    assert not (workdir / "data" / "redis" / "redis.pid").exists()


async def test_a_process_that_dies_is_started_again(workdir: Path) -> None:
    serving = await serve(workdir)
    api = [pid for pid, line in await children(serving.process.pid) if "gateway.server" in line]
    assert len(api) == 2
    for pid in api:
        os.kill(pid, signal.SIGKILL)
    for _ in range(400):
        try:
            answered = await call(serving.port, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            break
        except (ConnectionError, asyncio.IncompleteReadError):
            await asyncio.wait([asyncio.ensure_future(asyncio.Event().wait())], timeout=0.05)
    assert answered.status == 200
    assert await serving.stop() == 0


async def test_nothing_outlives_a_supervisor_that_is_killed(workdir: Path) -> None:
    """Guarantee: `kill -9` of `aap serve` ends its processes too; the next start finds port and data free."""
    serving = await serve(workdir)

    async def started() -> list[int]:
        ours = [pid for pid, line in await children(serving.process.pid) if "-m gateway." in line]
        return ours if len(ours) == 4 else []

    ours = await eventually(started)
    serving.process.kill()
    await serving.process.wait()
    await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ours), 15)
    again = await serve(workdir)
    assert (await call(again.port, post("/v1/chat/completions", serving.key, chat("demo")))).status == 200
    assert await again.stop() == 0


@pytest.mark.parametrize("value", ["socks5://proxy.test:1080", "http://[bad"])
async def test_a_proxy_that_cannot_be_used_is_said_so_before_anything_starts(workdir: Path, value: str) -> None:
    process = await command(workdir, "serve", "--port", str(free_port()), ALL_PROXY=value)
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"ALL_PROXY" in errors
    assert value.encode() not in errors
    assert b"Traceback" not in errors
    assert not (workdir / "data").exists()


async def test_where_output_is_a_log_no_first_key_is_made(workdir: Path) -> None:
    serving = await serve(workdir, AAP_FIRST_RUN="false")
    assert serving.key is None
    listed = await command(workdir, "orgs", "list", "--json")
    out, _ = await listed.communicate()
    assert msgspec.json.decode(out) == []
    assert await serving.stop() == 0


async def test_openais_models_are_in_the_catalog_with_its_key(workdir: Path) -> None:
    listed = await command(workdir, "models", "--json", OPENAI_API_KEY="sk-test")
    out, _ = await listed.communicate()
    models = {row["model"] for row in msgspec.json.decode(out)}
    assert {"gpt-4.1-mini", "text-embedding-3-small", "whisper-1"} <= models
    assert "demo" not in models


async def test_a_taken_port_is_said_so(workdir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = await command(workdir, "serve", "--port", str(taken.getsockname()[1]))
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"in use" in errors
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AAP_PORT": "x", "AAP_WORKERS": "0"}, [b"AAP_PORT", b"AAP_WORKERS"]),
        ({"DATABASE_URL": "postgresql://x"}, [b"REDIS_URL", b"AAP_KEY_PEPPERS"]),
    ],
)
async def test_every_wrong_variable_is_named_at_once(
    variables: dict[str, str], said: list[bytes], workdir: Path
) -> None:
    process = await command(workdir, "serve", **variables)
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert all(word in errors for word in said)
    assert b"Traceback" not in errors


async def test_a_faulty_file_is_told_whole(workdir: Path) -> None:
    (workdir / "aap.toml").write_text('[providers.a]\nkind = "openai"\nbase_ulr = "http://x"\n[modles.b]\n')
    process = await command(workdir, "serve", "--port", str(free_port()))
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"did you mean base_url?" in errors
    assert b"did you mean models?" in errors
