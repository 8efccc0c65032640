"""aap.toml as the gateway uses it: the catalog and the default limits, replaced together or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from core.configuration import ConfigurationFile, ConfigurationInvalid, Tables, unknown_names
from inference.catalog import Catalog, build
from keys.limits import DefaultLimits

_TABLES: Final = ("providers", "models", "limits")
_log = structlog.get_logger(__name__)


class CatalogFile:
    """What aap.toml says now. Errors at first reading: ConfigurationInvalid."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self._file = ConfigurationFile(path)
        self._environ = environ
        self.catalog, self.limits = parse(self._file.read(), environ)

    def reload_if_changed(self) -> bool:
        """Take over a changed file; tell whether that was done. A faulty file changes nothing and is logged."""
        if not self._file.has_changed():
            return False
        try:
            self.catalog, self.limits = parse(self._file.read(), self._environ)
        except ConfigurationInvalid as error:
            _log.error("configuration.refused", file=self._file.path.name, problems=error.problems)
            return False
        _log.info("configuration.reloaded", file=self._file.path.name, models=len(self.catalog.models))
        return True


def parse(tables: Tables, environ: Mapping[str, str]) -> tuple[Catalog, DefaultLimits]:
    """Return what *tables* describe. Errors: ConfigurationInvalid with every problem."""
    problems = unknown_names(tables, _TABLES, "")
    limits = DefaultLimits()
    try:
        limits = msgspec.convert(tables.get("limits", {}), DefaultLimits)
        problems += limits.problems()
    except msgspec.ValidationError as error:
        problems.append(f"limits: {error}")
    try:
        catalog = build(tables, environ)
    except ConfigurationInvalid as error:
        raise ConfigurationInvalid(problems + error.problems) from None
    # A limit on a model that is not there would hold for nobody, and be missed by somebody.
    problems += unknown_names(limits.model, catalog.models, "limits.model.")
    if problems:
        raise ConfigurationInvalid(problems)
    return catalog, limits
