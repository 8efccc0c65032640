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
_TAKEN: Final = frozenset({"model", "api_key", "api_base", "weight", "timeout", "rpm", "tpm"})
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
    tables = _Tables({}, {}, {}, [], [])
    for at, entry in enumerate(config["model_list"]):
        _take_model(tables, at, entry)
    tables.ignored += [f"{section} (whole)" for section in config if section != "model_list"]
    whole: dict[str, Any] = {"providers": tables.providers, "models": tables.models}
    if tables.limits:
        whole["limits"] = {"model": tables.limits}
    return Report(tomli_w.dumps(whole), len(tables.models), sorted(set(tables.variables)), tables.ignored)


def _take_model(tables: _Tables, at: int, entry: Any) -> None:
    if not isinstance(entry, dict):
        tables.ignored.append(f"model_list[{at}]: not a table")
        return
    item = cast("dict[str, Any]", entry)
    params = cast("dict[str, Any]", item.get("litellm_params") or {})
    name, model = item.get("model_name"), params.get("model")
    if not isinstance(name, str) or not isinstance(model, str) or "*" in name:
        tables.ignored.append(f"model_list[{at}]: needs a model_name without wildcards and litellm_params.model")
        return
    kind, _, upstream_model = model.rpartition("/") if "/" in model else ("openai", "", model)
    kind = kind.partition("/")[0] if "/" in kind else kind
    upstream_model = model.partition("/")[2] if "/" in model else model
    provider = _provider(tables, kind, params)
    deployment = {"provider": provider, "model": upstream_model}
    if isinstance(params.get("weight"), int):
        deployment["weight"] = params["weight"]
    tables.models.setdefault(name, {"deployments": []})["deployments"].append(deployment)
    limits = {ours: params[theirs] for theirs, ours in _LIMITS.items() if isinstance(params.get(theirs), int)}
    if limits:
        tables.limits[name] = limits
    tables.ignored += [f"{name}: litellm_params.{param}" for param in params if param not in _TAKEN]


_LIMITS: Final = {"rpm": "requests_per_minute", "tpm": "tokens_per_minute"}


def _provider(tables: _Tables, kind: str, params: dict[str, Any]) -> str:
    """Return the name of the provider with these settings, adding it if it is new."""
    settings: dict[str, Any] = {"kind": "openai" if kind in _OPENAI_LIKE else "litellm"}
    if settings["kind"] == "litellm":
        settings["litellm_provider"] = kind
    base_url = params.get("api_base") or (OPENAI_BASE_URL if settings["kind"] == "openai" else None)
    if base_url:
        settings["base_url"] = _reference(tables, base_url, f"{kind}_BASE_URL")
    if params.get("api_key"):
        settings["api_key"] = _reference(tables, params["api_key"], f"{kind}_API_KEY", is_secret=True)
    if isinstance(params.get("timeout"), int | float):
        settings["deadlines"] = {"first_byte_seconds": float(params["timeout"])}
    for name, known in tables.providers.items():
        if known == settings:
            return name
    name = kind if kind not in tables.providers else f"{kind}-{len(tables.providers) + 1}"
    tables.providers[name] = settings
    return name


def _reference(tables: _Tables, value: Any, fallback: str, *, is_secret: bool = False) -> str:
    text = str(value)
    if text.startswith(_ENVIRONMENT):
        variable = text.removeprefix(_ENVIRONMENT)
    elif is_secret:
        variable = re.sub(r"[^A-Z0-9]", "_", fallback.upper())
    else:
        return text
    tables.variables.append(variable)
    return f"env:{variable}"
