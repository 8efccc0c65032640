"""The twin as a program: its command line, its first screen, its lines."""

from __future__ import annotations

import asyncio
import re
import signal
import sys

from core.clock import SystemClock
from metering.billing.twin.__main__ import parse
from metering.billing.twin.app import Twin
from metering.billing.twin.options import TwinOptions
from metering.billing.twin.run import first_screen, register
from tests.harness.stripe_twin import client_of
from tests.harness.webhook_receiver import receiver


def test_the_command_line_sets_the_options() -> None:
    given = parse(
        [
            "--port",
            "1",
            "--webhook",
            "http://x/",
            "--webhook-secret",
            "whsec_a",
            "--requests-per-second",
            "25",
            "--seed",
            "4",
        ]
    )
    assert (given.port, given.webhook, given.twin.webhook_secret) == (1, "http://x/", "whsec_a")
    assert (given.twin.requests_per_second, given.twin.seed) == (25, 4)


def test_two_runs_make_different_ids() -> None:
    """Guarantee: a database that outlives a twin meets no id again that named something else."""
    assert parse([]).twin.seed != parse([]).twin.seed


def test_the_first_screen_says_what_to_set() -> None:
    twin = Twin(SystemClock(), TwinOptions(webhook_secret="whsec_a"))
    text = first_screen(register(twin, "http://127.0.0.1:1", "http://127.0.0.1:2/hook"))
    for wanted in ("http://127.0.0.1:1", "sk_test_twin", "http://127.0.0.1:2/hook", "whsec_a", "never contacted"):
        assert wanted in text


async def test_it_serves_and_sends_webhooks() -> None:
    async with receiver() as inbox:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "metering.billing.twin", "--port", "0", "--webhook", inbox.url),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(30):
                url = await said(process.stdout, r"base URL\s+(\S+)")
                client = client_of(url)
                made = await client.v1.customers.create_async({})
                await said(process.stdout, r"POST /v1/customers 200")
                await said(process.stdout, r"webhook customer.created \S+ -> \S+ 200")
                await client._requestor._client.close_async()
            assert inbox.received[0].event["data"]["object"]["id"] == made.id
        finally:
            process.send_signal(signal.SIGINT)
            rest = await process.stdout.read()
            await process.wait()
    assert b"The twin is gone" in rest
    assert process.returncode == 0


async def said(stdout: asyncio.StreamReader, pattern: str) -> str:
    while True:
        line = (await stdout.readline()).decode()
        assert line
        if found := re.search(pattern, line):
            return found[found.lastindex or 0]
