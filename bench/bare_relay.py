"""The smallest honest proxy on our own parts: Granian (ASGI), the gateway's upstream client, and nothing else.

`python -m bench.bare_relay --port N --upstream-port M`. No key, no quota, no ledger, no log: what the gateway costs on
top of this is the price of governing a call. It passes status, content type and bytes, and closes the upstream when the
caller goes. The worker is a process of its own, so the upstream's port travels in the environment.
"""

import argparse
import os

from granian import Granian
from granian.constants import HTTPModes, Interfaces, Loops

from inference.upstreams.http1 import (
    ConnectionLimits,
    Deadlines,
    Http1Client,
    Http1Response,
    Origin,
    UpstreamError,
    UpstreamRequest,
)

PORT_VARIABLE = "BENCH_UPSTREAM_PORT"
_DEADLINES = Deadlines(connect_seconds=5.0, first_byte_seconds=60.0, idle_seconds=60.0, total_seconds=300.0)
_REQUEST_HEADERS = [(b"content-type", b"application/json"), (b"authorization", b"Bearer sk-mock")]


class BareRelay:
    """An ASGI application that sends every request to one upstream."""

    def __init__(self, upstream_port: int) -> None:
        self._client = Http1Client(limits=ConnectionLimits(connections_per_origin_max=8192))
        self._origin = Origin("http", "127.0.0.1", upstream_port)

    async def __call__(self, scope: dict, receive, send) -> None:
        if scope["type"] != "http":
            return
        body = await _body_of(receive)
        method, target = scope["method"].encode(), scope["path"].encode()
        request = UpstreamRequest(self._origin, method, target, _REQUEST_HEADERS, body)
        try:
            response = await self._client.send(request, _DEADLINES)
        except UpstreamError as error:
            await send({"type": "http.response.start", "status": 502, "headers": []})
            await send({"type": "http.response.body", "body": str(error).encode()})
            return
        try:
            await _pass_on(response, send)
        finally:
            response.release()


async def _body_of(receive) -> bytes:
    message = await receive()
    body = message.get("body", b"")
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    return body


async def _pass_on(response: Http1Response, send) -> None:
    """Forward what has arrived as one write, as often as something has; a whole answer is one write too."""
    headers = [(name, value) for name, value in response.headers if name in {b"content-type", b"content-length"}]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    if any(name == b"content-length" for name, _ in headers):
        await send({"type": "http.response.body", "body": await response.read_all(64 * 1024 * 1024)})
        return
    while piece := await response.read():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def build() -> BareRelay:
    """Make the application in the worker process."""
    return BareRelay(int(os.environ[PORT_VARIABLE]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-port", type=int, required=True)
    arguments = parser.parse_args()
    os.environ[PORT_VARIABLE] = str(arguments.upstream_port)
    Granian(
        "bench.bare_relay:build",
        factory=True,
        address="127.0.0.1",
        port=arguments.port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        loop=Loops.uvloop,
        workers=1,
        backlog=4096,
        log_enabled=False,
        websockets=False,
    ).serve()


if __name__ == "__main__":
    main()
