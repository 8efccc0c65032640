"""Nobody outlives the supervisor: its processes notice when it dies, however it dies, and drain."""

from __future__ import annotations

import asyncio
import os

import structlog

_VARIABLE = "AAP_LIFELINE_FD"
_log = structlog.get_logger(__name__)


class Lifeline:
    """A pipe that the supervisor holds the writing end of. `kill -9` closes it as surely as an orderly end."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()

    @property
    def inherited(self) -> int:
        """The descriptor that a child must inherit."""
        return self._reading

    def environ(self) -> dict[str, str]:
        """Return what a child must find in its environment."""
        return {_VARIABLE: str(self._reading)}


def watch(stop: asyncio.Event) -> None:
    """Set *stop* when the supervisor is gone. Without a supervisor this does nothing."""
    text = os.environ.get(_VARIABLE)
    if text is None:
        return
    descriptor = int(text)
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(descriptor)
        _log.error("supervisor.gone")
        stop.set()

    loop.add_reader(descriptor, end)
