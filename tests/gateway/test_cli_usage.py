"""`aap usage`, `aap ledger export` and admin keys, as an operator runs them."""

from __future__ import annotations

import csv
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from core.database import Database
from gateway.cli import aap as commands
from keys.scopes import ADMIN_SCOPES
from tests.gateway import test_cli
from tests.gateway.test_cli import Cli
from tests.harness.usage_rows import add_entries, add_entry, add_window, make_month

aap = test_cli.aap
DAY = datetime(2026, 3, 2, tzinfo=UTC)
MARCH = ("--from", "2026-03-01", "--to", "2026-04-01")


@pytest.fixture
async def books(aap: Cli) -> AsyncIterator[Database]:
    """The database of an installation."""
    made = Database(aap.environ["DATABASE_URL"], connections_max=1)
    yield made
    await made.close()


@pytest.fixture
async def organization_id(aap: Cli) -> str:
    [organization] = (await aap("orgs", "create", "Acme", "--json")).json()
    await aap("projects", "create", "Search")
    return organization["id"]


class TestWronglyCalled:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("usage", "--days", "0"),
            ("usage", "--days", "3", "--from", "2026-03-01"),
            ("usage", "--to", "2026-03-01"),
            ("usage", "--from", "2026-03-02", "--to", "2026-03-02"),
            ("usage", "--from", "yesterday"),
            ("usage", "--by", "colour"),
            ("ledger", "export", "--format", "xlsx"),
            ("ledger", "export", "--from", "2026-03-02", "--to", "2026-03-01"),
            ("ledger", "export", "--output", "/"),
            ("keys", "create", "k", "--admin", "--scope", "usage:read"),
        ],
        ids=" ".join,
    )
    def test_exit_code_2_and_a_word_on_standard_error(self, arguments: tuple[str, ...]) -> None:
        ran = CliRunner().invoke(commands, arguments)
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert ran.stderr


class TestAdminKeys:
    async def test_they_have_the_scopes_of_administration_and_no_other(self, aap: Cli, organization_id: str) -> None:
        made = (await aap("keys", "create", "books", "--admin", "--json")).json()
        [key] = (await aap("keys", "list", "--json")).json()
        assert (key["id"], key["scopes"]) == (made["id"], list(ADMIN_SCOPES))

    async def test_no_key_is_both(self, aap: Cli, organization_id: str) -> None:
        ran = await aap("keys", "create", "k", "--scope", "usage:read", "--scope", "chat:write")
        assert (ran.code, ran.out) == (1, "")
        assert "not for both" in ran.err
        assert (await aap("keys", "list", "--json")).json() == []


class TestUsage:
    @pytest.fixture(autouse=True)
    async def used(self, books: Database, organization_id: str) -> None:
        async with books.transaction() as session:
            for model, key, project, day, charge in (
                ("small", "key_1", "proj_1", 0, 1),
                ("small", "key_2", "proj_1", 1, 2),
                ("large", "key_2", "proj_2", 1, 3_000_000_001),
                ("large", "key_2", "proj_2", 31, 10**15),
            ):
                await add_window(
                    session, organization_id, DAY + timedelta(days=day), model=model, key_id=key, project_id=project,
                    requests=2, unpriced_requests=1, cost_nano_usd=10 * charge, charge_nano_usd=charge,
                    input_tokens=1, cached_input_tokens=10, output_tokens=100, reasoning_tokens=1000,
                )  # fmt: skip
            await add_window(session, "org_another", DAY, charge_nano_usd=7)

    @pytest.mark.parametrize(
        ("by", "expected"),
        [
            ("model", {"large": "3.000000001", "small": "0.000000003"}),
            ("project", {"proj_2": "3.000000001", "proj_1": "0.000000003"}),
            ("key", {"key_2": "3.000000003", "key_1": "0.000000001"}),
            ("day", {"2026-03-02": "0.000000001", "2026-03-03": "3.000000003"}),
        ],
    )
    async def test_a_month_by_everything(self, aap: Cli, by: str, expected: dict[str, str]) -> None:
        """Guarantee: exact to the nano-dollar; the dearest first, days in their order."""
        rows = (await aap("usage", *MARCH, "--by", by, "--json")).json()
        assert {row["group"]: row["charge_usd"] for row in rows} == expected
        assert [row["group"] for row in rows] == list(expected)
        assert sum(row["requests"] for row in rows) == 6
        assert sum(Decimal(row["cost_usd"]) for row in rows) == Decimal("30.00000004")

    async def test_a_table_with_its_total(self, aap: Cli) -> None:
        lines = (await aap("usage", *MARCH)).out.splitlines()
        cells = {line.split()[0]: line.split()[1:] for line in lines}
        assert cells["large"] == ["2", "11", "10", "1100", "30.00000001", "3.000000001", "1"]
        assert cells["total"] == ["6", "33", "30", "3300", "30.00000004", "3.000000004", "3"]

    async def test_the_last_days(self, aap: Cli, books: Database, organization_id: str) -> None:
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        async with books.transaction() as session:
            for days in (0, 2):
                at = hour - timedelta(days=days)
                await add_window(session, organization_id, at, model=f"{days} days ago")
        for days, expected in ((1, {"0 days ago"}), (2, {"0 days ago"}), (3, {"0 days ago", "2 days ago"})):
            rows = (await aap("usage", "--days", str(days), "--json")).json()
            assert {row["group"] for row in rows} == expected

    async def test_nothing_was_used(self, aap: Cli) -> None:
        assert (await aap("usage", "--from", "2020-01-01", "--to", "2020-02-01", "--json")).json() == []
        assert "Nothing was used" in (await aap("usage", "--from", "2020-01-01", "--to", "2020-02-01")).out
        assert (await aap("usage", "--org", "org_nope")).code == 1


class TestLedgerExport:
    @pytest.fixture(autouse=True)
    async def entered(self, books: Database, organization_id: str) -> None:
        async with books.transaction() as session:
            for at in (DAY, DAY + timedelta(days=31)):
                await make_month(session, at)
                await add_entries(session, organization_id, at, 1_500)
            await add_entry(session, "org_another_1", DAY, charge_nano_usd=7)

    async def test_a_file_of_a_month(self, aap: Cli, tmp_path: Path) -> None:
        """Guarantee: every entry of the month once, none of another's, and a total that is exact."""
        file = tmp_path / "march.csv"
        told = (await aap("ledger", "export", *MARCH, "--output", str(file), "--json")).json()
        assert told == {"output": str(file), "bytes": file.stat().st_size}
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert len({row["id"] for row in rows}) == len(rows) == 1_500
        assert sum(Decimal(row["charge_usd"]) for row in rows) * 10**9 == 1_500 * 1_501 // 2
        assert {path.name for path in tmp_path.iterdir()} & {"march.csv.part"} == set()

    async def test_all_of_it_to_standard_output(self, aap: Cli) -> None:
        lines = (await aap("ledger", "export", "--format", "jsonl")).out.splitlines()
        assert len({msgspec.json.decode(line)["id"] for line in lines}) == len(lines) == 3_000

    async def test_a_file_that_cannot_be_written_is_named_and_leaves_no_part(self, aap: Cli, tmp_path: Path) -> None:
        for output in ("/nonexistent/x.csv", "/dev/full"):
            ran = await aap("ledger", "export", "--output", output)
            assert ran.code == 1
            assert f"{output} cannot be written" in ran.err
            assert "store" not in ran.err
        assert Path("/dev/full").is_char_device()

    async def test_a_pipe_is_written_to_as_it_is(self, aap: Cli, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        ran = await aap("ledger", "export", "--to", "2020-01-01", "--output", str(pipe))
        assert ran.code == 0
        assert os.read(reading, 100).startswith(b"id,request_id,")
        os.close(reading)
        assert pipe.is_fifo()
