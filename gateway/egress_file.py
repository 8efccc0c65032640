"""`[egress]` of aap.toml for a worker: what may be reached by requests that customers ask for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import structlog

from core.configuration import ConfigurationFile, ConfigurationInvalid, Tables
from core.egress import EgressPolicy

_log = structlog.get_logger(__name__)


class EgressFile:
    """What aap.toml allows now. Where there is none that can be read: the public internet by https, nothing else."""

    def __init__(self, path: Path) -> None:
        self._file = ConfigurationFile(path)
        self._policy = EgressPolicy()
        self._read()

    def policy(self) -> EgressPolicy:
        """Return the policy as it was last read."""
        return self._policy

    async def keep_reading(self, pause_seconds: float) -> None:
        """Take over changes until cancelled, each within two looks. A faulty file changes nothing."""
        while True:
            await asyncio.sleep(pause_seconds)
            if self._file.has_changed():
                self._read()

    def _read(self) -> None:
        try:
            self._policy = build_policy(self._file.read())
        except ConfigurationInvalid as error:
            _log.error("configuration.refused", file=self._file.path.name, problems=error.problems)


def build_policy(tables: Tables) -> EgressPolicy:
    """Return what *tables* allow. Errors: ConfigurationInvalid."""
    try:
        return msgspec.convert(tables.get("egress", {}), EgressPolicy)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigurationInvalid([f"egress: {error}"]) from None
