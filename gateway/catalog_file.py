"""aap.toml as the gateway uses it: catalog, default limits and plans, replaced together or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog

from core.configuration import ConfigurationFile, ConfigurationInvalid, Tables, unknown_names
from core.egress import EgressPolicy
from gateway.egress_file import build_policy
from inference.catalog import Catalog, build
from keys.limits import DefaultLimits
from metering.billing.plans import Plans, build_plans

_TABLES: Final = ("providers", "models", "limits", "plans", "billing", "egress")
_log = structlog.get_logger(__name__)


class Parsed(NamedTuple):
    """What the file describes."""

    catalog: Catalog
    limits: DefaultLimits
    plans: Plans
    egress: EgressPolicy


class CatalogFile:
    """What aap.toml says now. Errors at first reading: ConfigurationInvalid."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self._file = ConfigurationFile(path)
        self._environ = environ
        self.catalog, self.limits, self.plans, self.egress = parse(self._file.read(), environ)

    def reload_if_changed(self) -> bool:
        """Take over a changed file; tell whether that was done. A faulty file changes nothing and is logged."""
        if not self._file.has_changed():
            return False
        try:
            self.catalog, self.limits, self.plans, self.egress = parse(self._file.read(), self._environ)
        except ConfigurationInvalid as error:
            _log.error("configuration.refused", file=self._file.path.name, problems=error.problems)
            return False
        _log.info("configuration.reloaded", file=self._file.path.name, models=len(self.catalog.models))
        return True


def parse(tables: Tables, environ: Mapping[str, str]) -> Parsed:
    """Return what *tables* describe. Errors: ConfigurationInvalid with every problem."""
    problems = unknown_names(tables, _TABLES, "")
    limits = DefaultLimits()
    try:
        limits = msgspec.convert(tables.get("limits", {}), DefaultLimits)
        problems += limits.problems()
    except msgspec.ValidationError as error:
        problems.append(f"limits: {error}")
    plans = Plans()
    try:
        plans = build_plans(tables)
    except ConfigurationInvalid as error:
        problems += error.problems
    egress = EgressPolicy()
    try:
        egress = build_policy(tables)
    except ConfigurationInvalid as error:
        problems += error.problems
    try:
        catalog = build(tables, environ)
    except ConfigurationInvalid as error:
        raise ConfigurationInvalid(problems + error.problems) from None
    # A limit on a model that is not there would hold for nobody, and be missed by somebody.
    problems += unknown_names(limits.model, catalog.models, "limits.model.")
    for plan in plans:
        problems += unknown_names(plan.prices, catalog.models, f"plans.{plan.name}.prices.")
    if problems:
        raise ConfigurationInvalid(problems)
    return Parsed(catalog, limits, plans, egress)
