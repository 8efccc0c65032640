"""The twin as a program: what its first screen says, and one line for each request."""

from __future__ import annotations

import asyncio
import sys
from typing import TextIO

import msgspec

from core.clock import SystemClock
from metering.billing.twin.app import Twin
from metering.billing.twin.options import TwinOptions
from metering.billing.twin.resources import events
from metering.billing.twin.server import serving

SNAPSHOTS = ["*"]
THIN_EVENTS = ["v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found"]


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the program is to run. *webhook* is the URL that gets all events, snapshots and thin ones."""

    host: str = "127.0.0.1"
    port: int = 12_111
    webhook: str | None = None
    twin: TwinOptions = TwinOptions()


def run(options: RunOptions, out: TextIO = sys.stdout) -> None:
    """Serve a twin until the process is interrupted."""
    try:
        asyncio.run(_run(options, out))
    except KeyboardInterrupt:
        out.write("\nThe twin is gone, and what it knew with it.\n")


async def _run(options: RunOptions, out: TextIO) -> None:
    twin = Twin(SystemClock(), options.twin)

    def tell(line: str) -> None:
        out.write(f"{line}\n")
        out.flush()

    async with serving(twin, options.host, options.port, tell) as server:
        tell(first_screen(twin, server.url, options.webhook))
        await asyncio.Event().wait()


def first_screen(twin: Twin, url: str, webhook: str | None) -> str:
    """Register *webhook*, if any, and say how the twin is used."""
    secret = twin.options.webhook_secret or twin.state.make_id("whsec")
    lines = [
        "Stripe twin: a stand-in for Stripe in memory. Stripe is never contacted, no card is ever charged.",
        "",
        f"  base URL        {url}   (api and meter_events)",
        f"  API key         {twin.options.api_key}",
    ]
    if webhook is not None:
        for made in (
            events.add_endpoint(twin.state, webhook, SNAPSHOTS),
            events.add_destination(twin.state, webhook, THIN_EVENTS),
        ):
            made["_secret"] = secret
        lines += [f"  webhooks to     {webhook}", f"  webhook secret  {secret}"]
    lines += ["", f"  faults, journal, clock: {url}/_twin/journal and others.", ""]
    return "\n".join(lines)
