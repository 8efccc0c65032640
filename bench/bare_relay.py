"""The smallest honest proxy on our own parts: server, upstream client, and a key check, a bucket and a list in memory.

`python -m bench.bare_relay --port N --upstream-port M`. What the gateway costs on top is the price of doing these three
so that they hold: keys from PostgreSQL that can be revoked, quotas in Redis over all processes, usage that is settled,
logged and counted; and every header, bound and error in OpenAI's form. The relay passes status, content type and bytes,
and closes the upstream when the caller goes.
"""

import argparse
import asyncio
import hashlib
import time
from collections import deque

import uvloop

from core.http1.client import Http1Client
from core.http1.connections import ConnectionLimits
from core.http1.errors import UpstreamError
from core.http1.messages import Deadlines, Origin, UpstreamRequest
from core.http1.response import Http1Response
from core.settings import load
from gateway.http1.listener import Listener
from gateway.http1.request import HttpRequest, header_lines
from inference.usage import reported_in
from metering.normalise import OpenAIUsage

_DEADLINES = Deadlines(connect_seconds=5.0, first_byte_seconds=60.0, idle_seconds=60.0, total_seconds=300.0)
_REQUEST_HEADERS = [(b"content-type", b"application/json"), (b"authorization", b"Bearer sk-mock")]
_BUCKET_SIZE = 1e9
_BODY_BYTES_MAX = 64 * 1024 * 1024


class BareRelay:
    """Sends every request to one upstream."""

    def __init__(self, upstream_port: int) -> None:
        self._client = Http1Client(limits=ConnectionLimits(connections_per_origin_max=8192))
        self._buckets: dict[bytes, list[float]] = {}
        self._usage: deque[tuple[bytes, OpenAIUsage | None]] = deque(maxlen=10_000)
        self._origin = Origin("http", "127.0.0.1", upstream_port)

    async def serve(self, request: HttpRequest) -> None:
        body = request.read_body_nowait(_BODY_BYTES_MAX)
        if body is None:
            body = await request.read_body(_BODY_BYTES_MAX)
        digest = hashlib.blake2b(request.found.get(b"authorization", b""), digest_size=32).digest()
        bucket = self._buckets.setdefault(digest, [_BUCKET_SIZE, time.monotonic()])
        if not _take(bucket):
            request.respond(429, b"", b"")
            return
        upstream = UpstreamRequest(self._origin, request.method, request.path, _REQUEST_HEADERS, body)
        try:
            response = await self._client.send(upstream, _DEADLINES)
        except UpstreamError as error:
            request.respond(502, b"", str(error).encode())
            return
        try:
            request.on_hang_up = response.abort
            self._usage.append((digest, await _pass_on(response, request)))
        finally:
            request.on_hang_up = None
            response.abort()
            request.abort()


def _take(bucket: list[float]) -> bool:
    """Take one request out of a bucket that fills up within a minute."""
    now = time.monotonic()
    bucket[0] = min(_BUCKET_SIZE, bucket[0] + (now - bucket[1]) * _BUCKET_SIZE / 60) - 1
    bucket[1] = now
    return bucket[0] >= 0


async def _pass_on(response: Http1Response, request: HttpRequest) -> OpenAIUsage | None:
    """Forward what has arrived as one write, as often as something has; a whole answer is one write too."""
    lines = header_lines([header for header in response.headers if header[0] == b"content-type"])
    if any(name == b"content-length" for name, _ in response.headers):
        body = await response.read_all(_BODY_BYTES_MAX)
        request.respond(response.status, lines, body)
        return reported_in(body).usage
    request.begin(response.status, lines, await response.read())
    while piece := await response.read():
        request.write(piece)
        if request.is_blocked:
            await request.drained()
    request.end()
    return None


async def _serve(port: int, upstream_port: int) -> None:
    settings = load({"AAP_PORT": str(port)}).edge
    await Listener(BareRelay(upstream_port).serve, settings).start()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-port", type=int, required=True)
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.port, arguments.upstream_port))


if __name__ == "__main__":
    main()
