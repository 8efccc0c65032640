"""`aap prices`, as an operator runs it."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import click
import msgspec
import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from core.settings import Pepper
from gateway.cli import aap as commands
from gateway.cli.prices import EACH_OPTIONS, TOKEN_OPTIONS
from gateway.first_run import prepare
from metering.rating import Rates
from tests.gateway import test_cli
from tests.gateway.test_cli import Cli, Ran

aap = test_cli.aap
bare = test_cli.bare


def price_list(directory: Path, **entries: dict[str, Any]) -> str:
    """A price list of chat models: each field's value in US dollars per token."""
    path = directory / "list.json"
    path.write_bytes(msgspec.json.encode({name: {"mode": "chat", **fields} for name, fields in entries.items()}))
    return str(path)


def rates_of(ran: Ran) -> dict[str, int]:
    return ran.json()["terms"]["tiers"]["default"][0]["rates"]


class TestWronglyCalled:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("set",),
            ("set", "m"),
            ("set", "m", "--input", "cheap"),
            ("set", "m", "--input", "-1"),
            ("set", "m", "--input", "0.0000000001"),
            ("set", "m", "--input", "1e3"),
            ("set", "m", "--image", "0.0000000000000001"),
            ("set", "m", "--audio-second", "-0.1"),
            ("set", "m", "--input", "1", "--from", "tomorrow"),
            ("set", "m", "--input", "1", "--from", "2020-01-01"),
            ("import", "--all", "--models", "x"),
            ("import", "--file", "/no/such/file"),
            ("list", "--model"),
        ],
        ids=" ".join,
    )
    def test_exit_code_2_and_a_word_on_standard_error(self, arguments: tuple[str, ...]) -> None:
        ran = CliRunner().invoke(commands, ("prices", *arguments))
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert ran.stderr

    async def test_with_json_the_error_is_json_too(self, bare: Cli) -> None:
        ran = await bare("prices", "set", "m", "--input", "x", "--json")
        assert "nine decimals" in ran.json_error()

    async def test_a_file_that_is_no_list_exits_1(self, aap: Cli) -> None:
        path = aap.directory / "list.json"
        path.write_text("[]")
        ran = await aap("prices", "import", "--file", str(path), "--json")
        assert (ran.code, ran.out) == (1, "")
        assert "list.json" in ran.json_error()

    def test_every_dimension_can_be_priced(self) -> None:
        assert {*TOKEN_OPTIONS.values(), *EACH_OPTIONS.values()} == set(Rates.__struct_fields__)
        group = commands.get_command(click.Context(commands), "prices")
        assert isinstance(group, click.Group)
        offered = {option for param in group.commands["set"].params for option in param.opts}
        assert offered >= {*TOKEN_OPTIONS, *EACH_OPTIONS}


class TestSet:
    async def test_a_price_is_set_exactly_and_what_was_before_is_shown(self, aap: Cli) -> None:
        first = await aap("prices", "set", "demo", "--input", "0.1", "--output", "0.000000001", "--json")
        assert rates_of(first) == {"input_tokens": 100_000_000, "output_tokens": 1}
        told = first.json()
        assert (told["before"], told["organization_id"], told["is_in_catalog"]) == (None, None, True)
        second = await aap("prices", "set", "demo", "--input", "3", "--cached-input", "0.3", "--json")
        assert second.json()["before"]["id"] == told["id"]
        assert rates_of(second) == {"input_tokens": 3 * 10**9, "cached_input_tokens": 3 * 10**8}
        [listed] = (await aap("prices", "list", "--json")).json()
        assert (listed["id"], listed["model"], listed["source"]) == (second.json()["id"], "demo", "manual")
        assert {one["id"] for one in (await aap("prices", "list", "--all-versions", "--json")).json()} == {
            told["id"],
            listed["id"],
        }
        plain = await aap("prices", "set", "demo", "--input", "4.25")
        assert "input tokens" in plain.out
        assert "4.25" in plain.out
        assert "cached input tokens" in plain.out
        assert "catalog" not in plain.out

    async def test_pictures_and_seconds_are_priced_for_one(self, aap: Cli) -> None:
        ran = await aap("prices", "set", "m", "--image", "0.04", "--audio-second", "0.000000000000001", "--json")
        assert rates_of(ran) == {"images": 40_000_000 * 10**6, "audio_seconds": 1}
        listed = (await aap("prices", "list")).out
        assert "0.04" in listed
        assert "0.000000000000001" in listed

    async def test_an_organizations_own_price_is_its_own(self, aap: Cli) -> None:
        [acme] = (await aap("orgs", "create", "Acme", "--json")).json()
        [other] = (await aap("orgs", "create", "Other", "--json")).json()
        await aap("prices", "set", "m", "--input", "1")
        own = (await aap("prices", "set", "m", "--input", "2", "--org", acme["id"], "--json")).json()
        assert (own["before"], own["organization_id"]) == (None, acme["id"])
        assert [one["id"] for one in (await aap("prices", "list", "--org", acme["id"], "--json")).json()] == [own["id"]]
        assert (await aap("prices", "list", "--org", other["id"], "--json")).json() == []
        [public] = (await aap("prices", "list", "--json")).json()
        assert public["terms"]["tiers"]["default"][0]["rates"] == {"input_tokens": 10**9}
        ran = await aap("prices", "set", "m", "--input", "2", "--org", "org_nope")
        assert (ran.code, ran.out) == (1, "")
        assert "No such organization." in ran.err

    async def test_a_price_for_later_is_not_yet_in_force(self, aap: Cli) -> None:
        year = datetime.now(UTC).year + 1
        ran = await aap("prices", "set", "mystery", "--input", "1", "--from", f"{year}-02-01")
        assert f"from {year}-02-01 00:00 UTC" in ran.out
        assert "no model mystery in the catalog" in ran.out
        assert "There is no such price." in (await aap("prices", "list")).out
        [later] = (await aap("prices", "list", "--all-versions", "--json")).json()
        assert later["effective_from"] == f"{year}-02-01T00:00:00Z"
        zoned = await aap("prices", "set", "m", "--input", "1", "--from", f"{year}-02-01T12:00+02:00", "--json")
        assert zoned.json()["effective_from"] == f"{year}-02-01T10:00:00Z"


class TestImport:
    async def test_litellms_own_list_and_the_demo_model(self, aap: Cli) -> None:
        first = (await aap("prices", "import", "--json")).json()
        assert first["imported"] == len(first["changes"]) == first["models"] + 1 > 3_000
        assert first["held_back"] == first["vanished"] == []
        assert first["incomplete"]["perplexity/sonar-deep-research"] == ["citation_cost_per_token"]
        again = await aap("prices", "import", "--all")
        assert "No known price changes." in again.out
        assert " 0 imported." in again.out
        assert "perplexity/sonar-deep-research: citation_cost_per_token" in again.err
        [demo] = (await aap("prices", "list", "--model", "demo/*", "--json")).json()
        assert (demo["source"], demo["terms"]["tiers"]["default"][0]["rates"]["output_tokens"]) == (
            "builtin",
            6 * 10**8,
        )
        shown = (await aap("prices", "list", "--model", "gpt-4o")).out
        assert "priority" in shown
        assert "2.5" in shown

    async def test_a_rehearsal_writes_nothing(self, aap: Cli) -> None:
        path = price_list(aap.directory, m={"input_cost_per_token": 1e-06})
        for options in ((), ("--json",)):
            ran = await aap("prices", "import", "--file", path, "--diff", *options)
            assert ran.code == 0
            assert "m" in ran.out
        assert "would be imported" in (await aap("prices", "import", "--file", path, "--diff")).out
        assert (await aap("prices", "list", "--json")).json() == []

    async def test_a_change_of_more_than_half_waits_for_consent(self, aap: Cli) -> None:
        """Guarantee: a slip in a list does not become everybody's price unseen; what else changed is taken."""
        await aap("prices", "import", "--file", price_list(aap.directory, a=usd(2), b=usd(2), c=usd(2)))
        changed = price_list(aap.directory, a=usd(20), b=usd(3), c=usd(2), d=usd(9))
        rehearsed = await aap("prices", "import", "--file", changed, "--diff")
        assert rehearsed.code == 0
        assert "Changed by more than half" in rehearsed.err
        ran = await aap("prices", "import", "--file", changed, "--json")
        assert "--accept-changes" in ran.json_error()
        report = msgspec.json.decode(ran.out)
        assert (report["imported"], report["held_back"]) == (2, ["a"])
        assert await inputs(aap) == {"a": "2", "b": "3", "c": "2", "d": "9"}
        accepted = await aap("prices", "import", "--file", changed, "--accept-changes", "--json")
        assert accepted.json()["imported"] == 1
        assert (await inputs(aap))["a"] == "20"

    async def test_what_a_list_no_longer_has_keeps_its_price_and_is_named(self, aap: Cli) -> None:
        await aap("prices", "import", "--file", price_list(aap.directory, a=usd(1), b=usd(2)))
        ran = await aap("prices", "import", "--file", price_list(aap.directory, a=usd(1)))
        assert ran.code == 0
        assert "No longer in the list" in ran.err
        assert "  b\n" in ran.err
        assert (await inputs(aap))["b"] == "2"

    async def test_only_some_models(self, aap: Cli) -> None:
        path = price_list(aap.directory, **{"x/a": usd(1), "x/b": usd(1), "y/a": usd(1)})
        report = (await aap("prices", "import", "--file", path, "--models", "x/*", "--json")).json()
        assert [change["model"] for change in report["changes"]] == ["x/a", "x/b"]
        again = (await aap("prices", "import", "--file", path, "--models", "y/*", "--json")).json()
        assert ([change["model"] for change in again["changes"]], again["vanished"]) == (["y/a"], [])


class TestMissing:
    async def test_models_without_a_price_are_named(self, aap: Cli) -> None:
        assert (await aap("prices", "missing")).out.strip() == "Every call had a price."
        connection = await asyncpg.connect(aap.environ["DATABASE_URL"])
        await connection.execute(
            "INSERT INTO spend_windows (organization_id, seconds, starts_at, project_id, key_id, model, operation,"
            " service_tier, requests, unpriced_requests, cost_nano_usd, charge_nano_usd)"
            " VALUES ('org_1', 3600, '2026-03-01 12:00Z', 'p', 'k', 'mystery', 'chat', 'default', 5, 4, 0, 0)"
        )
        await connection.close()
        [missing] = (await aap("prices", "missing", "--json")).json()
        hour = "2026-03-01T12:00:00Z"
        assert missing == {"model": "mystery", "requests": 4, "first_hour": hour, "last_hour": hour}
        assert "mystery" in (await aap("prices", "missing")).out


@pytest.fixture
async def fresh(aap: Cli) -> str:
    """A database on which nobody has started yet."""
    connection = await asyncpg.connect(aap.environ["DATABASE_URL"])
    await connection.execute("DROP SCHEMA public CASCADE")
    await connection.execute("CREATE SCHEMA public")
    await connection.close()
    return aap.environ["DATABASE_URL"]


class TestFirstStart:
    PEPPER = Pepper(id="test", key=bytes(range(32)))

    async def listed(self, aap: Cli) -> dict[str, str]:
        return {one["model"]: one["source"] for one in (await aap("prices", "list", "--json")).json()}

    async def test_it_brings_the_installed_list_and_no_later_start_another(self, aap: Cli, fresh: str) -> None:
        """Guarantee: the first call is priced, and an upgrade, which brings a newer list, changes no price."""
        assert await prepare(fresh, self.PEPPER) is not None
        listed = await self.listed(aap)
        assert len(listed) > 3_000
        assert (listed["gpt-4o"], listed["demo/demo"]) == ("litellm", "builtin")
        assert (await aap("prices", "import", "--json")).json()["imported"] == 0
        connection = await asyncpg.connect(fresh)
        await connection.execute("ALTER TABLE prices DISABLE TRIGGER USER")
        await connection.execute("DELETE FROM prices WHERE model <> 'gpt-4o'")
        await connection.close()
        assert await prepare(fresh, self.PEPPER) is None
        assert await self.listed(aap) == {"gpt-4o": "litellm"}

    async def test_several_first_starts_at_once_bring_it_once(self, aap: Cli, fresh: str) -> None:
        keys = await asyncio.gather(*(prepare(fresh, self.PEPPER) for _ in range(3)))
        assert sum(key is not None for key in keys) == 1
        connection = await asyncpg.connect(fresh)
        twice = "SELECT count(*) FROM (SELECT FROM prices GROUP BY model HAVING count(*) > 1) AS twice"
        assert await connection.fetchval(twice) == 0
        await connection.close()

    async def test_without_litellm_the_built_in_model_has_its_price(
        self, aap: Cli, fresh: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "litellm", None)
        with capture_logs() as logs:
            await prepare(fresh, self.PEPPER, makes_tenant=False)
        assert await self.listed(aap) == {"demo/demo": "builtin"}
        assert [log["log_level"] for log in logs if "not installed" in str(log)] == ["warning"]


class TestDoctor:
    async def found(self, aap: Cli) -> tuple[str, str]:
        [found] = [one for one in (await aap("doctor", "--json")).json() if one["check"] == "prices"]
        return found["result"], found["detail"]

    async def test_it_misses_prices(self, aap: Cli) -> None:
        result, detail = await self.found(aap)
        assert (result, "aap prices import" in detail) == ("warning", True)
        await aap("prices", "set", "m", "--input", "1")
        assert await self.found(aap) == ("ok", "of 1 models")

    async def test_it_names_models_that_were_lately_used_without_one(self, aap: Cli) -> None:
        await aap("prices", "set", "m", "--input", "1")
        connection = await asyncpg.connect(aap.environ["DATABASE_URL"])
        for model, age in (("mystery", timedelta(hours=3)), ("long ago", timedelta(days=8))):
            await connection.execute(
                "INSERT INTO spend_windows (organization_id, seconds, starts_at, project_id, key_id, model, operation,"
                " service_tier, requests, unpriced_requests, cost_nano_usd, charge_nano_usd)"
                " VALUES ('org_1', 3600, now() - $2::interval, 'p', 'k', $1, 'chat', 'default', 5, 4, 0, 0)",
                model,
                age,
            )
        await connection.close()
        result, detail = await self.found(aap)
        assert (result, detail) == ("warning", "used without a price: mystery; see `aap prices missing`")


def usd(per_million: int) -> dict[str, float]:
    return {"input_cost_per_token": per_million / 1_000_000}


async def inputs(aap: Cli) -> dict[str, str]:
    """What a million input tokens cost, by model, without the built-in one."""
    listed = (await aap("prices", "list", "--json")).json()
    rates = {one["model"]: one["terms"]["tiers"]["default"][0]["rates"]["input_tokens"] for one in listed}
    return {model: str(rate // 10**9) for model, rate in rates.items() if model != "demo/demo"}
