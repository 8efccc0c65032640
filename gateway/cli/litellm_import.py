"""From a LiteLLM proxy's `config.yaml` to our tables. What has no counterpart is named, never dropped silently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import tomli_w
import yaml

from core.configuration import ConfigurationInvalid
from gateway.catalog_file import parse
from inference.catalog import OPENAI_BASE_URL
from keys.dimensions import LIMIT_MAX

_OPENAI_LIKE: Final = frozenset({"openai", "openai_like", "custom_openai", "hosted_vllm", "text-completion-openai"})
_OPENAI: Final = frozenset({"openai", "text-completion-openai"})
_OPENAIS_OWN: Final = re.compile(r"https://(?:[a-z]+\.)?api\.openai\.com(?:[:/]|$)")
_OPENAIS_KEY: Final = "OPENAI_API_KEY"
_PROVIDER_PARAMS: Final = ("model", "api_key", "api_base")
# Where and as whom litellm reaches a provider, and those of them that must not stand in a file.
_OPTION: Final = re.compile(r"api_version|region_name|(?:aws|azure|vertex)_\w+")
_SECRET_OPTION: Final = re.compile(r"credential|key|password|secret|token")
_LIMITS: Final = {"rpm": "requests_per_minute", "tpm": "tokens_per_minute"}
_WEIGHT_MAX: Final = 10_000
_TIMEOUT_SECONDS_MAX: Final = 86_400
_ENVIRONMENT: Final = "os.environ/"


class Report(msgspec.Struct, frozen=True):
    """What came of it: the file, the variables it refers to, what to look at, and what could not be taken over."""

    toml: str
    models: int
    variables: list[str]
    notes: list[str]
    ignored: list[str]


class _Tables(msgspec.Struct):
    providers: dict[str, dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    # Model → our limit → what each of its deployments says of it.
    limits: dict[str, dict[str, list[int]]] = {}
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
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError("it is not valid YAML") from None
    if not isinstance(content, dict) or not isinstance(cast("dict[str, Any]", content).get("model_list"), list):
        raise ValueError("it has no model_list")  # noqa: TRY004 - the file's fault, not a caller's
    return cast("dict[str, Any]", content)


def convert(config: dict[str, Any]) -> Report:
    """Return our tables for a LiteLLM configuration."""
    tables = _Tables(named=_named_variables(config["model_list"]))
    for at, entry in enumerate(config["model_list"]):
        _take_model(tables, at, entry)
    tables.ignored += [f"{section} (whole)" for section in config if section != "model_list"]
    whole: dict[str, Any] = {"providers": tables.providers, "models": tables.models}
    limits, notes = _summed_limits(tables)
    if limits:
        whole["limits"] = {"model": limits}
    variables = sorted(set(tables.variables))
    notes += [f"to be mended, or the gateway refuses the file: {problem}" for problem in _problems(whole, variables)]
    return Report(tomli_w.dumps(whole), len(tables.models), variables, notes, tables.ignored)


def _named_variables(model_list: list[Any]) -> set[str]:
    named: set[str] = set()
    for entry in model_list:
        params = _params(entry)
        named |= {value.removeprefix(_ENVIRONMENT) for value in params.values() if _is_reference(value)}
        if _has_openais_key_by_default(params):
            named.add(_OPENAIS_KEY)
    return named


def _take_model(tables: _Tables, at: int, entry: Any) -> None:
    name, params = _table(entry).get("model_name"), _params(entry)
    if not isinstance(name, str) or not isinstance(params.get("model"), str) or "*" in name:
        tables.ignored.append(f"model_list[{at}]: needs a model_name without wildcards and litellm_params.model")
        return
    kind, upstream_model = _kind_and_model(params)
    settings = _provider_settings(tables, kind, params)
    deployment: dict[str, Any] = {"provider": _provider(tables, kind, settings), "model": upstream_model}
    taken = {*_PROVIDER_PARAMS, *settings.get("options", {})}
    if "deadlines" in settings:
        taken.add("timeout")
    if _is_count(params.get("weight"), _WEIGHT_MAX):
        deployment["weight"] = params["weight"]
        taken.add("weight")
    tables.models.setdefault(name, {"deployments": []})["deployments"].append(deployment)
    for theirs, ours in _LIMITS.items():
        if _is_count(params.get(theirs), LIMIT_MAX):
            tables.limits.setdefault(name, {}).setdefault(ours, []).append(params[theirs])
            taken.add(theirs)
    tables.ignored += [f"{name}: litellm_params.{param}" for param in params if param not in taken]
    tables.ignored += [f"{name}: {field}" for field in entry if field not in {"model_name", "litellm_params"}]


def _provider_settings(tables: _Tables, kind: str, params: dict[str, Any]) -> dict[str, Any]:
    is_openai_like = kind in _OPENAI_LIKE
    settings: dict[str, Any] = {"kind": "openai"} if is_openai_like else {"kind": "litellm", "litellm_provider": kind}
    base_url = params.get("api_base")
    if not base_url and is_openai_like:
        # Of a server of one's own litellm reads the address from a variable that is named after the kind.
        base_url = OPENAI_BASE_URL if kind in _OPENAI else f"{_ENVIRONMENT}{kind.upper()}_API_BASE"
    if base_url:
        settings["base_url"] = _reference(tables, str(base_url))
    if "api_key" in params:
        settings["api_key"] = _secret(tables, str(params["api_key"]), f"{kind}_API_KEY")
    elif _has_openais_key_by_default(params):
        settings["api_key"] = _reference(tables, _ENVIRONMENT + _OPENAIS_KEY)
    # Our own client, which speaks to what is like OpenAI, knows no such options: there they count as not taken over.
    options = {} if is_openai_like else _options(tables, params)
    if options:
        settings["options"] = options
    timeout = params.get("timeout")
    if isinstance(timeout, int | float) and 0 < timeout <= _TIMEOUT_SECONDS_MAX:
        settings["deadlines"] = {"first_byte_seconds": float(timeout)}
    return settings


def _provider(tables: _Tables, kind: str, settings: dict[str, Any]) -> str:
    """Return the name of the provider with these settings, adding it if it is new."""
    for name, known in tables.providers.items():
        if known == settings:
            return name
    name = kind if kind not in tables.providers else f"{kind}-{len(tables.providers) + 1}"
    tables.providers[name] = settings
    return name


def _options(tables: _Tables, params: dict[str, Any]) -> dict[str, str | float]:
    found: dict[str, str | float] = {}
    for name, value in params.items():
        if not _OPTION.fullmatch(name):
            continue
        if _SECRET_OPTION.search(name):
            # Google's credentials are a table; litellm takes its text as well.
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            found[name] = _secret(tables, text, name)
        elif isinstance(value, str):
            found[name] = _reference(tables, value)
        elif isinstance(value, int | float):
            found[name] = value
    return found


def _summed_limits(tables: _Tables) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return each model's limits, and what to know of them: what its deployments allow, they allow together."""
    notes: list[str] = []
    for name, given in tables.limits.items():
        count = len(tables.models[name]["deployments"])
        notes += [
            f"{name}: only {len(given[ours])} of its {count} deployments have {theirs}; {ours} is what these allow"
            for theirs, ours in _LIMITS.items()
            if 0 < len(given.get(ours, ())) < count
        ]
    limits = {
        name: {ours: min(sum(values), LIMIT_MAX) for ours, values in given.items()}
        for name, given in tables.limits.items()
    }
    return limits, notes


def _problems(whole: dict[str, Any], variables: list[str]) -> list[str]:
    """Return why the gateway would refuse the tables, whatever is in the variables."""
    try:
        # Some of them stand for addresses, all others for any text.
        parse(whole, dict.fromkeys(variables, "http://placeholder.invalid/v1"))
    except ConfigurationInvalid as error:
        return error.problems
    return []


def _reference(tables: _Tables, text: str) -> str:
    """Return a reference to an environment variable in our spelling; any other text as it is."""
    if not _is_reference(text):
        return text
    variable = text.removeprefix(_ENVIRONMENT)
    tables.variables.append(variable)
    return f"env:{variable}"


def _secret(tables: _Tables, text: str, name: str) -> str:
    """Return a reference for a secret. One that stands in the file gets a variable of its own, and is not copied."""
    if _is_reference(text):
        return _reference(tables, text)
    if text not in tables.secrets:
        base = re.sub(r"[^A-Z0-9]", "_", name.upper())
        taken = tables.named | set(tables.secrets.values())
        numbered = (base if number == 1 else f"{base}_{number}" for number in range(1, len(taken) + 2))
        tables.secrets[text] = next(variable for variable in numbered if variable not in taken)
    tables.variables.append(tables.secrets[text])
    return f"env:{tables.secrets[text]}"


def _params(entry: Any) -> dict[str, Any]:
    """Return an entry's `litellm_params` that say something."""
    params = _table(_table(entry).get("litellm_params"))
    return {name: value for name, value in params.items() if value is not None and value != ""}


def _kind_and_model(params: dict[str, Any]) -> tuple[str, str]:
    kind, separator, model = str(params.get("model")).partition("/")
    return (kind, model) if separator else ("openai", kind)


def _has_openais_key_by_default(params: dict[str, Any]) -> bool:
    """Tell whether litellm would send the key of OPENAI_API_KEY, to OpenAI itself."""
    base_url = str(params.get("api_base") or OPENAI_BASE_URL)
    return "api_key" not in params and _kind_and_model(params)[0] in _OPENAI and bool(_OPENAIS_OWN.match(base_url))


def _table(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_ENVIRONMENT)


def _is_count(value: Any, count_max: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= count_max
