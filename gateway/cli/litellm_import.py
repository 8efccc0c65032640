"""From a LiteLLM proxy's `config.yaml` to our tables. What has no counterpart is named, never dropped silently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import tomli_w
import yaml

from inference.catalog import OPENAI_BASE_URL

_OPENAI_LIKE: Final = frozenset({"openai", "openai_like", "custom_openai", "hosted_vllm", "text-completion-openai"})
_PROVIDER_PARAMS: Final = ("model", "api_key", "api_base")
_LIMITS: Final = {"rpm": "requests_per_minute", "tpm": "tokens_per_minute"}
_ENVIRONMENT: Final = "os.environ/"


class Report(msgspec.Struct, frozen=True):
    """What came of it: the file, the variables it refers to, and what could not be taken over."""

    toml: str
    models: int
    variables: list[str]
    ignored: list[str]


class _Tables(msgspec.Struct):
    providers: dict[str, dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    limits: dict[str, dict[str, Any]] = {}
    variables: list[str] = []
    ignored: list[str] = []
    # The secrets that stood in the file, and the variables that stand for them now. Never written anywhere.
    secrets: dict[str, str] = {}
    # Variables that the file itself names anywhere: none of them is free to stand for another secret.
    named: set[str] = set()


def read_litellm(path: Path) -> dict[str, Any]:
    """Return the file's content. Errors: ValueError when it is not YAML with a `model_list`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        raise ValueError("it is not valid YAML") from None
    if not isinstance(content, dict) or not isinstance(cast("dict[str, Any]", content).get("model_list"), list):
        raise ValueError("it has no model_list")  # noqa: TRY004 - the file's fault, not a caller's
    return cast("dict[str, Any]", content)


def convert(config: dict[str, Any]) -> Report:
    """Return our tables for a LiteLLM configuration."""
    tables = _Tables({}, {}, {}, [], [], {}, _named_variables(config["model_list"]))
    for at, entry in enumerate(config["model_list"]):
        _take_model(tables, at, entry)
    tables.ignored += [f"{section} (whole)" for section in config if section != "model_list"]
    whole: dict[str, Any] = {"providers": tables.providers, "models": tables.models}
    if tables.limits:
        whole["limits"] = {"model": tables.limits}
    return Report(tomli_w.dumps(whole), len(tables.models), sorted(set(tables.variables)), tables.ignored)


def _named_variables(model_list: list[Any]) -> set[str]:
    values = (value for entry in model_list for value in _table(_table(entry).get("litellm_params")).values())
    return {value.removeprefix(_ENVIRONMENT) for value in values if str(value).startswith(_ENVIRONMENT)}


def _take_model(tables: _Tables, at: int, entry: Any) -> None:
    item = _table(entry)
    params = _table(item.get("litellm_params"))
    name, model = item.get("model_name"), params.get("model")
    if not isinstance(name, str) or not isinstance(model, str) or "*" in name:
        tables.ignored.append(f"model_list[{at}]: needs a model_name without wildcards and litellm_params.model")
        return
    kind, separator, upstream_model = model.partition("/")
    if not separator:
        kind, upstream_model = "openai", model
    deployment: dict[str, Any] = {"provider": _provider(tables, kind, params), "model": upstream_model}
    taken: set[str] = set(_PROVIDER_PARAMS)
    if _is_count(params.get("weight")):
        deployment["weight"] = params["weight"]
        taken.add("weight")
    tables.models.setdefault(name, {"deployments": []})["deployments"].append(deployment)
    limits = {ours: params[theirs] for theirs, ours in _LIMITS.items() if _is_count(params.get(theirs))}
    if limits:
        tables.limits[name] = limits
        taken |= {theirs for theirs in _LIMITS if _is_count(params.get(theirs))}
    if isinstance(params.get("timeout"), int | float):
        taken.add("timeout")
    tables.ignored += [f"{name}: litellm_params.{param}" for param in params if param not in taken]
    tables.ignored += [f"{name}: {field}" for field in item if field not in {"model_name", "litellm_params"}]


def _provider(tables: _Tables, kind: str, params: dict[str, Any]) -> str:
    """Return the name of the provider with these settings, adding it if it is new."""
    settings: dict[str, Any] = {"kind": "openai" if kind in _OPENAI_LIKE else "litellm"}
    if settings["kind"] == "litellm":
        settings["litellm_provider"] = kind
    base_url = params.get("api_base") or (OPENAI_BASE_URL if settings["kind"] == "openai" else None)
    if base_url:
        settings["base_url"] = _reference(tables, str(base_url))
    if params.get("api_key"):
        settings["api_key"] = _secret(tables, str(params["api_key"]), kind)
    if isinstance(params.get("timeout"), int | float):
        settings["deadlines"] = {"first_byte_seconds": float(params["timeout"])}
    for name, known in tables.providers.items():
        if known == settings:
            return name
    name = kind if kind not in tables.providers else f"{kind}-{len(tables.providers) + 1}"
    tables.providers[name] = settings
    return name


def _reference(tables: _Tables, text: str) -> str:
    """Return a reference to an environment variable in our spelling; any other text as it is."""
    if not text.startswith(_ENVIRONMENT):
        return text
    variable = text.removeprefix(_ENVIRONMENT)
    tables.variables.append(variable)
    return f"env:{variable}"


def _secret(tables: _Tables, text: str, kind: str) -> str:
    """Return a reference for a secret. One that stands in the file gets a variable of its own, and is not copied."""
    if text.startswith(_ENVIRONMENT):
        return _reference(tables, text)
    if text not in tables.secrets:
        base = re.sub(r"[^A-Z0-9]", "_", f"{kind}_API_KEY".upper())
        taken = tables.named | set(tables.secrets.values())
        numbered = (base if number == 1 else f"{base}_{number}" for number in range(1, len(taken) + 2))
        tables.secrets[text] = next(variable for variable in numbered if variable not in taken)
    tables.variables.append(tables.secrets[text])
    return f"env:{tables.secrets[text]}"


def _table(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
