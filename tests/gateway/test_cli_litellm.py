"""`aap import litellm`: what comes out of another gateway's configuration, and that ours takes it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from gateway.catalog_file import Parsed, parse
from gateway.cli import aap as commands
from gateway.cli.litellm_import import Report, convert, read_litellm


def converted(*entries: object, **more: object) -> Report:
    return convert({"model_list": list(entries), **more})


def entry(model: str, name: str = "m", **params: object) -> dict[str, object]:
    return {"model_name": name, "litellm_params": {"model": model, **params}}


def loaded(report: Report) -> Parsed:
    """What the gateway makes of it, with each variable set to its own name."""
    return parse(tomllib.loads(report.toml), {name: name for name in report.variables})


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
        catalog, limits, *_ = parse(tomllib.loads(report.toml), dict.fromkeys(report.variables, "x"))
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
        catalog = parse(tomllib.loads(report.toml), {name: name for name in report.variables}).catalog
        a, b, c = (deployment.provider for deployment in catalog.models["m"].deployments)
        assert a.api_key == c.api_key != b.api_key

    def test_a_variable_that_the_file_names_is_not_taken_for_an_inline_secret(self) -> None:
        report = converted(entry("openai/a", api_key="sk-1"), entry("openai/b", api_key="os.environ/OPENAI_API_KEY"))
        catalog = parse(tomllib.loads(report.toml), {name: name for name in report.variables}).catalog
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

    def test_what_the_deployments_of_a_model_allow_is_added_up(self) -> None:
        report = converted(
            entry("openai/a", rpm=10, tpm=100, api_key="os.environ/A"),
            entry("openai/b", rpm=20, api_key="os.environ/B"),
            entry("openai/c", "other", rpm=1),
        )
        limits = loaded(report).limits
        assert (limits.model["m"].requests_per_minute, limits.model["m"].tokens_per_minute) == (30, 100)
        assert limits.model["other"].requests_per_minute == 1
        assert report.notes == ["m: only 1 of its 2 deployments have tpm; tokens_per_minute is what these allow"]

    def test_what_no_limit_can_be_is_named_and_a_sum_stays_one(self) -> None:
        report = converted(entry("openai/a", rpm=10**11), entry("openai/b", rpm=5), entry("openai/c", rpm=10**12))
        assert loaded(report)[1].model["m"].requests_per_minute == 10**11
        assert report.ignored == ["m: litellm_params.rpm"]

    def test_where_and_as_whom_a_provider_is_reached(self) -> None:
        report = converted(
            entry(
                "bedrock/claude",
                aws_region_name="eu-west-1",
                aws_access_key_id="os.environ/AWS_ID",
                aws_secret_access_key="in-the-clear",
                region_name="os.environ/REGION",
            ),
            entry("azure/gpt", api_version="2024-10-21", api_base="http://127.0.0.1:1", azure_ad_token="also-clear"),
            entry("vertex_ai/gemini", vertex_project="p", vertex_credentials={"private_key": "clear-too"}),
        )
        assert "clear" not in report.toml + str(report)
        assert report.ignored == []
        variables = ["AWS_ID", "AWS_SECRET_ACCESS_KEY", "AZURE_AD_TOKEN", "REGION", "VERTEX_CREDENTIALS"]
        assert report.variables == variables
        bedrock, azure, vertex = (
            deployment.provider.settings.options for deployment in loaded(report)[0].models["m"].deployments
        )
        assert bedrock == {
            "aws_region_name": "eu-west-1",
            "aws_access_key_id": "AWS_ID",
            "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
            "region_name": "REGION",
        }
        assert azure == {"api_version": "2024-10-21", "azure_ad_token": "AZURE_AD_TOKEN"}
        assert vertex == {"vertex_project": "p", "vertex_credentials": "VERTEX_CREDENTIALS"}

    def test_two_accounts_of_one_kind_are_two_providers(self) -> None:
        report = converted(
            entry("bedrock/a", aws_secret_access_key="one"), entry("bedrock/b", aws_secret_access_key="two")
        )
        first, second = (d.provider.settings.options for d in loaded(report)[0].models["m"].deployments)
        assert first != second

    def test_options_that_our_own_client_has_no_use_for_are_named(self) -> None:
        report = converted(entry("openai/gpt", api_version="x", api_base="http://127.0.0.1:1/v1"))
        assert report.ignored == ["m: litellm_params.api_version"]
        assert loaded(report)[0].models["m"]

    @pytest.mark.parametrize("base", [{}, {"api_base": None}, {"api_base": "https://api.openai.com/v1/"}])
    def test_without_a_key_openais_own_is_the_one_that_litellm_takes(self, base: dict[str, object]) -> None:
        report = converted(entry("gpt-4o", **base))
        assert report.variables == ["OPENAI_API_KEY"]
        assert loaded(report)[0].models["m"].deployments[0].provider.api_key == "OPENAI_API_KEY"

    @pytest.mark.parametrize("base", ["http://127.0.0.1:1/v1", "https://api.openai.com.evil.test/v1"])
    def test_it_is_sent_to_nobody_else(self, base: str) -> None:
        report = converted(entry("openai/gpt", api_base=base))
        assert report.variables == []
        assert loaded(report)[0].models["m"].deployments[0].provider.api_key is None

    def test_a_secret_in_the_file_does_not_take_the_name_of_openais_key(self) -> None:
        """Guarantee: a key that stands in the file and the one in the environment stay two accounts."""
        report = converted(entry("openai/a", api_key="sk-1"), entry("openai/b"))
        a, b = (deployment.provider.api_key for deployment in loaded(report)[0].models["m"].deployments)
        assert a != b == "OPENAI_API_KEY"

    def test_what_the_gateway_would_refuse_is_said(self) -> None:
        [note] = converted(entry("openai/gpt", api_key="os.environ/K", api_base="127.0.0.1:1")).notes
        assert "providers.openai" in note

    def test_the_command_writes_once_and_replaces_only_when_told(self, tmp_path: Path) -> None:
        source, target = tmp_path / "config.yaml", tmp_path / "out.toml"
        source.write_text(
            "model_list:\n"
            "- model_name: m\n"
            "  litellm_params: {model: openai/gpt, api_key: sk-inline, rpm: 5, foo: 1}\n"
            "- {model_name: m, litellm_params: {model: gpt-5}}\n"
            "router_settings: {}\n"
        )
        shown = imported(source)
        assert shown.exit_code == 0
        assert tomllib.loads(shown.stdout)["models"]["m"]
        for named in ("router_settings", "litellm_params.foo", "OPENAI_API_KEY", "only 1 of its 2 deployments"):
            assert named in shown.stderr
        assert imported(source, "--output", str(target)).exit_code == 0
        again = imported(source, "--output", str(target))
        assert again.exit_code == 1
        assert "--force" in again.stderr
        report = msgspec.json.decode(imported(source, "--output", str(target), "--force", "--json").stdout)
        assert report["models"] == 1
        assert "sk-inline" not in str(report) + target.read_text()
        source.write_text("nonsense")
        assert imported(source).exit_code == 1


def imported(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, ["import", "litellm", *map(str, arguments)])
