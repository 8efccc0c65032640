"""Requests that are sent more than once: the same key and body, to one gateway or to several."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

from core.writer import Writer
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway
from tests.harness.provider import Exchange, answer, chat_answer, chunk
from tests.harness.raw import RawAnswer, RawConnection, call, post
from tests.harness.tenant import Tenant

CHAT = "/v1/chat/completions"
USED = (5, 7)
_COMMENT = b": keep-alive\n\n"


def keyed(tenant: Tenant, name: str, body: bytes, path: str = CHAT, content_type: str = "application/json") -> bytes:
    """A request with an Idempotency-Key."""
    return post(path, tenant.key, body, f"idempotency-key: {name}", content_type=content_type)


async def ask(gateway: Gateway, tenant: Tenant, name: str, body: bytes) -> RawAnswer:
    return await call(gateway.port, keyed(tenant, name, body))


async def connected(gateway: Gateway, tenant: Tenant, name: str, body: bytes, *, reads: bool = True) -> RawConnection:
    """A connection on which the request was sent and nothing is read yet; without *reads*, nothing ever arrives."""
    connection = await RawConnection.open(gateway.port)
    if not reads:
        connection.writer.transport.pause_reading()
    await connection.send(keyed(tenant, name, body))
    return connection


def without_comments(body: bytes) -> bytes:
    """The events alone: comments come when somebody waits."""
    return body.replace(_COMMENT, b"")


def is_replayed(got: RawAnswer) -> bool:
    return got.headers.get("idempotent-replayed") == "true"


async def in_flight(*gateways: Gateway) -> int:
    """How many calls run on these gateways together."""
    count = 0
    for gateway in gateways:
        got = await call(gateway.port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        found = re.search(rb"^aap_requests_in_flight (\S+)", got.body, re.MULTILINE)
        assert found is not None
        count += int(float(found[1]))
    return count


async def runs(count: int, *gateways: Gateway) -> None:
    """Return when exactly so many calls run."""

    async def is_so() -> bool:
        return await in_flight(*gateways) == count

    await eventually(is_so, 10)


class Gate:
    """An answer of the provider that stops, until the test opens the gate: before it or, of a stream, after its first event."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts or ("a", "b")
        self.said = "".join(texts) or "hi"
        self.begun = asyncio.Event()
        self.opened = asyncio.Event()

    async def whole(self, exchange: Exchange) -> None:
        self.begun.set()
        await self.opened.wait()
        await answer(chat_answer(self.said, usage=USED))(exchange)

    async def stream(self, exchange: Exchange) -> None:
        await exchange.send_head()
        await exchange.send_events(chunk(self.texts[0]), end=False)
        self.begun.set()
        await self.opened.wait()
        texts = [chunk(text) for text in self.texts[1:]]
        await exchange.send_events(*texts, chunk(finish="stop"), chunk(usage=USED))

    async def broken(self, exchange: Exchange) -> None:
        """A stream that is cut off behind the gate."""
        await exchange.send_head()
        await exchange.send_events(chunk(self.texts[0]), end=False)
        self.begun.set()
        await self.opened.wait()
        exchange.reset()

    async def cut(self, exchange: Exchange) -> None:
        """No answer at all."""
        self.begun.set()
        await self.opened.wait()
        exchange.reset()


class Books:
    """What PostgreSQL knows of a tenant's calls."""

    def __init__(self, url: str) -> None:
        self.writer = Writer(url, statement_seconds_max=10)

    async def rows(self, statement: str, *arguments: object) -> list[dict[str, Any]]:
        return [dict(row) for row in await self.writer.fetch(statement, *arguments)]

    async def entries(self, tenant: Tenant) -> list[dict[str, Any]]:
        statement = "SELECT * FROM ledger_entries WHERE organization_id = $1 ORDER BY request_id, kind DESC"
        return await self.rows(statement, tenant.organization_id)

    async def entry(self, tenant: Tenant) -> dict[str, Any]:
        """The organization's one entry, once no call of it is running."""

        async def settled() -> list[dict[str, Any]]:
            running = await self.rows("SELECT 1 FROM usage_intents WHERE organization_id = $1", tenant.organization_id)
            return [] if running else await self.entries(tenant)

        [entry] = await eventually(settled)
        return entry

    async def used(self, tenant: Tenant) -> tuple[int, int]:
        """Tokens in and out, over all entries."""
        entries = await self.entries(tenant)
        return sum(entry["input_tokens"] for entry in entries), sum(entry["output_tokens"] for entry in entries)

    async def states(self, tenant: Tenant) -> list[str]:
        """What has become of the claims of a tenant."""
        statement = "SELECT state FROM idempotent_answers WHERE key_id = $1 ORDER BY idempotency_key"
        return [row["state"] for row in await self.rows(statement, tenant.key_id)]

    async def age(self, tenant: Tenant) -> None:
        """Let an hour pass for the claims of a tenant, and for the intents and gateways of its calls."""
        hour = "interval '1 hour'"
        await self.rows(
            f"UPDATE gateway_leases SET seen_at = seen_at - {hour} WHERE gateway_id IN"
            " (SELECT gateway_id FROM usage_intents WHERE organization_id = $1)",
            tenant.organization_id,
        )
        await self.rows(
            f"UPDATE usage_intents SET checkpoint_at = checkpoint_at - {hour} WHERE organization_id = $1",
            tenant.organization_id,
        )
        await self.rows(
            f"UPDATE idempotent_answers SET claimed_at = claimed_at - {hour} WHERE key_id = $1", tenant.key_id
        )

    async def close(self) -> None:
        await self.writer.close()


def kept_as(name: str) -> str:
    """How an Idempotency-Key stands in the database."""
    return hashlib.sha256(name.encode()).hexdigest()
