"""aap.toml: read, watched, and never half taken over."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.configuration import ConfigurationFile, ConfigurationInvalid, resolve_secret, unknown_names
from gateway.catalog_file import CatalogFile, parse
from gateway.plan_file import PlanFile
from keys.dimensions import LIMIT_MAX
from keys.limits import DEFAULT_ORGANIZATION_LIMITS, RateLimits

GOOD = """
[providers.p]
kind = "openai"
base_url = "http://127.0.0.1:1/v1"
[models.{model}]
deployments = [{{ provider = "p", model = "x" }}]
[limits.organization]
requests_per_minute = {limit}
"""


def write(path: Path, text: str) -> None:
    """Replace the file, as editors do: its stamp differs also within one tick of the file system's clock."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def times_taken_over(catalog_file: CatalogFile, looks: int = 4) -> int:
    """How often a change is seen: a file is read once it looks the same twice."""
    return sum(catalog_file.reload_if_changed() for _ in range(looks))


class TestReload:
    def test_a_changed_file_is_taken_over_whole_and_once(self, tmp_path: Path) -> None:
        path = tmp_path / "aap.toml"
        write(path, GOOD.format(model="one", limit=5))
        catalog_file = CatalogFile(path, {})
        assert times_taken_over(catalog_file) == 0
        write(path, GOOD.format(model="two", limit=6))
        assert times_taken_over(catalog_file) == 1
        assert list(catalog_file.catalog.models) == ["two"]
        assert catalog_file.limits.organization.requests_per_minute == 6

    def test_plans_are_taken_over_with_the_rest_or_not_at_all(self, tmp_path: Path) -> None:
        path, good = tmp_path / "aap.toml", GOOD.format(model="one", limit=5)
        write(path, good + "[plans.p.limits]\nagents = 1\n")
        catalog_file = CatalogFile(path, {})
        for more, taken, agents in (
            ("[plans.p.limits]\nagents = 2\n", 1, 2),
            ("[plans.p.limits]\nagent = 3\n", 0, 2),
            ("", 1, None),
        ):
            write(path, good + more)
            assert times_taken_over(catalog_file) == taken
            limits = catalog_file.plans.limits_of("p")
            assert (limits.agents if limits else None) == agents

    def test_a_worker_reads_plans_and_needs_no_providers_secret(self, tmp_path: Path) -> None:
        path, good = tmp_path / "aap.toml", '[providers.p]\nkind = "openai"\napi_key = "env:NOT_HERE"\n[plans.one]\n'
        write(path, good)
        plan_file = PlanFile(path)
        assert list(plan_file.plans().by_name) == ["one"]
        for text, names in (
            (good + "[plans.two]", ["one", "two"]),
            ("[plans.Three]", ["one", "two"]),
            ("[", ["one", "two"]),
        ):
            write(path, text)
            assert [list(plan_file.plans().by_name) for _ in range(4)][-1] == names
        assert list(PlanFile(path).plans()) == []

    def test_a_file_that_is_still_being_written_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "aap.toml"
        write(path, GOOD.format(model="one", limit=5))
        catalog_file = CatalogFile(path, {})
        assert times_taken_over(catalog_file) == 0
        for size in range(5):
            write(path, "#" * size)
            assert not catalog_file.reload_if_changed()
        write(path, GOOD.format(model="two", limit=6))
        assert times_taken_over(catalog_file) == 1
        assert list(catalog_file.catalog.models) == ["two"]

    @pytest.mark.parametrize(
        "faulty",
        [
            "not toml",
            "[models]\nx = 1",
            GOOD.format(model="two", limit=0),
            GOOD.format(model="two", limit=6) + "[limts]",
            GOOD.format(model="two", limit=6).replace('"p", model', '"q", model'),
            GOOD.format(model="two", limit=6).replace("deployments", "deployment"),
        ],
    )
    def test_a_faulty_file_leaves_everything_as_it_was_and_is_named_once(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], faulty: str
    ) -> None:
        path = tmp_path / "aap.toml"
        write(path, GOOD.format(model="one", limit=5))
        catalog_file = CatalogFile(path, {})
        catalog, limits = catalog_file.catalog, catalog_file.limits
        write(path, faulty)
        assert times_taken_over(catalog_file) == 0
        assert (catalog_file.catalog, catalog_file.limits) == (catalog, limits)
        assert capsys.readouterr().out.count("configuration.refused") == 1
        write(path, GOOD.format(model="two", limit=6))
        assert times_taken_over(catalog_file) == 1
        assert list(catalog_file.catalog.models) == ["two"]

    def test_a_secret_that_the_file_refers_to_is_watched_too(self, tmp_path: Path) -> None:
        """Guarantee: rotating a provider's key in its file takes effect like editing aap.toml."""
        secret = tmp_path / "key"
        secret.write_text("sk-1")
        path = tmp_path / "aap.toml"
        path.write_text(
            f'[providers.p]\nkind = "openai"\nbase_url = "https://p.test/v1"\napi_key = "file:{secret}"\n'
            '[models.m]\ndeployments = [{ provider = "p", model = "m" }]\n'
        )
        watched = CatalogFile(path, {})
        assert watched.catalog.providers["p"].api_key == "sk-1"
        assert not watched.reload_if_changed()
        secret.write_text("sk-22")
        assert [watched.reload_if_changed() for _ in range(3)] == [False, True, False]
        assert watched.catalog.providers["p"].api_key == "sk-22"

    def test_a_file_that_comes_is_a_change_and_one_that_goes_is_not(self, tmp_path: Path) -> None:
        path = tmp_path / "aap.toml"
        catalog_file = CatalogFile(path, {})
        assert list(catalog_file.catalog.models) == ["demo"]
        write(path, GOOD.format(model="one", limit=5))
        assert times_taken_over(catalog_file) == 1
        path.unlink()
        assert times_taken_over(catalog_file) == 0
        assert list(catalog_file.catalog.models) == ["one"]

    def test_a_first_file_that_is_faulty_is_an_error(self, tmp_path: Path) -> None:
        write(tmp_path / "aap.toml", "[")
        with pytest.raises(ConfigurationInvalid, match=r"aap\.toml"):
            CatalogFile(tmp_path / "aap.toml", {})

    def test_a_file_that_is_not_text_or_a_directory_is_a_problem_not_a_crash(self, tmp_path: Path) -> None:
        path = tmp_path / "aap.toml"
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigurationInvalid):
            ConfigurationFile(path).read()
        with pytest.raises(ConfigurationInvalid):
            ConfigurationFile(tmp_path).read()


class TestProblems:
    def test_all_parts_are_reported_together_with_the_nearest_name(self) -> None:
        with pytest.raises(ConfigurationInvalid) as caught:
            parse(
                {
                    "provider": {},
                    "providers": {
                        "a": {"kind": "openai", "base_ulr": "x"},
                        "b": {"kind": "opnai"},
                        "c": {"kind": "openai"},
                    },
                    "models": {"m": {"deploymnets": []}},
                    "limits": {"key": {"requests_per_minute": 0, "tokens_per_day": LIMIT_MAX + 1}},
                    "plans": {"p": {"titles": "P", "limits": {"tokens_per_month": -1}}},
                    "billing": {"default_plan": "q"},
                },
                {},
            )
        text = str(caught.value)
        for expected in (
            "provider: unknown, did you mean providers?",
            "providers.a.base_ulr: unknown, did you mean base_url?",
            "providers.b",
            "providers.c",
            "models.m.deploymnets: unknown, did you mean deployments?",
            "limits.key.requests_per_minute: expected a whole number from 1",
            "limits.key.tokens_per_day",
            "plans.p.titles: unknown, did you mean title?",
            "plans.p.limits.tokens_per_month: expected a whole number from 0",
            "billing.default_plan: q: unknown",
        ):
            assert expected in text

    def test_a_limit_on_a_model_that_is_not_there_is_a_problem(self) -> None:
        with pytest.raises(ConfigurationInvalid, match=r"limits\.model\.dmeo: unknown, did you mean demo\?"):
            parse({"limits": {"model": {"dmeo": {"requests_per_minute": 5}}}}, {})

    def test_a_name_like_nothing_gets_no_suggestion(self) -> None:
        assert unknown_names(["zzz", "known"], ["known"], "at.") == ["at.zzz: unknown"]

    def test_limits_left_out_are_the_defaults(self) -> None:
        limits = parse({}, {}).limits
        assert limits.organization == DEFAULT_ORGANIZATION_LIMITS
        assert limits.key == limits.project == RateLimits()


class TestSecrets:
    def test_a_reference_is_followed_and_all_else_is_itself(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("from-file\n")
        environ = {"NAME": "from-env"}
        assert resolve_secret("env:NAME", environ) == "from-env"
        assert resolve_secret(f"file:{tmp_path}/key", environ) == "from-file"
        for plain in ("sk-1", "https://x", "", "env", "enviro:NAME"):
            assert resolve_secret(plain, environ) == plain

    @pytest.mark.parametrize(
        ("reference", "named"),
        [("env:MISSING", "MISSING"), ("env:EMPTY", "EMPTY"), ("file:/no/such", "/no/such"), ("file:/", "/")],
    )
    def test_a_reference_to_nothing_is_named(self, reference: str, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            resolve_secret(reference, {"EMPTY": ""})
