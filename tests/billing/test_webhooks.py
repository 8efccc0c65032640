"""Events from Stripe, over a socket, to a gateway that runs as it does for users."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import msgspec
import pytest
import stripe
from sqlalchemy import text

from core.database import Database
from tests.harness.billing import empty
from tests.harness.gateway import Gateway, config_for
from tests.harness.stores import TestStores

_SECRETS = ("whsec_first_of_two_secrets", "whsec_second_of_two_secrets")
_PATH = "/v1/stripe/webhook"


@pytest.fixture(scope="module")
async def gateway(
    books_url: str, stores: TestStores, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Gateway]:
    made = Gateway(
        stores._replace(database_url=books_url),
        tmp_path_factory.mktemp("webhooks"),
        config_for("http://127.0.0.1:9"),
        STRIPE_WEBHOOK_SECRET=",".join(_SECRETS),
    )
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def inbox(books: Database) -> AsyncGenerator[Database]:
    await empty(books)
    yield books
    await empty(books)


@pytest.fixture
async def client(gateway: Gateway) -> AsyncGenerator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.url) as made:
        yield made


def _event(number: int = 1, kind: str = "customer.subscription.updated") -> bytes:
    event = {
        "id": f"evt_{number}",
        "object": "event",
        "type": kind,
        "created": 1_700_000_000,
        "data": {"object": {"id": f"sub_{number}", "object": "subscription", "status": "active"}},
    }
    return msgspec.json.encode(event)


def _thin(number: int = 1) -> bytes:
    event = {
        "id": f"evt_thin_{number}",
        "object": "v2.core.event",
        "type": "v1.billing.meter.error_report_triggered",
        "created": "2026-11-28T10:00:00.000Z",
        "related_object": {"id": "mtr_1", "type": "billing.meter", "url": "/v1/billing/meters/mtr_1"},
    }
    return msgspec.json.encode(event)


def _signed(body: bytes, secret: str = _SECRETS[0], age_seconds: int = 0) -> dict[str, str]:
    header = stripe.WebhookSignature.generate_signature_header(
        body.decode(), secret, timestamp=int(time.time()) - age_seconds
    )
    return {"stripe-signature": header, "content-type": "application/json"}


async def _stored(database: Database) -> list[tuple[str, str, str]]:
    async with database.transaction() as session:
        rows = await session.execute(text("SELECT id, type, object_id FROM stripe_events ORDER BY id"))
        return [tuple(row) for row in rows]


class TestSigned:
    @pytest.mark.parametrize("secret", _SECRETS)
    async def test_by_either_secret_is_stored(self, client: httpx.AsyncClient, inbox: Database, secret: str) -> None:
        answer = await client.post(_PATH, content=_event(), headers=_signed(_event(), secret))
        assert (answer.status_code, answer.json()) == (200, {"received": True})
        assert await _stored(inbox) == [("evt_1", "customer.subscription.updated", "sub_1")]

    async def test_a_thin_event_is_stored(self, client: httpx.AsyncClient, inbox: Database) -> None:
        assert (await client.post(_PATH, content=_thin(), headers=_signed(_thin()))).status_code == 200
        assert await _stored(inbox) == [("evt_thin_1", "v1.billing.meter.error_report_triggered", "mtr_1")]

    async def test_what_comes_twice_is_stored_once(self, client: httpx.AsyncClient, inbox: Database) -> None:
        for _ in range(3):
            assert (await client.post(_PATH, content=_event(), headers=_signed(_event()))).status_code == 200
        assert len(await _stored(inbox)) == 1

    async def test_a_kind_that_nothing_follows_from_is_taken_and_not_kept(
        self, client: httpx.AsyncClient, inbox: Database
    ) -> None:
        body = _event(kind="charge.refund.updated")
        assert (await client.post(_PATH, content=body, headers=_signed(body))).status_code == 200
        assert await _stored(inbox) == []

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"null",
            b"[]",
            b"{}",
            b'{"id": "evt_1"}',
            b"\xff\xfe",
            b'{"id": 1, "type": 2, "created": 3, "data": {"object": {"id": 4}}}',
            b'{"id": "e", "type": "invoice.paid", "created": 9e99, "data": {"object": {"id": "in_1"}}}',
            b'{"id": "e", "type": "invoice.paid", "created": 1, "data": []}',
        ],
    )
    async def test_nonsense_is_refused(self, client: httpx.AsyncClient, inbox: Database, body: bytes) -> None:
        header = _signed(body)["stripe-signature"] if body != b"\xff\xfe" else _signed(b"x")["stripe-signature"]
        answer = await client.post(_PATH, content=body, headers={"stripe-signature": header})
        assert answer.status_code == 400
        assert await _stored(inbox) == []


class TestNotSigned:
    """Guarantee: an event that Stripe did not sign, or signed long ago, changes nothing and is stored nowhere."""

    @pytest.mark.parametrize(
        ("headers", "why"),
        [
            ({}, "no signature"),
            ({"stripe-signature": ""}, "an empty signature"),
            ({"stripe-signature": "t=1,v1=00"}, "a made-up signature"),
            ({"stripe-signature": f"t={2**70},v1=zz"}, "no numbers"),
            (_signed(_event(), "whsec_of_somebody_else"), "another secret"),
            ({"stripe-signature": f"t={int(time.time())},v0=abc"}, "another scheme"),
            (_signed(_event(2)), "another body's"),
            (_signed(_event(), age_seconds=400), "stale"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_is_refused(
        self, client: httpx.AsyncClient, inbox: Database, headers: dict[str, str], why: str
    ) -> None:
        answer = await client.post(_PATH, content=_event(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "signature_invalid"), why
        assert await _stored(inbox) == []

    async def test_signed_with_an_empty_secret_is_refused(self, client: httpx.AsyncClient, inbox: Database) -> None:
        body = _event()
        header = stripe.WebhookSignature.generate_signature_header(body.decode(), "", timestamp=int(time.time()))
        assert (await client.post(_PATH, content=body, headers={"stripe-signature": header})).status_code == 400
        assert await _stored(inbox) == []

    async def test_the_bytes_count_and_not_what_they_mean(self, client: httpx.AsyncClient, inbox: Database) -> None:
        headers = _signed(_event())
        respelled = msgspec.json.format(_event())
        assert (await client.post(_PATH, content=respelled, headers=headers)).status_code == 400
        assert await _stored(inbox) == []

    async def test_a_body_that_is_too_large_is_refused(self, client: httpx.AsyncClient, inbox: Database) -> None:
        body = b" " * (513 * 1024)
        assert (await client.post(_PATH, content=body, headers=_signed(body))).status_code == 413
        assert await _stored(inbox) == []


class TestWithoutASecret:
    async def test_there_is_no_such_route(self, books_url: str, stores: TestStores, workdir: Path) -> None:
        made = Gateway(stores._replace(database_url=books_url), workdir, config_for("http://127.0.0.1:9"))
        await made.start()
        try:
            async with httpx.AsyncClient(base_url=made.url) as client:
                header = stripe.WebhookSignature.generate_signature_header(
                    _event().decode(), "", timestamp=int(time.time())
                )
                answer = await client.post(_PATH, content=_event(), headers={"stripe-signature": header})
        finally:
            await made.stop()
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
