"""A forged signature, over a socket."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

from tests.billing.test_webhooks import gateway  # noqa: F401 - a fixture


async def test_a_forged_signature_of_odd_letters_is_refused_as_any_other(gateway) -> None:  # noqa: F811
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = (
        f"POST /v1/stripe/webhook HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nconnection: close\r\n"
        f"stripe-signature: t={int(time.time())},v1=\xe9\r\n\r\n"
    )
    writer.write(head.encode("latin-1") + b"{}")
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400"), answer[:300]
