"""`aap` as an operator runs it: a process of its own, against real stores."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest
from click.testing import CliRunner

from core.database import Database
from core.migrations import upgrade
from gateway.catalog_file import parse
from gateway.cli import aap as commands
from gateway.cli.litellm_import import Report, convert, read_litellm
from keys.secrets import hint, is_well_formed
from tests.harness.gateway import ROOT, free_port
from tests.harness.stores import TestStores, with_database


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return msgspec.json.decode(self.out)


class Cli:
    """Runs commands with the environment of one installation."""

    def __init__(self, directory: Path, environ: dict[str, str]) -> None:
        self.directory = directory
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AAP_", "OPENAI_"))},
            "PYTHONPATH": str(ROOT),
            "AAP_DATA_DIR": str(directory / "data"),
            "AAP_CONFIG": str(directory / "aap.toml"),
            **environ,
        }

    async def __call__(self, *arguments: str, python: tuple[str, ...] = (), **environ: str) -> Ran:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *python, "-c", "from gateway.cli import main; main()", *arguments),
            cwd=self.directory,
            env={**self.environ, **environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert "Traceback" not in err.decode()
        return Ran(process.returncode or 0, out.decode(), err.decode())


@pytest.fixture
async def aap(stores: TestStores, tmp_path: Path, worker_id: str) -> AsyncIterator[Cli]:
    """An installation whose database nobody else writes to."""
    name = f"cli_{worker_id}"
    connection = await asyncpg.connect(stores.database_url)
    await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    await connection.execute(f'CREATE DATABASE "{name}"')
    url = with_database(stores.database_url, name)
    database = Database(url, connections_max=1)
    await upgrade(database)
    await database.close()
    yield Cli(tmp_path, {**stores.environ(), "DATABASE_URL": url})
    await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await connection.close()


@pytest.fixture
def bare(tmp_path: Path) -> Cli:
    """No stores at all."""
    return Cli(tmp_path, {})


class TestHelp:
    async def test_it_names_every_command_and_imports_none_of_the_heavy_parts(self, bare: Cli) -> None:
        ran = await bare("--help", python=("-X", "importtime"))
        assert ran.code == 0
        for command in (
            "serve",
            "worker",
            "migrate",
            "doctor",
            "keys",
            "orgs",
            "projects",
            "limits",
            "models",
            "import",
            "version",
        ):
            assert command in ran.out
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.err.splitlines() if "|" in line}
        assert "rich_click" in imported
        assert imported & {"sqlalchemy", "litestar", "litellm", "httptools", "asyncpg", "redis", "alembic"} == set()

    @pytest.mark.parametrize(
        "command", [("keys",), ("keys", "create"), ("limits", "set"), ("import", "litellm"), ("serve",)]
    )
    def test_every_command_explains_itself(self, command: tuple[str, ...]) -> None:
        ran = CliRunner().invoke(commands, [*command, "--help"])
        assert ran.exit_code == 0
        assert "Usage" in ran.stdout

    async def test_the_version_with_and_without_json(self, bare: Cli) -> None:
        plain = (await bare("version")).out.strip()
        assert re.fullmatch(r"\d+\.\d+\.\d+", plain)
        assert (await bare("version", "--json")).json()["version"] == plain


class TestWronglyCalled:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("nonsense",),
            ("keys", "nonsense"),
            ("keys", "create"),
            ("keys", "create", "x", "--scope", "everything"),
            ("keys", "create", "x", "--expires-in-days", "0"),
            ("keys", "rotate", "key_1", "--grace-hours", "-1"),
            ("limits", "set", "everybody"),
            ("limits", "set", "organization", "--requests-per-minute", "0"),
            ("limits", "set", "organization", "--tokens-per-day", "a lot"),
            ("orgs", "create", "x", "--disconnect-policy", "maybe"),
            ("import", "litellm", "/no/such/file"),
        ],
        ids=" ".join,
    )
    def test_exit_code_2_and_a_word_on_standard_error(self, arguments: tuple[str, ...]) -> None:
        ran = CliRunner().invoke(commands, arguments)
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert ran.stderr

    async def test_settings_that_are_wrong_are_all_named_and_exit_1(self, bare: Cli) -> None:
        ran = await bare("orgs", "list", AAP_PORT="x", DATABASE_URL="mysql://u:hunter2@x")
        assert ran.code == 1
        assert "AAP_PORT" in ran.err
        assert "DATABASE_URL" in ran.err
        assert "hunter2" not in ran.err

    async def test_stores_that_are_not_there_exit_1_and_show_no_password(self, bare: Cli, stores: TestStores) -> None:
        down = {**stores.environ(), "DATABASE_URL": f"postgresql://u:hunter2@127.0.0.1:{free_port()}/x"}
        ran = await bare("orgs", "list", **down)
        assert ran.code == 1
        assert "aap doctor" in ran.err
        assert "hunter2" not in ran.err
        missing = {**stores.environ(), "DATABASE_URL": with_database(stores.database_url, "no_such_database")}
        assert (await bare("orgs", "list", **missing)).code == 1


class TestTenantsAndKeys:
    async def test_an_operators_first_day(self, aap: Cli) -> None:
        assert (await aap("orgs", "list")).out.strip() == "There is no organization yet."
        assert (await aap("keys", "create", "first")).code == 1
        [organization] = (await aap("orgs", "create", "Acme", "--disconnect-policy", "abort", "--json")).json()
        assert (organization["name"], organization["disconnect_policy"]) == ("Acme", "abort")
        assert "There is no project yet." in (await aap("projects", "list")).out
        [project] = (await aap("projects", "create", "Search", "--json")).json()
        assert project["organization_id"] == organization["id"]
        key = (await aap("keys", "create", "first", "--json")).json()
        assert is_well_formed(key["secret"])
        listed = await aap("keys", "list")
        assert key["id"] in listed.out
        assert hint(key["secret"]) in listed.out
        assert key["secret"] not in listed.out
        assert "Acme" in (await aap("orgs", "list")).out
        assert "Search" in (await aap("projects", "list")).out

    async def test_a_key_through_its_life(self, aap: Cli) -> None:
        await aap("orgs", "create", "Acme")
        await aap("projects", "create", "Search")
        options = ("--scope", "chat:write", "--model", "m", "--ip", "192.0.2.0/24", "--expires-in-days", "3")
        made = await aap("keys", "create", "k", *options)
        found = re.search(r"id +(key_\w+)\nsecret +(sk-aap-\w+)", made.out)
        assert found
        key_id, secret = found.groups()
        [listed] = (await aap("keys", "list", "--json")).json()
        assert (listed["id"], listed["scopes"], listed["models"], listed["ip_networks"]) == (
            key_id,
            ["chat:write"],
            ["m"],
            ["192.0.2.0/24"],
        )
        rotated = (await aap("keys", "rotate", key_id, "--grace-hours", "0", "--json")).json()
        assert rotated["id"] == key_id
        assert rotated["secret"] != secret
        revoked = (await aap("keys", "revoke", key_id, "--json")).json()
        assert (revoked["id"], revoked["revoked"]) == (key_id, True)
        assert revoked["propagation"]["missing"] == []
        assert (await aap("keys", "revoke", key_id)).out.startswith(f"Revoked {key_id}; ")
        assert (await aap("keys", "rotate", key_id)).code == 1
        [listed] = (await aap("keys", "list", "--json")).json()
        assert listed["disabled_at"] is not None

    async def test_what_does_not_exist_exits_1_and_says_what(self, aap: Cli) -> None:
        await aap("orgs", "create", "A")
        await aap("orgs", "create", "B")
        for arguments, named in (
            (("keys", "rotate", "key_nope"), "No such key."),
            (("keys", "revoke", "key_nope"), "No such key."),
            (("keys", "create", "x", "--org", "org_nope"), "No such project."),
            (("keys", "create", "x", "--ip", "nonsense"), "nonsense"),
            (("projects", "create", "x", "--org", "org_nope"), "No such organization."),
            (("keys", "list"), "several"),
            (("limits", "set", "key"), "name the key"),
        ):
            ran = await aap(*arguments)
            assert (ran.code, ran.out) == (1, ""), arguments
            assert named in ran.err

    async def test_a_revocation_that_nobody_could_be_told_of_exits_1_and_holds(self, aap: Cli) -> None:
        await aap("orgs", "create", "A")
        await aap("projects", "create", "P")
        key = (await aap("keys", "create", "k", "--json")).json()
        ran = await aap("keys", "revoke", key["id"], REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
        assert ran.code == 1
        assert "redis" in ran.err
        assert (await aap("keys", "list", "--json")).json()[0]["disabled_at"] is not None

    async def test_a_schema_that_is_behind_is_named_and_migrate_mends_it(self, aap: Cli) -> None:
        connection = await asyncpg.connect(aap.environ["DATABASE_URL"])
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        await connection.close()
        ran = await aap("orgs", "list")
        assert ran.code == 1
        assert "aap migrate" in ran.err
        revision = (await aap("migrate", "--json")).json()["revision"]
        assert revision in (await aap("migrate")).out
        assert (await aap("orgs", "list")).code == 0


class TestLimits:
    async def test_they_are_set_replaced_and_shown_beside_the_defaults(self, aap: Cli) -> None:
        (aap.directory / "aap.toml").write_text(
            "[limits.key]\ntokens_per_day = 77\n[limits.model.demo]\nrequests_per_day = 9\n"
        )
        [organization] = (await aap("orgs", "create", "A", "--json")).json()
        await aap("limits", "set", "organization", "--requests-per-minute", "5", "--tokens-per-day", "9")
        row = (await aap("limits", "set", "organization", "--requests-per-minute", "6", "--json")).json()
        assert (row["id"], row["requests_per_minute"], row["tokens_per_day"]) == (organization["id"], 6, None)
        await aap("limits", "set", "model", "m", "--concurrent-requests", "3")
        shown = {(row["scope"], row["id"]): row for row in (await aap("limits", "show", "--json")).json()}
        assert shown["organization", organization["id"]]["requests_per_minute"] == 6
        assert shown["model", "m"]["concurrent_requests"] == 3
        assert shown["default key", "*"]["tokens_per_day"] == 77
        assert shown["default model", "demo"]["requests_per_day"] == 9
        assert "77" in (await aap("limits", "show")).out

    @pytest.mark.parametrize("target", [("project", "proj_nope"), ("key", "key_nope"), ("organization", "org_nope")])
    async def test_a_limit_for_nobody_is_refused(self, aap: Cli, target: tuple[str, str]) -> None:
        """Guarantee: a mistyped id does not look like a limit that holds."""
        await aap("orgs", "create", "A")
        ran = await aap("limits", "set", *target, "--requests-per-minute", "5")
        assert ran.code == 1
        assert "No such" in ran.err


class TestModelsAndDoctor:
    async def test_the_catalog_is_listed_and_a_faulty_file_exits_1(self, bare: Cli) -> None:
        assert [row["model"] for row in (await bare("models", "--json")).json()] == ["demo"]
        assert "gpt-4o" in (await bare("models", OPENAI_API_KEY="sk-x")).out
        (bare.directory / "aap.toml").write_text("[modles.x]")
        ran = await bare("models")
        assert ran.code == 1
        assert "did you mean models?" in ran.err

    async def test_a_healthy_installation(self, aap: Cli) -> None:
        findings = {found["check"]: found for found in (await aap("doctor", "--json")).json()}
        for check in ("postgresql", "schema", "redis", "configuration", "clock (postgresql)"):
            assert findings[check]["result"] in {"ok", "warning"}
        assert "up to date" in (await aap("doctor")).out

    async def test_what_is_down_is_named_and_exits_1(self, aap: Cli) -> None:
        port = free_port()
        provider = f'[providers.p]\nkind = "openai"\nbase_url = "http://127.0.0.1:{port}/v1"\n[models.m]\ndeployments = [{{ provider = "p", model = "x" }}]\n'
        (aap.directory / "aap.toml").write_text(provider)
        ran = await aap("doctor", REDIS_URL=f"redis://:hunter2@127.0.0.1:{port}/0")
        assert ran.code == 1
        assert re.search(r"^failed +redis", ran.out, re.MULTILINE)
        assert re.search(r"^failed +provider p", ran.out, re.MULTILINE)
        assert re.search(r"^ok +postgresql", ran.out, re.MULTILINE)
        assert "hunter2" not in ran.out + ran.err

    async def test_a_new_pepper_is_one_that_is_taken(self, bare: Cli) -> None:
        first, second = (
            (await bare("doctor", "--new-pepper")).out.strip(),
            (await bare("doctor", "--new-pepper")).out.strip(),
        )
        assert first.partition(":")[2] != second.partition(":")[2]
        assert (await bare("models", AAP_KEY_PEPPERS=first)).code == 0


def converted(*entries: object, **more: object) -> Report:
    return convert({"model_list": list(entries), **more})


def entry(model: str, name: str = "m", **params: object) -> dict[str, object]:
    return {"model_name": name, "litellm_params": {"model": model, **params}}


class TestImportLitellm:
    def test_what_comes_out_is_taken_by_the_gateway(self) -> None:
        report = converted(
            entry("gpt-4o", "gpt", api_key="os.environ/OPENAI_KEY", rpm=10, tpm=1_000, weight=2),
            entry(
                "azure/deployed", "gpt", api_base="http://127.0.0.1:1/v1", api_key="os.environ/AZURE_KEY", timeout=30
            ),
            entry("openrouter/anthropic/claude", "claude", api_key="os.environ/ROUTER_KEY"),
        )
        assert (report.models, report.ignored) == (2, [])
        assert report.variables == ["AZURE_KEY", "OPENAI_KEY", "ROUTER_KEY"]
        catalog, limits = parse(tomllib.loads(report.toml), dict.fromkeys(report.variables, "x"))
        first, second = catalog.models["gpt"].deployments
        assert (first.model, first.weight, first.provider.settings.kind) == ("gpt-4o", 2, "openai")
        assert (second.model, second.deadlines.first_byte_seconds) == ("deployed", 30)
        assert second.provider.settings.litellm_provider == "azure"
        [claude] = catalog.models["claude"].deployments
        assert (claude.model, claude.provider.settings.litellm_provider) == ("anthropic/claude", "openrouter")
        assert limits.model["gpt"].requests_per_minute == 10

    def test_a_secret_in_the_file_becomes_a_reference(self) -> None:
        report = converted(entry("openai/gpt", api_key="sk-inline"))
        assert "sk-inline" not in report.toml + str(report)
        assert 'api_key = "env:' in report.toml
        assert len(report.variables) == 1

    def test_two_secrets_stay_two(self) -> None:
        """Guarantee: no deployment ends up on another one's account."""
        report = converted(
            entry("openai/a", api_key="sk-1"), entry("openai/b", api_key="sk-2"), entry("openai/c", api_key="sk-1")
        )
        assert len(report.variables) == 2
        catalog, _ = parse(tomllib.loads(report.toml), {name: name for name in report.variables})
        a, b, c = (deployment.provider for deployment in catalog.models["m"].deployments)
        assert a.api_key == c.api_key != b.api_key

    def test_a_variable_that_the_file_names_is_not_taken_for_an_inline_secret(self) -> None:
        report = converted(entry("openai/a", api_key="sk-1"), entry("openai/b", api_key="os.environ/OPENAI_API_KEY"))
        catalog, _ = parse(tomllib.loads(report.toml), {name: name for name in report.variables})
        a, b = (deployment.provider.api_key for deployment in catalog.models["m"].deployments)
        assert a != b == "OPENAI_API_KEY"

    @pytest.mark.parametrize(
        ("odd", "named"),
        [
            (entry("openai/a", organization="x"), "organization"),
            (entry("openai/a", weight=0.5), "weight"),
            (entry("openai/a", rpm="10"), "rpm"),
            (entry("openai/a", tpm="lots"), "tpm"),
            (entry("openai/a", timeout="30s"), "timeout"),
            ({**entry("openai/a"), "model_info": {"id": "x"}}, "model_info"),
            (entry("openai/*", "*"), "model_list[0]"),
            ({"model_name": "m"}, "model_list[0]"),
            ({"model_name": "m", "litellm_params": [1]}, "model_list[0]"),
            ("nonsense", "model_list[0]"),
        ],
    )
    def test_what_cannot_be_taken_over_is_named(self, odd: object, named: str) -> None:
        assert any(named in line for line in converted(odd).ignored)

    def test_whole_sections_are_named(self) -> None:
        assert converted(router_settings={}, general_settings={}).ignored == [
            "router_settings (whole)",
            "general_settings (whole)",
        ]

    @pytest.mark.parametrize("text", ["", "a: [", "[]", "model_list: 5", "1"])
    def test_what_is_no_configuration(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match="it "):
            read_litellm(tmp_path / "config.yaml")

    async def test_the_command_writes_once_and_replaces_only_when_told(self, bare: Cli) -> None:
        source = bare.directory / "config.yaml"
        source.write_text(
            "model_list:\n- model_name: m\n  litellm_params: {model: openai/gpt, api_key: sk-inline, foo: 1}\nrouter_settings: {}\n"
        )
        shown = await bare("import", "litellm", str(source))
        assert shown.code == 0
        assert tomllib.loads(shown.out)["models"]["m"]
        assert "router_settings" in shown.err
        assert "litellm_params.foo" in shown.err
        target = str(bare.directory / "out.toml")
        assert (await bare("import", "litellm", str(source), "--output", target)).code == 0
        again = await bare("import", "litellm", str(source), "--output", target)
        assert again.code == 1
        assert "--force" in again.err
        report = (await bare("import", "litellm", str(source), "--output", target, "--force", "--json")).json()
        assert report["models"] == 1
        assert "sk-inline" not in str(report) + Path(target).read_text()
        source.write_text("nonsense")
        assert (await bare("import", "litellm", str(source))).code == 1
