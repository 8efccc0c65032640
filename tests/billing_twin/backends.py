"""What the conformance tests run against: the twin, and Stripe's own sandbox if STRIPE_SANDBOX_KEY is set."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import stripe
from stripe import StripeClient

from tests.harness.stripe_twin import Place, twin_place

SANDBOX_KEY = os.environ.get("STRIPE_SANDBOX_KEY")
_WAIT_SECONDS = 120


@dataclass
class Backend:
    """Something that answers as Stripe does. *place* is there when it is the twin."""

    client: StripeClient
    place: Place | None = None

    @property
    def v1(self) -> Any:
        return self.client.v1

    @property
    def now(self) -> int:
        return self.place.now if self.place else int(time.time())

    def unique(self, name: str) -> str:
        """A name that no other run has used: a sandbox keeps what it was told."""
        return name if self.place else f"{name}_{secrets.token_hex(6)}"

    async def eventually(self, holds: Callable[[], Awaitable[bool]]) -> None:
        """Wait until Stripe's asynchronous work is done; the twin does it when told to."""
        if self.place:
            self.place.twin.settle()
            self.place.twin.tick()
            assert await holds()
            return
        async with asyncio.timeout(_WAIT_SECONDS):
            while not await holds():  # noqa: ASYNC110 - another company's work is waited for
                await asyncio.sleep(2)


@asynccontextmanager
async def backend_named(name: str) -> AsyncGenerator[Backend]:
    """`twin`, or `stripe`."""
    if name == "twin":
        async with twin_place() as place:
            yield Backend(place.client, place)
        return
    assert SANDBOX_KEY is not None
    assert "_live_" not in SANDBOX_KEY, "a sandbox's key is wanted"
    client = StripeClient(SANDBOX_KEY, http_client=stripe.HTTPXClient(timeout=30), max_network_retries=0)
    yield Backend(client)
    await client._requestor._client.close_async()
