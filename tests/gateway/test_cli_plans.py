"""`aap plans`, and `aap orgs` as far as plans and suspension are concerned, as an operator runs them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from core.clock import SystemClock
from core.database import Database
from core.settings import Pepper
from core.writer import Writer
from keys.tenants import set_plan
from metering import partitions
from metering.entries import SETTLE, settle_arguments
from tests.gateway import test_cli
from tests.gateway.test_cli import Cli
from tests.harness.tenant import new_tenant
from tests.metering.conftest import Books

aap = test_cli.aap
bare = test_cli.bare


@pytest.fixture
async def books(aap: Cli) -> AsyncIterator[Books]:
    database = Database(aap.environ["DATABASE_URL"], connections_max=1)
    writer = Writer(aap.environ["DATABASE_URL"], statement_seconds_max=30)
    await partitions.make_ahead(writer.fetch, SystemClock().now())
    tenant = await new_tenant(database, Pepper(id="test", key=bytes(range(32))))
    async with database.transaction() as session:
        await set_plan(session, "free", organization_id=tenant.organization_id)
    yield Books(writer, tenant)
    await writer.close()
    await database.close()


async def with_example(aap: Cli) -> None:
    ran = await aap("plans", "example")
    assert ran.code == 0
    (aap.directory / "aap.toml").write_text(ran.out)


class TestPlans:
    async def test_without_any_it_says_how_to_get_some(self, bare: Cli) -> None:
        ran = await bare("plans")
        assert (ran.code, ran.out.startswith("There are no plans")) == (0, True)
        assert (await bare("plans", "--json")).json() == []

    async def test_the_example_is_a_file_that_works(self, bare: Cli) -> None:
        await with_example(bare)
        free, pro, enterprise = (await bare("plans", "--json")).json()
        assert (free["plan"], free["usd_per_month"], free["is_default"]) == ("free", "0.00", True)
        assert (free["chat_requests_per_month"], free["workflow_executions_per_month"]) == (1_000, 100)
        assert (pro["usd_per_month"], pro["chat_requests_per_month"], pro["storage_gigabytes"]) == (
            "99.00",
            100_000,
            100,
        )
        assert {enterprise[name] for name in enterprise if name.endswith("_month") and name != "usd_per_month"} == {
            None
        }
        shown = (await bare("plans")).out
        assert "99.00" in shown
        assert "100000" in shown
        assert (await bare("plans", "example", "--json")).json()["toml"] == (await bare("plans", "example")).out

    async def test_a_file_with_mistakes_says_all_of_them(self, bare: Cli) -> None:
        (bare.directory / "aap.toml").write_text("[plans.p]\ntrial_day = 3\n[plans.p.limits]\nagents = -1\n")
        ran = await bare("plans", "--json")
        assert ran.code == 1
        assert "did you mean trial_days?" in ran.json_error()
        assert "plans.p.limits.agents" in ran.json_error()

    async def test_usage_shows_the_months_units(self, aap: Cli, books: Books) -> None:
        await with_example(aap)
        await books.run(SETTLE, *settle_arguments([books.entry()]))
        org = books.tenant.organization_id
        usage = (await aap("plans", "usage", org, "--json")).json()
        assert (usage["organization_id"], usage["plan"]) == (org, "free")
        found = [(one["unit"], one["used"], one["limit"]) for one in usage["allowances"]]
        assert found == [("chat_requests", 1, 1_000), ("tokens", 30, None), ("workflow_executions", 0, 100)]
        shown = (await aap("plans", "usage", org)).out
        assert "Plan: free" in shown
        assert "chat_requests" in shown
        assert "No such organization." in (await aap("plans", "usage", "org_nope")).err


class TestOrganizations:
    async def test_a_new_one_gets_the_default_plan_unless_another_is_named(self, aap: Cli) -> None:
        [made] = (await aap("orgs", "create", "A", "--json")).json()
        assert (made["plan"], made["status"]) == (None, "active")
        await with_example(aap)
        for arguments, plan in (((), "free"), (("--plan", "pro"), "pro"), (("--plan", "none"), None)):
            [made] = (await aap("orgs", "create", "A", *arguments, "--json")).json()
            assert made["plan"] == plan
        ran = await aap("orgs", "create", "A", "--plan", "prro")
        assert ran.code == 1
        assert "did you mean pro?" in ran.err

    async def test_a_plan_is_changed_and_taken_away(self, aap: Cli) -> None:
        await with_example(aap)
        [made] = (await aap("orgs", "create", "A", "--json")).json()
        changed = (await aap("orgs", "set-plan", made["id"], "enterprise", "--json")).json()
        assert (changed["plan"], changed["propagation"]["missing"]) == ("enterprise", [])
        assert "enterprise" in (await aap("orgs", "list")).out
        assert "confirmed it" in (await aap("orgs", "set-plan", made["id"], "none")).out
        [listed] = (await aap("orgs", "list", "--json")).json()
        assert listed["plan"] is None
        for arguments, named in (
            ((made["id"], "gone"), "gone: unknown"),
            (("org_nope", "pro"), "No such organization"),
        ):
            ran = await aap("orgs", "set-plan", *arguments)
            assert (ran.code, ran.out) == (1, "")
            assert named in ran.err

    async def test_a_plan_that_is_gone_is_found_by_the_doctor(self, aap: Cli) -> None:
        await with_example(aap)
        [made] = (await aap("orgs", "create", "A", "--plan", "pro", "--json")).json()
        for text, result in (("", "warning"), ("[plans.pro]", "ok")):
            (aap.directory / "aap.toml").write_text(text)
            [found] = [one for one in (await aap("doctor", "--json")).json() if one["check"] == "plans"]
            assert found["result"] == result
        assert made["plan"] == "pro"

    async def test_one_is_suspended_and_resumed(self, aap: Cli) -> None:
        [made] = (await aap("orgs", "create", "A", "--json")).json()
        changed = (await aap("orgs", "suspend", made["id"], "--reason", "payment_failed", "--json")).json()
        assert (changed["status"], changed["status_reason"]) == ("suspended", "payment_failed")
        shown = (await aap("orgs", "list")).out
        assert "suspended" in shown
        assert "payment_failed" in shown
        assert (await aap("orgs", "resume", made["id"])).code == 0
        [listed] = (await aap("orgs", "list", "--json")).json()
        assert (listed["status"], listed["status_reason"]) == ("active", None)
        assert (await aap("orgs", "suspend", "org_nope")).code == 1
