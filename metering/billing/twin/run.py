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
    """How the program is to run. *webhook* is the URL that gets all events, snapshots and thin ones.

    With *as_json* the first screen is one line of JSON for programs, and no line for each request follows.
    """

    host: str = "127.0.0.1"
    port: int = 12_111
    webhook: str | None = None
    twin: TwinOptions = TwinOptions()
    as_json: bool = False


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What whoever uses a twin has to set."""

    url: str
    api_key: str
    webhook: str | None
    webhook_secret: str | None


def run(options: RunOptions, out: TextIO = sys.stdout) -> None:
    """Serve a twin until the process is interrupted. Errors: SystemExit where something else listens there."""
    try:
        asyncio.run(_run(options, out))
    except KeyboardInterrupt:
        if not options.as_json:
            out.write("\nThe twin is gone, and what it knew with it.\n")
    except OSError as error:
        sys.exit(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}")


async def _run(options: RunOptions, out: TextIO) -> None:
    twin = Twin(SystemClock(), options.twin)

    def tell(line: str) -> None:
        out.write(f"{line}\n")
        out.flush()

    def keep_quiet(_: str) -> None:
        """Say nothing: what is read is one line of JSON."""

    async with serving(twin, options.host, options.port, keep_quiet if options.as_json else tell) as server:
        facts = register(twin, server.url, options.webhook)
        tell(msgspec.json.encode(facts).decode() if options.as_json else first_screen(facts))
        await asyncio.Event().wait()


def register(twin: Twin, url: str, webhook: str | None) -> Facts:
    """Have all events sent to *webhook*, if there is one; return what is to be set."""
    if webhook is None:
        return Facts(url=url, api_key=twin.options.api_key, webhook=None, webhook_secret=None)
    secret = twin.options.webhook_secret or twin.state.make_id("whsec")
    for made in (
        events.add_endpoint(twin.state, webhook, SNAPSHOTS),
        events.add_destination(twin.state, webhook, THIN_EVENTS),
    ):
        made["_secret"] = secret
    return Facts(url=url, api_key=twin.options.api_key, webhook=webhook, webhook_secret=secret)


def first_screen(facts: Facts) -> str:
    """Say how the twin is used."""
    lines = [
        "Stripe twin: a stand-in for Stripe in memory. Stripe is never contacted, no card is ever charged.",
        "",
        f"  base URL        {facts.url}   (api and meter_events)",
        f"  API key         {facts.api_key}",
    ]
    if facts.webhook is not None:
        lines += [f"  webhooks to     {facts.webhook}", f"  webhook secret  {facts.webhook_secret}"]
    lines += ["", f"  faults, journal, clock: {facts.url}/_twin/journal and others.", ""]
    return "\n".join(lines)
