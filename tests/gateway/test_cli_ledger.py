"""`aap ledger verify`, `adjust` and `credit`, and `aap budgets`, as an operator runs them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import msgspec
import pytest
from click.testing import CliRunner
from redis.asyncio import Redis

from core.clock import SystemClock
from core.database import Database
from core.ids import new_id
from core.settings import Pepper
from core.writer import Writer
from gateway.cli import aap as commands
from metering import partitions
from metering.entries import INTEND, SETTLE, Entry, intend_arguments, settle_arguments
from tests.gateway import test_cli
from tests.gateway.test_cli import Cli
from tests.harness.tenant import new_tenant
from tests.metering.conftest import Books

aap = test_cli.aap


@pytest.fixture
async def books(aap: Cli) -> AsyncIterator[Books]:
    database = Database(aap.environ["DATABASE_URL"], connections_max=1)
    writer = Writer(aap.environ["DATABASE_URL"], statement_seconds_max=30)
    await partitions.make_ahead(writer.fetch, SystemClock().now())
    yield Books(writer, await new_tenant(database, Pepper(id="test", key=bytes(range(32)))))
    await writer.close()
    await database.close()


async def entered(books: Books, **facts: object) -> Entry:
    entry = books.entry(**facts)  # type: ignore[arg-type]
    await books.run(SETTLE, *settle_arguments([entry]))
    return entry


class TestWronglyCalled:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("adjust",),
            ("adjust", "req_1", "--charge", "1"),
            ("adjust", "req_1", "--reason", "why"),
            ("adjust", "req_1", "--charge", "much", "--reason", "why"),
            ("adjust", "req_1", "--charge", "0.0000000001", "--reason", "why"),
            ("adjust", "req_1", "--charge", "1", "--reason", "why", "--json"),
            ("credit", "--reason", "why"),
            ("credit", "--amount", "5"),
            ("verify", "--rates"),
        ],
        ids=" ".join,
    )
    def test_exit_code_2_and_a_word_on_standard_error(self, arguments: tuple[str, ...]) -> None:
        ran = CliRunner().invoke(commands, ("ledger", *arguments))
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert ran.stderr


class TestVerify:
    async def test_books_that_agree(self, aap: Cli, books: Books) -> None:
        assert (await aap("ledger", "verify")).code == 0
        await entered(books, cost=0)
        ran = await aap("ledger", "verify", "--no-rates")
        assert (ran.code, ran.err) == (0, "")
        assert "1 entries (0 rated once more), 2 windows, 0 budget periods, 0 running calls" in ran.out
        assert "Everything agrees." in ran.out

    async def test_books_that_do_not_exit_with_1_and_say_where(self, aap: Cli, books: Books) -> None:
        await entered(books, cost=100)
        await books.run("UPDATE spend_windows SET requests = 5 WHERE seconds = 3600")
        ran = await aap("ledger", "verify")
        assert ran.code == 1
        assert "2 things do not agree" in ran.err
        # The window, and an entry that no price explains.
        assert books.tenant.organization_id in ran.out
        assert "requests=5" in ran.out
        assert "rating" in ran.out
        assert "rating" not in (await aap("ledger", "verify", "--no-rates")).out

    async def test_as_json(self, aap: Cli, books: Books) -> None:
        entry = await entered(books, cost=100)
        ran = await aap("ledger", "verify", "--json")
        assert "1 things do not agree" in ran.json_error()
        report = test_cli.Ran(0, ran.out, "").json()
        assert [(drift["what"], drift["where"]) for drift in report["drifts"]] == [("rating", entry.request_id)]
        assert (report["entries"], report["rated"], report["budgets_in_redis"]) == (1, 1, [])

    async def test_without_redis_only_that_is_not_looked_at(self, aap: Cli, books: Books) -> None:
        await aap("budgets", "set", "organization", "--limit", "5")
        ran = await aap("ledger", "verify", REDIS_URL="redis://127.0.0.1:1/0")
        assert ran.code == 0
        assert "Redis did not answer" in ran.err

    async def test_a_lost_call_is_given_time_to_be_swept(self, aap: Cli, books: Books) -> None:
        """Guarantee: as long as a gateway may be silent, and a worker's rounds on top."""
        intent = books.intent()
        await books.run(INTEND, *intend_arguments("gw_1", [intent]))
        await books.run("UPDATE usage_intents SET checkpoint_at = now() - interval '100 seconds'")
        assert (await aap("ledger", "verify")).code == 0


class TestAdjust:
    async def test_it_shows_what_it_would_do_and_asks(self, aap: Cli, books: Books) -> None:
        entry = await entered(books, cost=1_500_000_000)
        asked = ("ledger", "adjust", entry.request_id, "--charge", "-0.25", "--reason", "ticket 12")
        refused = await aap(*asked, stdin="n\n")
        assert refused.code == 1
        assert "charge 1.5 - 0.25 = 1.25 USD" in refused.err
        assert "ticket 12" in refused.err
        assert len(await books.entries()) == 1
        done = await aap(*asked, stdin="y\n")
        assert done.code == 0, done.err
        assert f"{entry.request_id}_adjustment_2" in done.out
        assert [row["note"] for row in await books.entries()] == [None, "ticket 12"]

    async def test_sure_of_it_and_as_json(self, aap: Cli, books: Books) -> None:
        entry = await entered(books, cost=0)
        words = ("--charge", "+2", "--cost", "-0.5", "--reason", "why", "--yes", "--json")
        made = (await aap("ledger", "adjust", entry.request_id, *words)).json()
        assert made["id"] == f"{entry.request_id}_adjustment_2"
        assert (made["charge_usd"], made["cost_usd"], made["note"]) == ("2", "-0.5", "why")
        assert datetime.fromisoformat(made["occurred_at"]) < datetime.now(UTC)
        exported = (await aap("ledger", "export", "--format", "jsonl")).out
        assert '"note":"why"' in exported
        assert (await aap("ledger", "verify", "--no-rates")).code == 0

    async def test_a_call_that_is_not_there(self, aap: Cli) -> None:
        ran = await aap("ledger", "adjust", new_id("req"), "--charge", "1", "--reason", "why", "--yes")
        assert (ran.code, ran.out) == (1, "")
        assert "no entry" in ran.err


class TestCredit:
    async def test_it_shows_what_it_would_do_and_asks(self, aap: Cli, books: Books) -> None:
        asked = ("ledger", "credit", "--amount", "25", "--reason", "outage")
        refused = await aap(*asked, stdin="\n")
        assert refused.code == 1
        assert f"A credit of 25 USD for {books.tenant.organization_id}: outage" in refused.err
        assert await books.entries() == []
        assert "-25" in (await aap(*asked, stdin="y\n")).out
        [row] = await books.entries()
        assert (row["kind"], row["charge_nano_usd"], row["note"]) == ("credit", -25 * 10**9, "outage")

    async def test_for_a_project_or_a_key(self, aap: Cli, books: Books) -> None:
        tenant = books.tenant
        words = ("ledger", "credit", "--amount", "1", "--reason", "why", "--yes", "--json")
        by_project = (await aap(*words, "--project", tenant.project_id)).json()
        by_key = (await aap(*words, "--key", tenant.key_id)).json()
        assert (by_project["project_id"], by_project["key_id"]) == (tenant.project_id, "")
        assert (by_key["project_id"], by_key["key_id"]) == (tenant.project_id, tenant.key_id)
        ran = await aap(*words, "--project", "proj_x")
        assert "project" in ran.json_error()

    @pytest.mark.parametrize("amount", ["0", "-5", "10000000"])
    async def test_an_amount_that_cannot_be_meant(self, aap: Cli, books: Books, amount: str) -> None:
        ran = await aap("ledger", "credit", "--amount", amount, "--reason", "why", "--yes")
        assert (ran.code, ran.out) == (1, "")
        connection = await asyncpg.connect(aap.environ["DATABASE_URL"])
        assert await connection.fetchval("SELECT count(*) FROM ledger_entries") == 0
        await connection.close()


SILENT = "gw_silent"
LIMIT = ("organization", "--limit", "2.5")


@pytest.fixture
async def silent(redis: Redis) -> AsyncIterator[None]:
    """A gateway that lives, and confirms nothing."""
    seconds, _ = await redis.time()
    await redis.zadd("aap:gateways", {SILENT: seconds + 600})
    yield
    await redis.zrem("aap:gateways", SILENT)


@pytest.mark.usefixtures("books")
class TestBudgets:
    async def test_a_change_that_every_gateway_knows_exits_with_0(self, aap: Cli) -> None:
        made = (await aap("budgets", "set", *LIMIT, "--json")).json()
        assert (made["limit_usd"], made["propagation"]["missing"]) == ("2.5", [])
        changed = await aap("budgets", "set", "organization", "--limit", "3")
        assert (changed.code, changed.err) == (0, "")
        assert re.search(r"\d+ running API process(es)? confirmed it\.$", changed.out.strip())
        gone = await aap("budgets", "clear", "organization")
        assert (gone.code, gone.err) == (0, "")
        assert re.fullmatch(r"The budget is gone; \d+ running API process(es)? confirmed it\.", gone.out.strip())

    @pytest.mark.usefixtures("silent")
    async def test_a_change_that_a_gateway_has_not_confirmed_names_it_exits_with_1_and_holds(self, aap: Cli) -> None:
        told = f"not confirmed by {SILENT}: there the change holds within 5 seconds"
        ran = await aap("budgets", "set", *LIMIT)
        assert (ran.code, ran.err.strip()) == (1, f"Error: {told}")
        assert "2.5" in ran.out
        ran = await aap("budgets", "set", "organization", "--limit", "3", "--json")
        assert (ran.code, ran.json_error()) == (1, told)
        made = msgspec.json.decode(ran.out)
        assert (made["limit_usd"], made["propagation"]["missing"]) == ("3", [SILENT])
        assert [row["limit_usd"] for row in (await aap("budgets", "list", "--json")).json()] == ["3"]

    @pytest.mark.usefixtures("silent")
    async def test_so_do_limits(self, aap: Cli) -> None:
        ran = await aap("limits", "set", "organization", "--tokens-per-day", "7")
        assert (ran.code, "7" in ran.out) == (1, True)
        assert ran.err.strip() == f"Error: not confirmed by {SILENT}: there the change holds within 5 seconds"

    @pytest.mark.usefixtures("silent")
    async def test_so_does_a_budget_that_is_deleted(self, aap: Cli) -> None:
        down = {"REDIS_URL": "redis://127.0.0.1:1/0"}
        for period in ("day", "week"):
            ran = await aap("budgets", "set", *LIMIT, "--period", period, **down)
            assert (ran.code, "not confirmed by redis" in ran.err) == (1, True)
        ran = await aap("budgets", "clear", "organization", "--period", "day")
        assert (ran.code, SILENT in ran.err) == (1, True)
        assert "The budget is gone" in ran.out
        ran = await aap("budgets", "clear", "organization", "--period", "week", "--json")
        assert SILENT in ran.json_error()
        told = msgspec.json.decode(ran.out)
        assert (told["deleted"], told["propagation"]["missing"]) == (True, [SILENT])
        assert (await aap("budgets", "list", "--json")).json() == []

    async def test_events_name_budgets_as_the_list_does(self, aap: Cli, books: Books) -> None:
        tenant = books.tenant
        await aap("budgets", "set", *LIMIT, "--period", "day")
        await aap("budgets", "set", "key", tenant.key_id, "--limit", "2", "--soft")
        await entered(books, cost=1_300_000_000)
        listed = {row["budget"]: row for row in (await aap("budgets", "list", "--json")).json()}
        events = (await aap("budgets", "events", "--json")).json()
        assert len(listed) == len(events) == 2
        for event in events:
            names = ("scope", "id", "period")
            assert [event[name] for name in names] == [listed[event["budget"]][name] for name in names]
        assert {(row["scope"], row["id"], row["period"]) for row in events} == {
            ("organization", tenant.organization_id, "day"),
            ("key", tenant.key_id, "month"),
        }
        for table in ((await aap("budgets", "list")).out, (await aap("budgets", "events")).out):
            assert all(budget in table for budget in listed)
            assert tenant.key_id in table

    async def test_events_of_a_deleted_budget_stay(self, aap: Cli, books: Books) -> None:
        await aap("budgets", "set", *LIMIT)
        await entered(books, cost=2_000_000_000)
        await aap("budgets", "clear", "organization")
        events = (await aap("budgets", "events", "--json")).json()
        assert [(row["threshold_percent"], row["scope"], row["id"]) for row in events] == [
            (80, None, None),
            (50, None, None),
        ]
        assert events[0]["budget"] in (await aap("budgets", "events")).out
