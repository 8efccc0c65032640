"""`aap stripe` and `aap wallet`, as an operator runs them, in front of a twin on the machine's own time."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from core.clock import SystemClock
from core.database import Database
from metering.billing.plans import EXAMPLE
from metering.billing.twin.app import Twin
from metering.billing.twin.server import TwinServer, serving
from tests.gateway.test_cli import Cli
from tests.harness.billing import empty
from tests.harness.gateway import free_port
from tests.harness.stores import TestStores


@pytest.fixture
async def twin(books: Database) -> AsyncGenerator[TwinServer]:
    await empty(books)
    async with serving(Twin(SystemClock())) as server:
        yield server
    await empty(books)


@pytest.fixture
def aap(twin: TwinServer, books_url: str, stores: TestStores, tmp_path: Path) -> Cli:
    (tmp_path / "aap.toml").write_text(EXAMPLE)
    more = {
        "STRIPE_API_KEY": "sk_test_twin",
        "AAP_STRIPE_URL": twin.url,
        "STRIPE_WEBHOOK_SECRET": "whsec_of_the_cli_tests",
    }
    return Cli(tmp_path, {**stores.environ(), "DATABASE_URL": books_url, **more})


async def test_sync_shows_what_it_would_do_asks_and_does_it_once(aap: Cli) -> None:
    assert "--yes or --dry-run" in (await aap("stripe", "sync", "--json")).json_error()
    planned = (await aap("stripe", "sync", "--dry-run", "--json")).json()
    assert {one["act"] for one in planned} == {"create"}
    shown = await aap("stripe", "sync", stdin="n\n")
    assert (shown.code, "aap_plan_pro_month" in shown.out) == (1, True)
    assert (await aap("stripe", "sync", "--dry-run", "--json")).json() == planned
    done = await aap("stripe", "sync", stdin="y\n")
    assert (done.code, f"Done: {len(planned)} changes" in done.out) == (0, True)
    assert "Stripe has everything" in (await aap("stripe", "sync")).out


async def test_usage_is_exported_compared_and_shown(aap: Cli, books: Database, twin: TwinServer) -> None:
    await aap("stripe", "sync", "--yes")
    organization = (await aap("orgs", "create", "Acme", "--json")).json()[0]["id"]
    now = datetime.now(UTC)
    async with books.transaction() as session:
        values = {"org": organization, "at": now - timedelta(hours=3), "start": now - timedelta(days=1)}
        for statement in (
            "INSERT INTO billing_customers (organization_id, stripe_customer_id) VALUES (:org, :customer)",
            "INSERT INTO meter_cursors (organization_id, meter) VALUES (:org, 'usage_micro_usd_v1')",
            (
                "INSERT INTO billing_periods (subscription_id, starts_at, ends_at, organization_id, is_metered)"
                " VALUES ('sub_1', :start, CAST(:start AS timestamptz) + interval '30 days', :org, true)"
            ),
            (
                "INSERT INTO spend_windows (organization_id, seconds, starts_at, project_id, key_id, model, operation,"
                " service_tier, requests, unpriced_requests, cost_nano_usd, charge_nano_usd)"
                " VALUES (:org, 3600, date_trunc('hour', CAST(:at AS timestamptz), 'UTC'), 'p', 'k', 'm', 'chat',"
                " 'default', 1, 0, 5000999, 5000999)"
            ),
        ):
            await session.execute(text(statement), {**values, "customer": await _customer(twin)})
    exported = (await aap("stripe", "export", "--now", "--json")).json()
    assert (exported["acked"], exported["problem"]) == (1, None)
    compared = (await aap("stripe", "reconcile", "--json")).json()
    assert (compared["round"]["hours"], compared["differences"]) == (1, [])
    status = await aap("stripe", "status")
    assert (status.code, "1 acked" in status.out) == (0, True)


async def test_what_differs_ends_with_code_1(aap: Cli, books: Database) -> None:
    organization = (await aap("orgs", "create", "Acme", "--json")).json()[0]["id"]
    async with books.transaction() as session:
        query = (
            "INSERT INTO meter_cursors (organization_id, meter, parked_for) VALUES (:org, 'usage_micro_usd_v1', 'gone')"
        )
        await session.execute(text(query), {"org": organization})
    status = await aap("stripe", "status")
    assert (status.code, "gone" in status.out) == (1, True)
    assert (await aap("stripe", "resume", organization, "--json")).json() == {"resumed": 1}
    assert (await aap("stripe", "status")).code == 0


async def test_what_was_decided_about_does_not_count_any_more(aap: Cli, books: Database) -> None:
    organization = (await aap("orgs", "create", "Acme", "--json")).json()[0]["id"]
    async with books.transaction() as session:
        query = """
        INSERT INTO meter_checks (organization_id, meter, hour, ours, theirs, state, seen_at, checked_at)
        VALUES (:org, 'usage_micro_usd_v1', now() - interval '3 hours', 5, 3, 'alert', now(), now())
        """
        await session.execute(text(query), {"org": organization})
    assert "give --yes" in (await aap("stripe", "accept", organization, "--json")).json_error()
    asked = await aap("stripe", "accept", organization, stdin="n\n")
    assert (asked.code, "alert" in asked.out) == (1, True)
    assert (await aap("stripe", "status", "--org", organization)).code == 1
    done = (await aap("stripe", "accept", organization, "--yes", "--json")).json()
    assert done == {"hours": 1, "invoices": 0, "periods": 0, "windows": 0, "subscriptions": 0}
    assert (await aap("stripe", "status")).code == 0


async def test_an_event_that_can_never_be_applied_is_dismissed(aap: Cli, books: Database) -> None:
    async with books.transaction() as session:
        query = """
        INSERT INTO stripe_events (id, type, object_id, occurred_at, state, source)
        VALUES ('evt_1', 'invoice.paid', 'in_1', now(), 'dead', 'webhook')
        """
        await session.execute(text(query))
    assert "no event evt_2" in (await aap("stripe", "events", "--dismiss", "evt_2", "--json")).json_error()
    assert (await aap("stripe", "events", "--dismiss", "evt_1", "--json")).json() == {"dismissed": 1}
    assert (await aap("stripe", "status")).code == 0


async def test_events_that_were_given_up_are_listed_and_applied_again(aap: Cli, books: Database) -> None:
    async with books.transaction() as session:
        query = """
        INSERT INTO stripe_events (id, type, object_id, occurred_at, state, source)
        VALUES ('evt_1', 'invoice.paid', 'in_1', now(), 'dead', 'webhook')
        """
        await session.execute(text(query))
    assert [one["id"] for one in (await aap("stripe", "events", "--state", "dead", "--json")).json()] == ["evt_1"]
    assert (await aap("stripe", "events", "--replay-dead", "--json")).json() == {"replayed": 1}
    assert (await aap("stripe", "events", "--state", "dead", "--json")).json() == []
    assert "no event evt_2" in (await aap("stripe", "events", "--replay", "evt_2", "--json")).json_error()


async def test_credit_is_given_once_for_a_reference(aap: Cli) -> None:
    organization = (await aap("orgs", "create", "Acme", "--json")).json()[0]["id"]
    for is_new in (True, False):
        done = (await aap("wallet", "add", organization, "12.50", "--reference", "GOODWILL-7", "--json")).json()
        assert done == {"is_new": is_new, "available_usd": "12.5"}
    assert "12.5 US dollars left" in (await aap("wallet", "show", organization)).out
    assert (
        "2.50 US dollars taken: 10 left" in (await aap("wallet", "add", organization, "-2.50", "--reference", "B")).out
    )
    addressed = (await aap("orgs", "set-email", organization, "office@acme.example", "--json")).json()
    assert addressed == {"organization_id": organization, "email": "office@acme.example"}
    assert (await aap("orgs", "set-email", organization, "nobody", "--json")).json_error()
    for wrong in ("0", "0.001", "much"):
        assert (await aap("wallet", "add", organization, wrong, "--reference", "x", "--json")).json_error()


@pytest.mark.parametrize("act", [("sync", "--yes"), ("export",), ("reconcile",)])
async def test_without_a_key_says_so(aap: Cli, act: tuple[str, ...]) -> None:
    assert "STRIPE_API_KEY is not set" in (await aap("stripe", *act, "--json", STRIPE_API_KEY="")).json_error()


async def test_with_stripe_down_says_so(aap: Cli) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert "StripeNotReached" in (await aap("stripe", "sync", "--yes", "--json", AAP_STRIPE_URL=nowhere)).json_error()


@pytest.mark.parametrize(
    ("environ", "result", "word"),
    [
        ({"STRIPE_API_KEY": ""}, "warning", "nobody can buy pro, enterprise"),
        ({"STRIPE_WEBHOOK_SECRET": ""}, "warning", "STRIPE_WEBHOOK_SECRET"),
        ({}, "warning", "aap stripe sync"),
    ],
)
async def test_the_doctor_says_what_is_missing(aap: Cli, environ: dict[str, str], result: str, word: str) -> None:
    found = {one["check"]: one for one in (await aap("doctor", "--json", **environ)).json()}
    assert found["stripe"]["result"] == result
    assert word in found["stripe"]["detail"]


async def test_the_doctor_is_content_after_a_sync(aap: Cli) -> None:
    await aap("stripe", "sync", "--yes")
    found = {one["check"]: one for one in (await aap("doctor", "--json")).json()}
    assert (found["stripe"]["result"], found["stripe"]["detail"]) == ("ok", "test key, 2 plans for sale")


async def test_the_twin_is_a_program(aap: Cli) -> None:
    assert "--webhook" in (await aap("stripe", "twin", "--help")).out
    wrong = await aap("stripe", "twin", "--requests-per-second", "many")
    assert (wrong.code, "invalid int value" in wrong.err) == (2, True)


async def _customer(twin: TwinServer) -> str:
    async with httpx.AsyncClient(base_url=twin.url, headers={"authorization": "Bearer sk_test_twin"}) as client:
        return (await client.post("/v1/customers", data={"name": "Acme"})).json()["id"]
