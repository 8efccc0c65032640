from __future__ import annotations
import asyncio
from core.ids import new_id
from tests.harness.gateway import Gateway
from tests.harness.provider import FakeProvider, stream
from tests.harness.raw import call, chat, post
from tests.harness.tenant import Tenant

PATH = "/v1/chat/completions"


async def test_smoke(gateway: Gateway, provider: FakeProvider, tenant: Tenant) -> None:
    name = new_id("req")
    got = await asyncio.gather(
        *[call(gateway.port, post(PATH, tenant.key, chat(), f"idempotency-key: {name}")) for _ in range(50)]
    )
    print(got[0], got[1], len(provider.received))
    again = await call(gateway.port, post(PATH, tenant.key, chat(), f"idempotency-key: {name}"))
    print(again)
    provider.scripts.append(stream("a", "b"))
    name = new_id("req")
    got = await asyncio.gather(
        *[call(gateway.port, post(PATH, tenant.key, chat(stream=True), f"idempotency-key: {name}")) for _ in range(50)]
    )
    print(got[0], got[1], len(provider.received), len({one.body for one in got}))
    again = await call(gateway.port, post(PATH, tenant.key, chat(stream=True), f"idempotency-key: {name}"))
    print(again)
    print(gateway.log[-3000:])
