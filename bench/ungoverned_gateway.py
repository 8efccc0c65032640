"""The gateway with its quota and its ledger taken out, for the bench alone: what is left tells what the two cost.

`python -m bench.ungoverned_gateway`, in the environment of an API process. Keys, parsing, routing, headers, logs and
metrics stay as they are. Of the quota only the numbers of the headers stay; nothing is priced, reserved or entered.
"""

import asyncio
import os

import uvloop

from core.log_writer import LogWriter
from core.settings import load
from core.telemetry import configure_logs
from gateway.server import serve
from inference.catalog import Deployment
from inference.exchange import Exchange
from inference.metered import CallMeter
from inference.wire import ParsedRequest
from keys.limits import QuotaPlan
from keys.quota import NOTHING, Quota, Reservation, Spend
from keys.secrets import redact

_SHOWN = [50_000_000_000, 49_999_999_999, 0, 50_000_000_000, 49_999_999_000, 0]


async def _admit(
    _: Quota, request_id: str, plan: QuotaPlan, prompt_tokens: int, output_tokens: int, __: Spend = NOTHING
) -> Reservation:
    return Reservation(request_id, plan, prompt_tokens + output_tokens, shown=_SHOWN)


async def _serve(log: LogWriter) -> None:
    permitted = asyncio.get_running_loop().create_future()
    permitted.set_result(None)

    def permit(_: CallMeter, __: Exchange, ___: Deployment, ____: ParsedRequest) -> asyncio.Future[None]:
        return permitted

    Quota.reserve = _admit
    Quota.settle = lambda *_: None
    CallMeter.begin = permit
    CallMeter.charged = lambda *_: ""
    await serve(load(os.environ), log)


def main() -> None:
    log = LogWriter(2)
    configure_logs(load(os.environ).log, redact, log)
    try:
        uvloop.run(_serve(log))
    finally:
        log.close()


if __name__ == "__main__":
    main()
