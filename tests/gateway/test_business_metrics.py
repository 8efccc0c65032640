"""`/v1/billing/metrics` and `aap metrics`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import text

from core.clock import SystemClock
from core.database import Database
from core.ids import new_id
from keys.lifecycle import NewKey
from keys.scopes import ADMIN_SCOPES, OPERATOR_SCOPES
from keys.tenants import create_organization
from metering.billing import metrics
from tests.gateway import test_cli
from tests.gateway.test_cli import Cli
from tests.gateway.test_usage_api import ask
from tests.harness.gateway import Gateway
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant
from tests.harness.usage_rows import add_window

aap = test_cli.aap
PATH = "/v1/billing/metrics"
DAY = date(2020, 2, 1)
DAYS = "start_date=2020-02-01&end_date=2020-02-03"


async def sell(database: Database) -> None:
    """Somebody pays 99 dollars from the second of three days on, and uses something on the third."""
    start = datetime(2020, 2, 1, tzinfo=UTC)
    async with database.transaction() as session:
        organization = await create_organization(session, "Acme")
        await session.execute(
            text(
                "INSERT INTO subscription_changes (id, organization_id, subscription_id, plan, status, mrr_cents,"
                " occurred_at) VALUES (:id, :org, :id, 'pro', 'active', 9900, :at)"
            ),
            {"id": new_id("sch"), "org": organization.id, "at": start + timedelta(days=1.5)},
        )
        sums = {"cost_nano_usd": 1_500_000_000, "charge_nano_usd": 2_000_000_000}
        await add_window(session, organization.id, start + timedelta(days=2), **sums)


class TestRoute:
    @pytest.fixture
    async def key(self, database: Database, stores: TestStores) -> str:
        made = await new_tenant(database, stores.pepper, NewKey(name="operator", scopes=OPERATOR_SCOPES))
        return made.key

    @pytest.fixture
    async def sold(self, database: Database) -> AsyncIterator[None]:
        await sell(database)
        await metrics.compute(database, SystemClock(), DAY, DAY + timedelta(days=2))
        yield
        async with database.transaction() as session:
            await session.execute(text("TRUNCATE daily_metrics, mrr_snapshots, subscription_changes"))

    @pytest.mark.usefixtures("sold")
    async def test_the_operator_is_told_day_by_day(self, gateway: Gateway, key: str) -> None:
        answer = await ask(gateway, key, PATH, DAYS)
        assert answer.status == 200
        body = answer.json()
        assert body["object"] == "list"
        assert [day["day"] for day in body["data"]] == ["2020-02-01", "2020-02-02", "2020-02-03"]
        assert [day["mrr_cents"] for day in body["data"]] == [0, 9_900, 9_900]
        assert [day["new_cents"] for day in body["data"]] == [0, 9_900, 0]
        last = body["data"][2]
        assert (last["arpu_cents"], last["clv_cents"], last["daily_active_organizations"]) == (9_900, None, 1)
        assert (last["gross_margin_nano_usd"], last["gross_margin_basis_points"]) == (500_000_000, 2_500)

    async def test_what_is_not_computed_is_not_there(self, gateway: Gateway, key: str) -> None:
        answer = await ask(gateway, key, PATH, "start_date=2019-01-01&end_date=2019-12-31")
        assert (answer.status, answer.json()) == (200, {"object": "list", "data": []})
        assert (await ask(gateway, key, PATH)).status == 200

    @pytest.mark.parametrize(
        ("query", "param"),
        [
            ("start_date=yesterday", "start_date"),
            ("end_date=2020-02-30", "end_date"),
            ("start_date=2020-02-03&end_date=2020-02-01", "end_date"),
            ("start_date=2020-02-03&end_date=2021-02-03", "start_date"),
            ("end_date=0001-01-05", "end_date"),
            ("start=2020-02-03", "start"),
        ],
    )
    async def test_what_is_malformed_is_refused_by_name(
        self, gateway: Gateway, key: str, query: str, param: str
    ) -> None:
        answer = await ask(gateway, key, PATH, query)
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)

    @pytest.mark.parametrize("scopes", [None, ADMIN_SCOPES], ids=["calls", "administrator"])
    async def test_nobody_but_the_operator(
        self, gateway: Gateway, database: Database, stores: TestStores, scopes: tuple[str, ...] | None
    ) -> None:
        """Guarantee: an organization's administrator learns nothing of the operator's business."""
        made = await new_tenant(
            database, stores.pepper, NewKey(name="k", scopes=scopes) if scopes else NewKey(name="k")
        )
        assert (await ask(gateway, made.key, PATH)).status == 403


class TestCommand:
    MARCH = ("--from", "2020-02-01", "--to", "2020-02-04")

    @pytest.fixture
    async def books(self, aap: Cli) -> AsyncIterator[Database]:
        made = Database(aap.environ["DATABASE_URL"], connections_max=1)
        yield made
        await made.close()

    async def test_days_are_shown_when_they_are_computed(self, aap: Cli, books: Database) -> None:
        await sell(books)
        empty = await aap("metrics", *self.MARCH)
        assert (empty.code, "--recompute" in empty.out) == (0, True)
        assert (await aap("metrics", *self.MARCH, "--json")).json() == []
        found = (await aap("metrics", *self.MARCH, "--recompute", "--json")).json()
        assert [day["mrr_cents"] for day in found] == [0, 9_900, 9_900]
        shown = await aap("metrics", *self.MARCH)
        head, *rows = [line.split() for line in shown.out.splitlines()]
        assert (head[0], len(rows)) == ("day", 3)
        assert rows[1][:3] == ["2020-02-02", "99", "99"]
        assert rows[2][-4:] == ["2", "1.5", "25.00", "%"]

    async def test_the_last_days_unless_others_are_asked_for(self, aap: Cli) -> None:
        found = (await aap("metrics", "--recompute", "--json")).json()
        yesterday = datetime.now(UTC).date() - timedelta(days=1)
        assert (len(found), found[-1]["day"]) == (30, yesterday.isoformat())

    @pytest.mark.parametrize(
        "arguments",
        [("--to", "2020-02-04"), ("--from", "2020-02-04", "--to", "2020-02-04"), ("--from", "2999-01-01")],
        ids=" ".join,
    )
    async def test_called_wrongly(self, aap: Cli, arguments: tuple[str, ...]) -> None:
        assert (await aap("metrics", *arguments)).code == 2
        assert (await aap("metrics", *arguments, "--json")).json_error()
