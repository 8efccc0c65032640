"""Which models there are: aap.toml, the conventional variables, and the demo model when there is nothing."""

from __future__ import annotations

from typing import Any

import pytest

from core.configuration import ConfigurationInvalid
from inference.catalog import OPENAI_BASE_URL, Catalog, build

PROVIDER = {"kind": "openai", "base_url": "http://127.0.0.1:1/v1", "api_key": "env:KEY"}
SECRET = "sk-very-secret"


def tables(*deployments: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {"providers": {"p": PROVIDER}, "models": {"m": {"deployments": list(deployments), **model}}}


def problems(found: dict[str, Any], environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigurationInvalid) as caught:
        build(found, {"KEY": SECRET} if environ is None else environ)
    assert SECRET not in str(caught.value)
    return caught.value.problems


def built(found: dict[str, Any], **environ: str) -> Catalog:
    return build(found, {"KEY": SECRET, **environ})


class TestDefaults:
    def test_with_nothing_the_labelled_demo_model_answers(self) -> None:
        catalog = build({}, {})
        [model] = catalog
        assert (model.name, model.owned_by, model.deployments[0].provider.settings.kind) == ("demo", "demo", "demo")

    def test_an_openai_key_in_the_environment_is_enough(self) -> None:
        catalog = build({}, {"OPENAI_API_KEY": SECRET})
        provider = catalog.providers["openai"]
        assert (provider.api_key, provider.settings.base_url) == (SECRET, OPENAI_BASE_URL)
        assert catalog.find("gpt-4o") is not None
        assert catalog.find("demo") is None
        assert {model.deployments[0].provider.name for model in catalog} == {"openai"}

    def test_its_address_can_be_another(self) -> None:
        catalog = build({}, {"OPENAI_API_KEY": SECRET, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})
        assert catalog.providers["openai"].settings.base_url == "http://127.0.0.1:9/v1"
        assert problems({}, {"OPENAI_API_KEY": SECRET, "OPENAI_BASE_URL": "nonsense"})[0].startswith("providers.openai")

    def test_what_the_file_says_comes_first(self) -> None:
        own = {"kind": "openai", "base_url": "http://127.0.0.1:2/v1"}
        catalog = build({"providers": {"openai": own}}, {"OPENAI_API_KEY": SECRET})
        assert (catalog.providers["openai"].settings.base_url, catalog.providers["openai"].api_key) == (
            own["base_url"],
            None,
        )
        listed = build(tables({"provider": "p", "model": "x"}), {"OPENAI_API_KEY": SECRET, "KEY": "k"})
        assert list(listed.models) == ["m"]


class TestModels:
    def test_aliases_lead_to_their_model_and_are_not_listed(self) -> None:
        catalog = built(tables({"provider": "p", "model": "x"}, aliases=["a", "b"]))
        assert catalog.find("a") is catalog.find("b") is catalog.find("m")
        assert [model.name for model in catalog] == ["m"]
        assert catalog.find("M") is None

    def test_a_deployment_has_its_weight_its_deadlines_and_a_stable_id(self) -> None:
        found = tables({"provider": "p", "model": "x", "weight": 3}, {"provider": "p", "model": "y"})
        found["providers"]["p"] = {**PROVIDER, "deadlines": {"first_byte_seconds": 7}}
        first, second = built(found).models["m"].deployments
        assert (first.id, first.weight, second.id, second.weight) == ("p/x", 3, "p/y", 1)
        assert (first.deadlines.first_byte_seconds, first.deadlines.connect_seconds) == (7, 5)
        assert built(found).models["m"].deployments[0].id == first.id

    @pytest.mark.parametrize("other", [{"aliases": ["m"]}, {"aliases": ["n"]}, {"aliases": ["x", "x"]}])
    def test_a_name_means_one_thing(self, other: dict[str, Any]) -> None:
        found = tables({"provider": "p", "model": "x"}, aliases=["x"])
        found["models"]["n"] = {"deployments": [{"provider": "p", "model": "x"}], **other}
        assert any("is already a name" in problem for problem in problems(found))

    def test_secrets_are_resolved_and_never_printed(self) -> None:
        catalog = built(tables({"provider": "p", "model": "x"}))
        provider = catalog.providers["p"]
        assert provider.api_key == SECRET
        deployment = catalog.models["m"].deployments[0]
        inline = build({"providers": {"q": {**PROVIDER, "api_key": SECRET, "headers": {"x": SECRET}}}}, {}).providers[
            "q"
        ]
        assert SECRET not in repr(
            (provider, provider.settings, deployment, catalog.models["m"], inline, inline.settings)
        )

    def test_headers_and_options_may_be_references(self) -> None:
        table = {**PROVIDER, "headers": {"x-team": "env:TEAM"}, "options": {"api_version": "env:VERSION", "n": 1}}
        provider = build({"providers": {"q": table}}, {"KEY": SECRET, "TEAM": "a", "VERSION": "v1"}).providers["q"]
        assert provider.settings.headers == {"x-team": "a"}
        assert provider.settings.options == {"api_version": "v1", "n": 1}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"providers": {"p": {**PROVIDER, "base_url": None}}}, "providers.p"),
        ({"providers": {"p": {"kind": "openai"}}}, "needs a base_url"),
        ({"providers": {"p": {**PROVIDER, "base_url": "ftp://x"}}}, "http://"),
        ({"providers": {"p": {**PROVIDER, "api_key": "env:NONE"}}}, "NONE is not set"),
        ({"providers": {"p": {**PROVIDER, "api_key": "a\nb"}}}, "no header can carry"),
        ({"providers": {"p": {**PROVIDER, "headers": {"a b": "x"}}}}, "not an HTTP token"),
        ({"providers": {"p": {**PROVIDER, "headers": {"Host": "x"}}}}, "the HTTP client's own"),
        ({"providers": {"p": {**PROVIDER, "headers": {"Content-Type": "x"}}}}, "content-type"),
        ({"providers": {"p": {**PROVIDER, "headers": {"x": "a\r\nb: c"}}}}, "no header can carry"),
        ({"providers": {"p": {**PROVIDER, "headers": {"x": "env:NONE"}}}}, "NONE is not set"),
        ({"providers": {"p": {**PROVIDER, "options": {"x": "env:NONE"}}}}, "NONE is not set"),
        ({"providers": {"p": {**PROVIDER, "deadlines": {"idle_seconds": 0}}}}, "providers.p"),
        ({"providers": {"p": {**PROVIDER, "deadlines": {"total_seconds": float("nan")}}}}, "providers.p"),
        ({"providers": {"p": {**PROVIDER, "deadlines": {"connect_seconds": float("inf")}}}}, "providers.p"),
        (
            {"models": {"m": {"deployments": [{"provider": "p", "model": "x"}], "output_tokens_max": 0}}},
            "models.m",
        ),
        ({"providers": []}, "providers: expected tables"),
        ({"models": {"m": 1}}, "models.m"),
        ({"models": {"m": {"deployments": []}}}, "at least one deployment"),
        ({"models": {"m": {"deployments": [{"provider": "pp", "model": "x"}]}}}, "did you mean p?"),
        ({"models": {"m": {"deployments": [{"provider": "p", "model": "x", "weight": -1}]}}}, "weight -1"),
        ({"models": {"m": {"deployments": [{"provider": "p", "model": "x", "weight": 10_001}]}}}, "weight 10001"),
        ({"models": {"m": {"deployments": [{"provider": "p", "model": "x", "wieght": 1}]}}}, "wieght"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], expected: str) -> None:
    assert expected in "\n".join(problems({**tables({"provider": "p", "model": "x"}), **change}))
