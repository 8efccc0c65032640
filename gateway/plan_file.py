"""The plans of aap.toml for a worker, which needs nothing else of it: neither models nor the secrets of providers."""

from __future__ import annotations

from pathlib import Path

import structlog

from core.configuration import ConfigurationFile, ConfigurationInvalid
from metering.billing.plans import Plans, build_plans

_log = structlog.get_logger(__name__)


class PlanFile:
    """What aap.toml says of plans now."""

    def __init__(self, path: Path) -> None:
        self._file = ConfigurationFile(path)
        self._plans = Plans()
        self._is_known = False
        self._read()

    def plans(self) -> Plans:
        """Return the plans, those of a changed file once it is the same in two calls. A faulty one changes nothing."""
        if self._file.has_changed():
            self._read()
        return self._plans

    def known_plans(self) -> Plans | None:
        """As `plans`; None as long as there was no file that could be read: what is absent then means nothing."""
        plans = self.plans()
        return plans if self._is_known else None

    def _read(self) -> None:
        try:
            self._plans = build_plans(self._file.read())
            self._is_known = self._file.path.exists()
        except ConfigurationInvalid as error:
            _log.error("configuration.refused", file=self._file.path.name, problems=error.problems)
