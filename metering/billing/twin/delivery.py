"""Carrying webhooks: one HTTP/1.1 request to the endpoint, signed at the moment when it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from urllib.parse import SplitResult, urlsplit

import h11

from metering.billing.twin.outbox import Delivery
from metering.billing.twin.signing import signature_header

_CHUNK_BYTES = 65_536


async def deliver(delivery: Delivery, now: int, timeout_seconds: float) -> int | None:
    """Send *delivery*, signed at *now* (Unix seconds). Returns the status, or None if none came in time."""
    try:
        async with asyncio.timeout(timeout_seconds):
            return await _post(delivery, now)
    except (OSError, TimeoutError, h11.ProtocolError, ValueError):
        return None


async def _post(delivery: Delivery, now: int) -> int | None:
    url = urlsplit(delivery.url)
    tls = ssl.create_default_context() if url.scheme == "https" else None
    port = url.port or (443 if tls else 80)
    reader, writer = await asyncio.open_connection(url.hostname, port, ssl=tls)
    try:
        connection = h11.Connection(h11.CLIENT)
        writer.write(_written(connection, url, delivery, now))
        await writer.drain()
        return await _status(connection, reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _written(connection: h11.Connection, url: SplitResult, delivery: Delivery, now: int) -> bytes:
    headers = [
        ("host", url.netloc.rpartition("@")[2]),
        ("content-type", "application/json; charset=utf-8"),
        ("user-agent", "Stripe/1.0 (+https://stripe.com/docs/webhooks)"),
        ("stripe-signature", signature_header(delivery.secret, delivery.body, now)),
        ("content-length", str(len(delivery.body))),
        ("connection", "close"),
    ]
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    parts = [
        connection.send(h11.Request(method="POST", target=target, headers=headers)),
        connection.send(h11.Data(data=delivery.body)),
        connection.send(h11.EndOfMessage()),
    ]
    return b"".join(part for part in parts if part)


async def _status(connection: h11.Connection, reader: asyncio.StreamReader) -> int | None:
    """The answer's status; its body is read to the end, as Stripe does."""
    status: int | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_CHUNK_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return status
