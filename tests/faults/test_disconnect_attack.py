"""Reading every delta and hanging up before the chunk that says what it cost: it is billed all the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from core.database import Database
from core.writer import Writer
from tests.faults.conftest import PATH
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway
from tests.harness.provider import Exchange, FakeProvider, Script, chunk
from tests.harness.raw import RawConnection, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

_CHUNKS = 120
# As our own estimate has it: what is measured here is the output.
_PROMPT = 40


def _coy(words_a_chunk: int, told: asyncio.Event) -> Script:
    """A provider that has said everything and not yet what it took."""

    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        for number in range(_CHUNKS):
            await exchange.send_events(chunk("".join(f" w{number:02d}" for _ in range(words_a_chunk))), end=False)
        await told.wait()
        usage = (_PROMPT, _CHUNKS * words_a_chunk)
        await exchange.send_events(chunk(finish="stop"), chunk(usage=usage))

    return play


async def _attack(gateway: Gateway, tenant: Tenant, model: str) -> None:
    """Read everything that was said, and reset the connection."""
    connection = await RawConnection.open(gateway.port)
    await connection.send(post(PATH, tenant.key, chat(model, stream=True)))
    await connection.head()
    read = b""
    while f"w{_CHUNKS - 1:02d}".encode() not in read:
        read += await connection.chunk()
    connection.reset()


@pytest.mark.parametrize("words_a_chunk", [1, 8])
@pytest.mark.parametrize(("policy", "share"), [("drain", 1.0), ("abort", 0.95)])
async def test_leaving_before_the_last_chunk_is_not_free(
    gateway: Gateway,
    provider: FakeProvider,
    database: Database,
    stores: TestStores,
    model: str,
    policy: Any,
    share: float,
    words_a_chunk: int,
) -> None:
    """Guarantee: `drain` bills what the provider reports, `abort` at least 95 % of what was read."""
    tenant = await new_tenant(database, stores.pepper, policy=policy)
    told = asyncio.Event()
    provider.scripts.append(_coy(words_a_chunk, told))
    await _attack(gateway, tenant, model)
    if policy == "abort":
        await eventually(provider.exchanges[-1].hung_up.is_set, 2)
    told.set()
    writer = Writer(stores.database_url, statement_seconds_max=5)
    statement = "SELECT * FROM ledger_entries WHERE organization_id = $1"
    [entry] = await eventually(lambda: writer.fetch(statement, tenant.organization_id))
    await writer.close()
    truth = _CHUNKS * words_a_chunk
    assert entry["quality"] == ("exact" if policy == "drain" else "estimated")
    if policy == "abort":  # under `drain` the end may come before the reset is noticed, and is billed all the same
        assert entry["outcome"] == "client_gone"
    assert truth * share <= entry["output_tokens"] <= truth * (2 - share) + 30
    if policy == "drain":
        assert (entry["input_tokens"], entry["output_tokens"]) == (_PROMPT, truth)
