"""Billing's routes, over a socket, for an organization's administrator."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from core.database import Database
from keys.lifecycle import NewKey
from keys.scopes import ADMIN_SCOPES, OPERATOR_SCOPES
from metering.billing.plans import EXAMPLE
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import BillingPlace, billing_place
from tests.harness.gateway import Gateway, config_for
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant

_URLS = {"success_url": "https://a.example/paid", "cancel_url": "https://a.example/"}
_READ = ("plan", "subscription", "invoices", "wallet", "usage")
_WRITE = (
    ("checkout", {"plan": "pro", **_URLS}),
    ("portal", {"return_url": "https://a.example/"}),
    ("subscription", {"plan": "pro"}),
    ("subscription/cancel", {}),
    ("subscription/resume", {}),
    ("wallet/top_ups", {"amount_cents": 1_000, **_URLS}),
    ("wallet/automatic_top_up", {"below_cents": 100, "amount_cents": 1_000}),
)


class Office:
    """An organization's administrator in front of a gateway, and what stands behind it."""

    def __init__(self, place: BillingPlace, gateway: Gateway, organization_id: str, key: str) -> None:
        self.place, self.organization_id = place, organization_id
        self.client = httpx.AsyncClient(base_url=gateway.url, headers={"authorization": f"Bearer {key}"}, timeout=20)

    async def get(self, act: str, **query: Any) -> httpx.Response:
        return await self.client.get(f"/v1/billing/{act}", params=query)

    async def post(self, act: str, body: Any) -> httpx.Response:
        return await self.client.post(f"/v1/billing/{act}", json=body)


@pytest.fixture(scope="module")
async def behind(books: Database, stores: TestStores) -> AsyncGenerator[BillingPlace]:
    async with billing_place(books, stores.pepper) as made:
        yield made


@pytest.fixture(scope="module")
async def gateway(
    behind: BillingPlace, books_url: str, stores: TestStores, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Gateway]:
    config = config_for("http://127.0.0.1:9", more=EXAMPLE)
    own = stores._replace(database_url=books_url)
    made = Gateway(
        own,
        tmp_path_factory.mktemp("billing"),
        config,
        STRIPE_API_KEY=behind.settings.api_key or "",
        AAP_STRIPE_URL=behind.server.url,
    )
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def office(behind: BillingPlace, gateway: Gateway) -> AsyncGenerator[Office]:
    tenant = await new_tenant(behind.database, behind.pepper, NewKey(name="office", scopes=ADMIN_SCOPES))
    made = Office(behind, gateway, tenant.organization_id, tenant.key)
    yield made
    await made.client.aclose()


async def test_an_organization_buys_a_plan_reads_it_and_cancels(office: Office) -> None:
    assert (await office.get("subscription")).json()["error"]["code"] == "not_subscribed"
    page = (await office.post("checkout", {"plan": "pro", "email": "a@a.example", **_URLS})).json()
    assert page["url"].startswith(office.place.server.url)
    assert office.place.twin.complete_checkout(page["url"].rpartition("/")[2])
    await office.place.hear()
    plan = (await office.get("plan")).json()
    assert (plan["name"], plan["price_cents_per_month"], plan["status"]) == ("pro", 9_900, "active")
    assert plan["limits"]["chat_requests_per_month"] == 100_000
    assert [one["name"] for one in plan["available_plans"]] == ["pro", "enterprise"]
    subscription = (await office.get("subscription")).json()
    assert (subscription["plan"], subscription["status"], subscription["cancel_at"]) == ("pro", "active", None)
    cancelled = (await office.post("subscription/cancel", {})).json()
    assert cancelled["cancel_at"] == cancelled["current_period_end"]
    assert (await office.get("subscription")).json()["cancel_at"] == cancelled["cancel_at"]
    assert (await office.post("subscription/resume", {})).json()["cancel_at"] is None
    assert (await office.post("subscription", {"plan": "enterprise"})).json()["plan"] == "enterprise"
    assert (await office.get("plan")).json()["name"] == "enterprise"


async def test_invoices_come_in_pages_newest_first(office: Office) -> None:
    page = (await office.post("checkout", {"plan": "pro", **_URLS})).json()
    office.place.twin.complete_checkout(page["url"].rpartition("/")[2])
    for _ in range(3):
        await office.place.hear()
        office.place.pass_time(days=25)
    await office.place.hear()
    first = (await office.get("invoices", limit=2)).json()
    rest = (await office.get("invoices", limit=2, after=first["last_id"])).json()
    assert (len(first["data"]), first["has_more"], len(rest["data"]), rest["has_more"]) == (2, True, 1, False)
    created = [one["created"] for one in first["data"] + rest["data"]]
    assert created == sorted(created, reverse=True)
    assert {one["total_cents"] for one in first["data"]} == {9_900}


async def test_credit_is_bought_and_shown(office: Office) -> None:
    page = (await office.post("wallet/top_ups", {"amount_cents": 2_500, **_URLS})).json()
    office.place.twin.complete_checkout(page["url"].rpartition("/")[2])
    await office.place.hear()
    wallet = (await office.get("wallet")).json()
    assert (wallet["balance_usd"], wallet["available_usd"], wallet["is_prepaid"]) == ("25", "25", True)
    assert [(one["kind"], one["amount_usd"]) for one in wallet["transfers"]] == [("top_up", "25")]
    set_to = (await office.post("wallet/automatic_top_up", {"below_cents": 500, "amount_cents": 5_000})).json()
    assert (set_to["top_up_below_cents"], set_to["top_up_cents"]) == (500, 5_000)
    off = (await office.post("wallet/automatic_top_up", {"below_cents": None, "amount_cents": None})).json()
    assert off["top_up_cents"] is None


async def test_usage_says_what_is_left_of_the_plan(office: Office) -> None:
    async with office.place.database.transaction() as session:
        query = "UPDATE organizations SET plan = 'free' WHERE id = :org"
        await session.execute(text(query), {"org": office.organization_id})
    used = (await office.get("usage")).json()
    assert used["charge_usd"] == "0"
    units = {one["unit"]: (one["used"], one["limit"]) for one in used["allowances"]}
    assert units["chat_requests"] == (0, 1_000)


class TestNobodyElse:
    @pytest.mark.parametrize("act", _READ)
    async def test_reads(self, behind: BillingPlace, gateway: Gateway, act: str) -> None:
        tenant = await new_tenant(behind.database, behind.pepper)
        async with httpx.AsyncClient(base_url=gateway.url) as client:
            assert (await client.get(f"/v1/billing/{act}")).status_code == 401
            own = {"authorization": f"Bearer {tenant.key}"}
            assert (await client.get(f"/v1/billing/{act}", headers=own)).status_code == 403

    @pytest.mark.parametrize(("act", "body"), _WRITE)
    async def test_acts(self, behind: BillingPlace, gateway: Gateway, act: str, body: dict[str, object]) -> None:
        tenant = await new_tenant(behind.database, behind.pepper)
        behind.twin.journal.entries.clear()
        async with httpx.AsyncClient(base_url=gateway.url) as client:
            assert (await client.post(f"/v1/billing/{act}", json=body)).status_code == 401
            own = {"authorization": f"Bearer {tenant.key}"}
            assert (await client.post(f"/v1/billing/{act}", json=body, headers=own)).status_code == 403
        assert not behind.twin.journal.entries

    async def test_sees_another_organizations_billing(
        self, office: Office, behind: BillingPlace, gateway: Gateway
    ) -> None:
        page = (await office.post("checkout", {"plan": "pro", **_URLS})).json()
        behind.twin.complete_checkout(page["url"].rpartition("/")[2])
        await behind.hear()
        other = await new_tenant(behind.database, behind.pepper, NewKey(name="o", scopes=ADMIN_SCOPES))
        stranger = Office(behind, gateway, other.organization_id, other.key)
        assert (await stranger.get("invoices")).json()["data"] == []
        assert (await stranger.get("subscription")).json()["error"]["code"] == "not_subscribed"
        assert (await stranger.post("subscription/cancel", {})).json()["error"]["code"] == "not_subscribed"
        mine = (await office.get("invoices")).json()["first_id"]
        assert (await stranger.get("invoices", after=mine)).json()["data"] == []
        await stranger.client.aclose()

    async def test_but_the_operator_compares(self, office: Office, behind: BillingPlace, gateway: Gateway) -> None:
        assert (await office.get("reconciliation")).status_code == 403
        tenant = await new_tenant(behind.database, behind.pepper, NewKey(name="op", scopes=OPERATOR_SCOPES))
        operator = Office(behind, gateway, tenant.organization_id, tenant.key)
        seen = (await operator.get("reconciliation")).json()
        assert seen["differences"] == []
        await operator.client.aclose()


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("act", "body", "param"),
        [
            ("checkout", {"plan": "pro"}, "success_url"),
            ("checkout", {"plan": "platinum", **_URLS}, "plan"),
            ("checkout", {"plan": "free", **_URLS}, "plan"),
            ("checkout", {"plan": "pro", **_URLS, "success_url": "javascript:alert(1)"}, "success_url"),
            ("checkout", {"plan": 1, **_URLS}, "plan"),
            ("checkout", {"plan": "pro", **_URLS, "price": "price_1"}, "price"),
            ("portal", {"return_url": "file:///etc/passwd"}, "return_url"),
            ("wallet/top_ups", {"amount_cents": 1, **_URLS}, "amount_cents"),
            ("wallet/top_ups", {"amount_cents": 10.5, **_URLS}, "amount_cents"),
            ("wallet/automatic_top_up", {"below_cents": 1, "amount_cents": None}, "amount_cents"),
            ("wallet/automatic_top_up", {"below_cents": None, "amount_cents": 1_000}, "below_cents"),
            ("wallet/automatic_top_up", {"below_cents": 6_000, "amount_cents": 5_000}, "amount_cents"),
        ],
    )
    async def test_is_named(self, office: Office, act: str, body: dict[str, object], param: str) -> None:
        answer = await office.post(act, body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text

    async def test_stripe_down_is_503_and_reading_goes_on(self, office: Office) -> None:
        office.place.twin.faults.add(FaultPlan(kind="reset", times=99))
        answer = await office.post("portal", {"return_url": "https://a.example/"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "billing_unavailable")
        assert "retry-after" in answer.headers
        for act in ("plan", "invoices", "wallet", "usage"):
            assert (await office.get(act)).status_code == 200
        office.place.twin.faults.planned.clear()


async def test_a_suspended_organization_can_still_pay(office: Office) -> None:
    async with office.place.database.transaction() as session:
        query = (
            "UPDATE organizations SET status = 'suspended', status_reason = 'billing:payment_failed' WHERE id = :org"
        )
        await session.execute(text(query), {"org": office.organization_id})
    assert (await office.post("portal", {"return_url": "https://a.example/"})).status_code == 200
    assert (await office.get("plan")).json()["status"] == "suspended"
