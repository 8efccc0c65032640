"""`aap` as an operator runs it: a process of its own, against real stores."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import click
import msgspec
import pytest
from click.testing import CliRunner

from gateway.cli import aap as commands
from keys import limits
from keys.dimensions import DIMENSIONS, LIMIT_MAX
from keys.secrets import hint, is_well_formed, mint
from tests.harness.eventually import eventually
from tests.harness.gateway import ROOT, free_port
from tests.harness.stores import TestStores, new_database, with_database


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return msgspec.json.decode(self.out)

    def json_error(self) -> str:
        """The message on standard error, which must hold this one object and nothing else."""
        assert self.code in {1, 2}, self.out
        told = msgspec.json.decode(self.err)
        assert told.keys() == {"error"}
        assert told["error"].keys() == {"message"}
        return told["error"]["message"]


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

    async def __call__(
        self, *arguments: str, python: tuple[str, ...] = (), stdin: str | None = None, **environ: str
    ) -> Ran:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *python, "-c", "from gateway.cli import main; main()", *arguments),
            cwd=self.directory,
            env={**self.environ, **environ},
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(stdin.encode() if stdin is not None else None), 60)
        assert "Traceback" not in err.decode()
        return Ran(process.returncode or 0, out.decode(), err.decode())


@pytest.fixture
async def aap(stores: TestStores, tmp_path: Path, worker_id: str, template: str) -> AsyncIterator[Cli]:
    """An installation whose database nobody else writes to."""
    async with new_database(stores.database_url, f"cli_{worker_id}", template) as url:
        yield Cli(tmp_path, {**stores.environ(), "DATABASE_URL": url})


@pytest.fixture
def bare(tmp_path: Path) -> Cli:
    """No stores at all."""
    return Cli(tmp_path, {})


def every_command(
    group: click.Group = commands, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


HEAVY = {"alembic", "asyncio", "asyncpg", "httptools", "litellm", "litestar", "redis", "rich.table", "sqlalchemy"} | {
    "structlog",
    "uvloop",
    "yaml",
    "core.database",
    "inference.catalog",
}


class TestHelp:
    @pytest.mark.parametrize("path", [path for path, _ in every_command()], ids=" ".join)
    async def test_it_imports_none_of_the_heavy_parts(self, bare: Cli, path: tuple[str, ...]) -> None:
        """Guarantee: every --help is quick, since what a command does is imported when it is run."""
        ran = await bare(*path, "--help", python=("-X", "importtime"))
        assert ran.code == 0
        assert "Usage" in ran.out
        imported = {line.rpartition("|")[2].strip() for line in ran.err.splitlines() if "|" in line}
        assert "click" in imported
        # The list of commands is drawn as one.
        assert imported & HEAVY <= (set() if path else {"rich.table"})

    async def test_it_names_every_command(self, bare: Cli) -> None:
        out = (await bare("--help")).out
        for path, _ in every_command():
            assert not path or path[0] in out

    def test_every_command_takes_json(self) -> None:
        for path, command in every_command():
            assert isinstance(command, click.Group) or any("--json" in param.opts for param in command.params), path

    def test_the_limits_are_those_of_the_gateway(self) -> None:
        """Guarantee: `limits set` offers every limit that the gateway knows, in the range that its script is exact for."""
        command = dict(every_command())[("limits", "set")]
        options = {param.name: param.type for param in command.params if isinstance(param.type, click.IntRange)}
        assert tuple(options) == limits.RateLimits.__struct_fields__ == DIMENSIONS
        assert {(kind.min, kind.max) for kind in options.values() if isinstance(kind, click.IntRange)} == {
            (1, LIMIT_MAX)
        }

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
            ("limits", "set", "key"),
            ("limits", "set", "organization"),
            ("limits", "set", "organization", "--clear", "everything"),
            ("limits", "set", "organization", "--clear", "tokens-per-day", "--tokens-per-day", "5"),
            ("keys", "find"),
            ("keys", "find", "no_key"),
            ("keys", "find", "sk-aap-0000", "sk-aap-1111"),
            ("orgs", "create", "x", "--disconnect-policy", "maybe"),
            ("import", "litellm", "/no/such/file"),
        ],
        ids=" ".join,
    )
    def test_exit_code_2_and_a_word_on_standard_error(self, arguments: tuple[str, ...]) -> None:
        ran = CliRunner().invoke(commands, arguments)
        assert (ran.exit_code, ran.stdout) == (2, "")
        assert ran.stderr

    @pytest.mark.parametrize(
        ("arguments", "code", "named"),
        [
            (("nonsense", "--json"), 2, "nonsense"),
            (("--json",), 2, "--json"),
            (("keys", "create", "--json"), 2, "NAME"),
            (("limits", "set", "--json", "organization", "--tokens-per-day", "a lot"), 2, "a lot"),
            (("keys", "find", "no_key", "--json"), 2, "no key"),
            (("orgs", "list", "--json"), 1, "AAP_PORT"),
            (("serve", "--json"), 1, "AAP_PORT"),
            (("worker", "--json"), 1, "AAP_PORT"),
            (("migrate", "--json"), 1, "AAP_PORT"),
            (("doctor", "--json"), 1, "AAP_PORT"),
            (("models", "--json"), 1, "AAP_PORT"),
            (("import", "litellm", "/no/such/file", "--json"), 2, "/no/such/file"),
        ],
    )
    async def test_with_json_the_error_is_json_too(
        self, bare: Cli, arguments: tuple[str, ...], code: int, named: str
    ) -> None:
        ran = await bare(*arguments, AAP_PORT="x")
        assert (ran.code, ran.out) == (code, "")
        assert named in ran.json_error()

    async def test_what_follows_two_dashes_is_no_option(self, bare: Cli) -> None:
        ran = await bare("orgs", "create", "a", "--", "--json")
        assert ran.code == 2
        assert "Usage" in ran.err

    async def test_help_stays_help(self, bare: Cli) -> None:
        ran = await bare("keys", "list", "--help", "--json")
        assert (ran.code, ran.err) == (0, "")
        assert "Usage" in ran.out

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
            (("keys", "create", "x", "--org", "org_nope"), "No such organization."),
            (("keys", "list", "--org", "org_nope"), "No such organization."),
            (("keys", "find", "sk-aap-0000", "--org", "org_nope"), "No such organization."),
            (("projects", "list", "--org", "org_nope"), "No such organization."),
            (("limits", "show", "--org", "org_nope"), "No such organization."),
            (("keys", "create", "x", "--ip", "nonsense"), "nonsense"),
            (("projects", "create", "x", "--org", "org_nope"), "No such organization."),
            (("keys", "list"), "several"),
        ):
            ran = await aap(*arguments)
            assert (ran.code, ran.out) == (1, ""), arguments
            assert named in ran.err

    async def test_what_a_found_text_stands_for(self, aap: Cli) -> None:
        await aap("orgs", "create", "A")
        await aap("projects", "create", "P")
        first, second = [(await aap("keys", "create", name, "--json")).json() for name in ("one", "two")]
        await aap("keys", "rotate", first["id"], "--grace-hours", "1")
        secret = first["secret"]
        for text in (secret, secret.removeprefix("sk-aap-"), f" {secret}\n"):
            [found] = (await aap("keys", "find", text, "--json")).json()
            assert (found["id"], found["name"], found["matched"]) == (first["id"], "one", "whole key")
            assert found["secret_ends_at"] is not None
        mistyped = secret[:30] + ("a" if secret[30] != "a" else "b") + secret[31:]
        for text in (secret[:11], secret[:17], secret[7:17], hint(secret), hint(secret).replace("...", "…"), mistyped):
            [found] = (await aap("keys", "find", text, "--json")).json()
            assert (found["id"], found["matched"]) == (first["id"], "shown part")
        piped = await aap("keys", "find", "-", stdin=second["secret"] + "\n")
        assert second["id"] in piped.out
        assert second["secret"] not in piped.out + piped.err

    async def test_several_that_are_shown_alike_are_listed_and_a_whole_key_is_one(self, aap: Cli) -> None:
        made: list[dict[str, str]] = []
        for name in ("A", "B"):
            [organization] = (await aap("orgs", "create", name, "--json")).json()
            await aap("projects", "create", "P", "--org", organization["id"])
            made.append((await aap("keys", "create", "k", "--org", organization["id"], "--json")).json() | organization)
        connection = await asyncpg.connect(aap.environ["DATABASE_URL"])
        # What one in 62^8 would meet by chance.
        await connection.execute("UPDATE api_key_secrets SET hint = $1", hint(made[0]["secret"]))
        await connection.close()
        alike = (await aap("keys", "find", hint(made[0]["secret"]), "--json")).json()
        assert {found["organization_id"] for found in alike} == {one["id"] for one in made}
        [mine] = (await aap("keys", "find", hint(made[0]["secret"]), "--org", made[1]["id"], "--json")).json()
        assert mine["organization_id"] == made[1]["id"]
        [exact] = (await aap("keys", "find", made[0]["secret"], "--json")).json()
        assert (exact["organization_id"], exact["matched"]) == (made[0]["id"], "whole key")

    async def test_a_text_that_is_looked_for_is_never_repeated(self, aap: Cli) -> None:
        await aap("orgs", "create", "A")
        unknown = mint().text
        for arguments in ((unknown,), (unknown, unknown), (unknown + "_",), (f"-{unknown}",)):
            for more in ((), ("--json",)):
                ran = await aap("keys", "find", *arguments, *more)
                assert ran.code == (1 if arguments == (unknown,) else 2)
                assert unknown[7:] not in ran.out + ran.err
        assert "No such key." in (await aap("keys", "find", unknown)).err

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
    async def test_they_are_set_and_shown_beside_the_defaults(self, aap: Cli) -> None:
        (aap.directory / "aap.toml").write_text(
            "[limits.key]\ntokens_per_day = 77\n[limits.model.demo]\nrequests_per_day = 9\n"
        )
        [organization] = (await aap("orgs", "create", "A", "--json")).json()
        await aap("limits", "set", "organization", "--requests-per-minute", "6")
        await aap("limits", "set", "model", "m", "--concurrent-requests", "3")
        shown = {(row["scope"], row["id"]): row for row in (await aap("limits", "show", "--json")).json()}
        assert shown["organization", organization["id"]]["requests_per_minute"] == 6
        assert shown["model", "m"]["concurrent_requests"] == 3
        assert shown["default key", "*"]["tokens_per_day"] == 77
        assert shown["default model", "demo"]["requests_per_day"] == 9
        assert "77" in (await aap("limits", "show")).out

    async def test_only_what_is_named_changes(self, aap: Cli) -> None:
        [organization] = (await aap("orgs", "create", "A", "--json")).json()

        async def change(*options: str) -> dict[str, int]:
            """The limits that hold afterwards, as the command tells them and as they are shown."""
            told = (await aap("limits", "set", "organization", *options, "--json")).json()
            shown = [row for row in (await aap("limits", "show", "--json")).json() if row["scope"] == "organization"]
            assert shown == ([told] if any(told[name] for name in DIMENSIONS) else [])
            assert told["id"] == organization["id"]
            return {name: told[name] for name in DIMENSIONS if told[name] is not None}

        assert await change("--requests-per-minute", "5", "--tokens-per-day", "9", "--concurrent-requests", "2") == {
            "requests_per_minute": 5,
            "tokens_per_day": 9,
            "concurrent_requests": 2,
        }
        assert await change("--requests-per-minute", "6", "--clear", "concurrent-requests") == {
            "requests_per_minute": 6,
            "tokens_per_day": 9,
        }
        assert await change("--clear", "tokens-per-day", "--clear", "requests-per-day") == {"requests_per_minute": 6}
        assert await change("--clear", "all", "--tokens-per-minute", "7") == {"tokens_per_minute": 7}
        assert await change("--clear", "all") == {}
        plain = await aap("limits", "set", "organization", "--tokens-per-day", "123456")
        assert "123456" in plain.out
        assert "default of aap.toml" in plain.out

    async def test_a_key_and_an_organization_say_whose_limits_they_are(self, aap: Cli) -> None:
        await aap("orgs", "create", "A")
        [second] = (await aap("orgs", "create", "B", "--json")).json()
        await aap("projects", "create", "P", "--org", second["id"])
        key = (await aap("keys", "create", "k", "--org", second["id"], "--json")).json()
        assert (await aap("limits", "set", "key", key["id"], "--tokens-per-day", "5")).code == 0
        assert (await aap("limits", "set", "organization", second["id"], "--tokens-per-day", "6")).code == 0
        shown = (await aap("limits", "show", "--org", second["id"], "--json")).json()
        assert {row["id"]: row["tokens_per_day"] for row in shown if row["id"] != "*"} == {
            key["id"]: 5,
            second["id"]: 6,
        }

    async def test_two_who_change_one_scope_at_once_both_have_their_way(self, aap: Cli) -> None:
        """Guarantee: what another sets between our reading and our writing is kept."""
        [organization] = (await aap("orgs", "create", "A", "--json")).json()
        await aap("limits", "set", "organization", "--requests-per-minute", "5")
        other = await asyncpg.connect(aap.environ["DATABASE_URL"])
        async with other.transaction():
            await other.execute("SELECT FROM organizations WHERE id = $1 FOR NO KEY UPDATE", organization["id"])
            ours = asyncio.create_task(aap("limits", "set", "organization", "--requests-per-day", "7", "--json"))
            waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND transactionid = pg_current_xact_id()::xid"
            await eventually(lambda: other.fetchval(waiting), 20)
            await other.execute("UPDATE rate_limits SET requests_per_minute = 6")
        await other.close()
        row = (await ours).json()
        assert (row["requests_per_minute"], row["requests_per_day"]) == (6, 7)

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
        ran = await aap("doctor", "--json", REDIS_URL=f"redis://:hunter2@127.0.0.1:{port}/0")
        assert ran.json_error() == "failed: redis, provider p"
        assert {found["result"] for found in msgspec.json.decode(ran.out)} >= {"ok", "failed"}

    async def test_a_new_pepper_is_one_that_is_taken(self, bare: Cli) -> None:
        first, second = (
            (await bare("doctor", "--new-pepper")).out.strip(),
            (await bare("doctor", "--new-pepper")).out.strip(),
        )
        assert first.partition(":")[2] != second.partition(":")[2]
        assert (await bare("models", AAP_KEY_PEPPERS=first)).code == 0
        third = (await bare("doctor", "--new-pepper", "--json")).json()["pepper"]
        assert (await bare("models", AAP_KEY_PEPPERS=third)).code == 0
