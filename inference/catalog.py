"""Which models there are, and which deployments serve each: the `[providers]` and `[models]` tables of aap.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Annotated, Any, Final, Literal, TypeVar, cast

import msgspec

from core.configuration import ConfigurationInvalid, Tables, resolve_secret, unknown_names
from core.http1.messages import Deadlines, is_accept_encoding, parse_base_url

ProviderKind = Literal["openai", "litellm", "demo"]
OPENAI_BASE_URL: Final = "https://api.openai.com/v1"
DEMO_MODEL: Final = "demo"
_MODEL_CREATED: Final = 1_700_000_000
# Whose models stand in litellm's price list under their bare names. A model of that name at another provider is another
# offer, at another price.
_LISTED_BARE: Final = frozenset({"openai", "anthropic", "bedrock", "bedrock_converse", "cohere", "vertex_ai"})
_T = TypeVar("_T", bound=msgspec.Struct)


Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
TokenCount = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]


class DeadlineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long each part of a call may take. The defaults let a reasoning model think, and a dead provider not."""

    connect_seconds: Seconds = 5.0
    # OpenAI's own client waits 600 s between reads; shorter, so that the caller hears of it from us.
    first_byte_seconds: Seconds = 300.0
    idle_seconds: Seconds = 120.0
    total_seconds: Seconds = 1_800.0

    def as_deadlines(self) -> Deadlines:
        """Return the deadlines in the upstreams' form."""
        return Deadlines(self.connect_seconds, self.first_byte_seconds, self.idle_seconds, self.total_seconds)


class ProviderSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[providers.NAME]` table. Its texts may be `env:NAME` or `file:PATH`; the table then holds no secret."""

    kind: ProviderKind
    base_url: str | None = None
    api_key: str | None = None
    headers: dict[str, str] = {}
    # litellm's name for the provider ("anthropic", "gemini", "bedrock" …); the table's own name unless given.
    litellm_provider: str | None = None
    options: dict[str, str | int | float | bool] = {}
    deadlines: DeadlineSettings = DeadlineSettings()

    def __repr__(self) -> str:
        """Keep credentials out of logs and tracebacks."""
        return f"ProviderSettings(kind={self.kind!r})"


class DeploymentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One place that serves a model, and its share of the calls. Weight 0 is used only when all others fail."""

    provider: str
    model: str
    weight: int = 1


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[models."NAME"]` table."""

    deployments: list[DeploymentSettings]
    aliases: list[str] = []
    # The most that one answer can have: bounds what a call without `max_tokens` reserves.
    output_tokens_max: TokenCount = 128_000
    created: int = _MODEL_CREATED
    owned_by: str = "system"


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A provider whose secrets are resolved."""

    name: str
    settings: ProviderSettings
    api_key: str | None

    def __repr__(self) -> str:
        """Keep credentials out of logs and tracebacks."""
        return f"Provider({self.name!r})"


class Deployment(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A model at a provider. *id* is stable across reloads, so that what is known of its health is kept."""

    id: str
    provider: Provider
    model: str
    weight: int
    deadlines: Deadlines
    price_names: tuple[str, ...] = ()
    """Under which names litellm's price list may have it, best first."""


class Model(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A model that callers can name."""

    name: str
    deployments: tuple[Deployment, ...]
    output_tokens_max: int
    created: int
    owned_by: str


class Catalog:
    """All models, by name and by alias. Immutable: a reload makes a new one."""

    def __init__(
        self, models: Mapping[str, Model], aliases: Mapping[str, str], providers: Mapping[str, Provider]
    ) -> None:
        self.models = models
        self.providers = providers
        self._by_name = {**models, **{alias: models[name] for alias, name in aliases.items()}}

    def find(self, name: str) -> Model | None:
        """Return the model of that name or alias."""
        return self._by_name.get(name)

    def __iter__(self) -> Iterator[Model]:
        """Iterate over the models, without aliases."""
        return iter(self.models.values())


def build(tables: Tables, environ: Mapping[str, str]) -> Catalog:
    """Return the catalog that aap.toml and the conventional variables describe. Errors: ConfigurationInvalid.

    With OPENAI_API_KEY set, a provider `openai` exists unless the file defines one, and OpenAI's models are in the
    catalog unless the file lists models. With no model at all, the labelled demo model answers.
    """
    problems: list[str] = []
    providers = _providers(tables.get("providers", {}), environ, problems)
    models = _convert_all(tables.get("models", {}), ModelSettings, "models", problems)
    if problems:
        raise ConfigurationInvalid(problems)
    if environ.get("OPENAI_API_KEY"):
        conventional = ProviderSettings(
            kind="openai", base_url=environ.get("OPENAI_BASE_URL") or OPENAI_BASE_URL, api_key="env:OPENAI_API_KEY"
        )
        providers.setdefault("openai", _resolved("openai", conventional, environ, problems))
        models = models or _openai_models()
    if not models:
        providers["demo"] = Provider(name="demo", settings=ProviderSettings(kind="demo"), api_key=None)
        deployment = DeploymentSettings(provider="demo", model=DEMO_MODEL)
        models = {DEMO_MODEL: ModelSettings(deployments=[deployment], owned_by="demo")}
    catalog = _assemble(providers, models, problems)
    if problems:
        raise ConfigurationInvalid(problems)
    return catalog


def _providers(tables: Any, environ: Mapping[str, str], problems: list[str]) -> dict[str, Provider]:
    settings = _convert_all(tables, ProviderSettings, "providers", problems)
    return {name: _resolved(name, one, environ, problems) for name, one in settings.items()}


def _convert_all(tables: Any, kind: type[_T], where: str, problems: list[str]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    if not isinstance(tables, dict):
        problems.append(f"{where}: expected tables")
        return found
    for name, table in cast("dict[str, Any]", tables).items():
        given = cast("dict[str, Any]", table) if isinstance(table, dict) else {}
        unknown = unknown_names(given, kind.__struct_fields__, f"{where}.{name}.")
        try:
            found[name] = msgspec.convert(table, kind)
        except msgspec.ValidationError as error:
            problems += unknown or [f"{where}.{name}: {error}"]
    return found


def _resolved(name: str, settings: ProviderSettings, environ: Mapping[str, str], problems: list[str]) -> Provider:
    api_key = None
    try:
        api_key = resolve_secret(settings.api_key, environ) if settings.api_key else None
        settings = msgspec.structs.replace(
            settings,
            headers={header: resolve_secret(value, environ) for header, value in settings.headers.items()},
            options={
                option: resolve_secret(value, environ) if isinstance(value, str) else value
                for option, value in settings.options.items()
            },
        )
        problems += [f"providers.{name}.headers: {problem}" for problem in _header_problems(settings.headers)]
        if settings.base_url is not None:
            settings = msgspec.structs.replace(settings, base_url=resolve_secret(settings.base_url, environ))
            parse_base_url(settings.base_url or "")
        elif settings.kind == "openai":
            problems.append(f"providers.{name}: an openai provider needs a base_url")
        if api_key is not None and (not api_key.isprintable() or not api_key.isascii()):
            problems.append(f"providers.{name}: the api_key holds characters that no header can carry")
    except ValueError as error:
        problems.append(f"providers.{name}: {error}")
    return Provider(name=name, settings=settings, api_key=api_key)


def _header_problems(headers: Mapping[str, str]) -> Iterator[str]:
    for header, value in headers.items():
        try:
            is_accept_encoding(header.encode())
        except ValueError as error:
            yield f"{header!r}: {error}"
        if header.lower() == "content-type":
            yield "'content-type' is the request's own; leave it out"
        if not value.isprintable() or not value.isascii():
            yield f"the value of {header!r} holds characters that no header can carry"


def _assemble(providers: Mapping[str, Provider], models: Mapping[str, ModelSettings], problems: list[str]) -> Catalog:
    found: dict[str, Model] = {}
    aliases: dict[str, str] = {}
    for name, settings in models.items():
        deployments = tuple(_deployments(name, settings, providers, problems))
        if not deployments:
            problems.append(f"models.{name}: needs at least one deployment")
        found[name] = Model(
            name=name,
            deployments=deployments,
            output_tokens_max=settings.output_tokens_max,
            created=settings.created,
            owned_by=settings.owned_by,
        )
        for alias in settings.aliases:
            if alias in models or alias in aliases:
                problems.append(f"models.{name}.aliases: {alias} is already a name")
            aliases[alias] = name
    return Catalog(found, aliases, providers)


def _deployments(
    name: str, settings: ModelSettings, providers: Mapping[str, Provider], problems: list[str]
) -> Iterator[Deployment]:
    for deployment in settings.deployments:
        provider = providers.get(deployment.provider)
        if provider is None:
            problems += unknown_names([deployment.provider], providers, f"models.{name}: provider ")
            continue
        if not 0 <= deployment.weight <= 10_000:
            problems.append(f"models.{name}: weight {deployment.weight} is not from 0 to 10000")
        yield Deployment(
            id=f"{provider.name}/{deployment.model}",
            provider=provider,
            model=deployment.model,
            weight=deployment.weight,
            deadlines=provider.settings.deadlines.as_deadlines(),
            price_names=_price_names(provider, deployment.model),
        )


def _price_names(provider: Provider, model: str) -> tuple[str, ...]:
    family = provider.settings.litellm_provider or provider.name
    return (f"{family}/{model}", model) if family in _LISTED_BARE else (f"{family}/{model}",)


def _openai_models() -> dict[str, ModelSettings]:
    groups = tomllib.loads(files("inference").joinpath("openai_models.toml").read_text())
    return {
        name: ModelSettings(deployments=[DeploymentSettings(provider="openai", model=name)], owned_by="openai")
        for names in groups.values()
        for name in names
    }
