"""An organization's administrator in front of a gateway of a test module's own, with a worker behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from standardwebhooks import Webhook, WebhookVerificationError

from core.database import Database
from core.ids import OrganizationId
from core.plain_sql import fetch
from keys.lifecycle import NewKey
from keys.scopes import ADMIN_SCOPES
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway
from tests.harness.stores import TestStores, new_database
from tests.harness.tenant import new_tenant
from tests.harness.webhook_place import EGRESS, SEALING_KEYS, SEED
from tests.harness.webhook_sink import Arrival
from webhooks.events import KeyCreated
from webhooks.publish import publish
from webhooks.signing import secret_text

SEALING = f"test:{SEALING_KEYS[0].key.hex()}"
ENVIRON = {"AAP_SEALING_KEYS": SEALING, "AAP_WEBHOOK_SIGNING_KEYS": secret_text(SEED.seed).replace("whsec_", "whsk_")}
ENDPOINTS = "/v1/webhook_endpoints"
DELIVERIES = "/v1/webhook_deliveries"


class Refusal(NamedTuple):
    """What an error answer says, in OpenAI's form."""

    status: int
    code: str | None
    param: str | None


class Place(NamedTuple):
    """A gateway, and the database that it works on."""

    stores: TestStores
    database: Database
    gateway: Gateway

    async def sql(self, statement: str, *arguments: object) -> list[Any]:
        async with self.database.transaction() as session:
            return await fetch(session, statement, *arguments)

    async def dump(self) -> dict[str, list[str]]:
        """Every row of every table of webhooks, as text."""
        names = await self.sql("SELECT tablename FROM pg_tables WHERE tablename LIKE 'webhook%' ORDER BY 1")
        statements = {
            row.tablename: f"SELECT to_json(t)::text AS row FROM {row.tablename} t ORDER BY 1" for row in names
        }
        return {name: [row.row for row in await self.sql(statement)] for name, statement in statements.items()}


class Office:
    """An administrator of an organization."""

    def __init__(self, place: Place, organization_id: OrganizationId, key: str) -> None:
        self.place, self.organization_id = place, organization_id
        headers = {"authorization": f"Bearer {key}"}
        self.client = httpx.AsyncClient(base_url=place.gateway.url, headers=headers, timeout=20)

    async def call(self, method: str, path: str, body: Any = None, **query: Any) -> httpx.Response:
        return await self.client.request(method, path, json=body, params=query)

    async def get(self, path: str, **query: Any) -> Any:
        answer = await self.call("GET", path, **query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, body: Any = None) -> Any:
        answer = await self.call("POST", path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refused(self, method: str, path: str, body: Any = None, **query: Any) -> Refusal:
        return refusal(await self.call(method, path, body, **query))

    async def endpoint(self, url: str, **more: Any) -> dict[str, Any]:
        """A new endpoint, with its secret."""
        return await self.post(ENDPOINTS, {"url": url, **more})

    async def deliveries(self, **query: Any) -> list[dict[str, Any]]:
        return (await self.get(DELIVERIES, **query))["data"]

    async def publish(self, *names: str) -> list[str]:
        """Tell of keys called *names*, each in a transaction of its own; return the events' ids."""
        ids: list[str] = []
        for name in names:
            told = KeyCreated(id="key_1", project_id="proj_1", name=name, hint="sk-aap-1...2", expires_at=None)
            async with self.place.database.transaction() as session:
                ids.append(await publish(session, told, organization_id=self.organization_id))
        return ids

    async def pass_by(self, *names: str) -> list[str]:
        """Tell of keys, and wait until every endpoint that wants to know is due it."""
        ids = await self.publish(*names)
        query = "SELECT id FROM webhook_events WHERE id = ANY ($1::text[]) AND NOT is_fanned_out"

        async def is_fanned_out() -> bool:
            return await self.place.sql(query, ids) == []

        await eventually(is_fanned_out)
        return ids

    async def settled(self, count: int, **query: Any) -> list[dict[str, Any]]:
        """Deliveries once there are *count*, none of them pending."""

        async def found() -> list[dict[str, Any]] | None:
            seen = await self.deliveries(**query)
            return seen if len(seen) == count and all(one["state"] != "pending" for one in seen) else None

        return await eventually(found)


def refusal(answer: httpx.Response) -> Refusal:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}, answer.text
    return Refusal(answer.status_code, error["code"], error["param"])


@asynccontextmanager
async def webhook_place(
    stores: TestStores, template: str, directory: Path, *, config: str = EGRESS, environ: dict[str, str] | None = None
) -> AsyncGenerator[Place]:
    """A gateway on a database of its own."""
    name = f"{template}_{directory.name}"
    async with new_database(stores.database_url, name, template) as url:
        mine = stores._replace(database_url=url)
        database = Database(url)
        gateway = Gateway(mine, directory, config, **(ENVIRON if environ is None else environ))
        try:
            await gateway.start()
            yield Place(mine, database, gateway)
        finally:
            await gateway.stop()
            await database.close()


@asynccontextmanager
async def office_at(place: Place, scopes: tuple[Any, ...] = ADMIN_SCOPES) -> AsyncGenerator[Office]:
    """A new organization's administrator."""
    tenant = await new_tenant(place.database, place.stores.pepper, NewKey(name="office", scopes=scopes))
    office = Office(place, tenant.organization_id, tenant.key)
    try:
        yield office
    finally:
        await office.client.aclose()


def v1_signatures(arrival: Arrival) -> list[str]:
    """The signatures by endpoints' own secrets."""
    return [one for one in arrival.headers["webhook-signature"].split(" ") if one.startswith("v1,")]


def is_signed_by(arrival: Arrival, secret: str) -> bool:
    """Whether a receiver that knows *secret* takes it."""
    try:
        Webhook(secret).verify(arrival.body, arrival.headers)
    except WebhookVerificationError:
        return False
    return True
