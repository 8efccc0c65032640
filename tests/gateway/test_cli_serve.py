"""`aap serve --json` and `aap worker`: for who starts them from a program."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from pathlib import Path

import msgspec
import pytest

from core.settings import load
from gateway.cli.serve import _print_welcome, _welcome
from gateway.first_run import FirstKey
from tests.gateway.test_serve import command, serve
from tests.harness.gateway import config_for, free_port
from tests.harness.provider import Exchange, FakeProvider, chunk
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores


async def test_one_line_of_json_says_where_and_with_what_to_call(workdir: Path) -> None:
    port = free_port()
    for is_first in (True, False):
        process = await command(workdir, "serve", "--json", "--port", str(port), "--workers", "1")
        assert process.stdout is not None
        told = msgspec.json.decode(await asyncio.wait_for(process.stdout.readline(), 60))
        key = told.pop("api_key")
        assert told == {"base_url": f"http://127.0.0.1:{port}/v1", "models": ["demo"]}
        if is_first:
            assert (await call(port, post("/v1/chat/completions", key, chat("demo")))).status == 200
        else:
            assert key is None
        process.send_signal(signal.SIGINT)
        rest, _ = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, rest) == (0, b"")


def test_a_first_key_of_a_start_that_failed_is_told_without_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    told = _welcome(load({}).edge, FirstKey("sk-aap-x"), None)
    assert msgspec.json.decode(msgspec.json.encode(told)) == {"base_url": None, "api_key": "sk-aap-x", "models": []}
    _print_welcome(told)
    assert re.search(r"sk-aap-x .*the start failed", capsys.readouterr().out)


async def test_a_start_that_fails_is_told_as_json(workdir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = await command(workdir, "serve", "--json", "--port", str(taken.getsockname()[1]))
        out, errors = await process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert "in use" in msgspec.json.decode(errors)["error"]["message"]


async def test_a_worker_without_stores_is_told_as_json(workdir: Path) -> None:
    process = await command(workdir, "worker", "--json")
    out, errors = await process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert "DATABASE_URL" in msgspec.json.decode(errors)["error"]["message"]


async def test_ctrl_c_with_an_open_stream_says_what_it_waits_for_and_a_second_one_ends_it(
    workdir: Path, provider: FakeProvider
) -> None:
    async def never_ends(exchange: Exchange) -> None:
        await exchange.send_head()
        await exchange.send_events(chunk("one"), end=False)
        await exchange.hung_up.wait()

    provider.scripts.append(never_ends)
    (workdir / "aap.toml").write_text(config_for(provider.base_url))
    serving = await serve(workdir, AAP_DRAIN_SECONDS="21")
    stderr = serving.process.stderr
    assert stderr is not None
    connection = await RawConnection.open(serving.port)
    await connection.send(post("/v1/chat/completions", serving.key, chat(stream=True)))
    assert (await connection.head())[0] == 200
    await connection.chunk()
    serving.process.send_signal(signal.SIGINT)
    said = b"Draining: open calls have 21 s at most. Ctrl-C again stops at once."
    while said not in (line := await asyncio.wait_for(stderr.readline(), 10)):
        assert line
    serving.process.send_signal(signal.SIGINT)
    rest, code = await asyncio.wait_for(asyncio.gather(stderr.read(), serving.process.wait()), 10)
    connection.close()
    assert code == 0
    assert said not in rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_that_is_told_to_stop_stops_in_order(
    workdir: Path, stores: TestStores, number: signal.Signals
) -> None:
    """Guarantee: the worker ends in order, nothing is left behind, and the command's exit code says so."""
    process = await command(workdir, "worker", **stores.environ())
    assert process.stderr is not None
    while b"worker.started" not in (line := await asyncio.wait_for(process.stderr.readline(), 30)):
        assert line
    os.kill(process.pid, number)
    _, log = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert b"worker.stopped" in log


async def test_with_a_sealing_key_a_worker_delivers_webhooks_too_and_is_started_again(
    workdir: Path, stores: TestStores
) -> None:
    process = await command(workdir, "worker", **stores.environ(), AAP_SEALING_KEYS=f"k1:{'ab' * 32}")
    stderr = process.stderr
    assert stderr is not None
    seen: list[bytes] = []

    async def until_said(word: bytes, count: int = 1) -> None:
        while sum(word in line for line in seen) < count:
            seen.append(await asyncio.wait_for(stderr.readline(), 30))
            assert seen[-1]

    await until_said(b"worker.started")
    await until_said(b"webhooks.started")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    (deliverer,) = [
        int(one) for one in children if b"gateway.webhook_worker" in Path(f"/proc/{one}/cmdline").read_bytes()
    ]
    os.kill(deliverer, signal.SIGKILL)
    await until_said(b"webhooks.started", 2)
    os.kill(process.pid, signal.SIGTERM)
    _, log = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert b"webhooks.stopped" in b"".join(seen) + log
