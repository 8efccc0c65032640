"""Structured logs: one line an event, `noun.past` and key-values, scrubbed of keys.

The hot path does not go through structlog: its one line a request is encoded and written in batches
(`gateway/request_log.py`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, cast

import structlog

from core.settings import LogSettings

Redact = Callable[[str], str]
# Names whose values never reach a log, whatever they hold.
_SECRET_NAMES = ("authorization", "api_key", "api-key", "x-api-key", "password", "secret", "pepper", "cookie")


def configure_logs(settings: LogSettings, redact: Redact, stream: Any = None) -> None:
    """Send structlog and the standard library's logging to *stream* (standard error), scrubbed by *redact*.

    Errors: RuntimeError when a planted secret comes through: better no start than keys in a log.
    """
    scrub = _scrubber(redact)
    planted = scrub(None, "", {"event": "self.tested", "authorization": "Bearer planted", "deep": {"password": "p"}})
    if "planted" in str(planted) or "'p'" in str(planted):
        raise RuntimeError("log redaction does not work")
    level = getattr(logging, settings.level.upper())
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            scrub,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


class _ToStructlog(logging.Handler):
    """Hands what libraries log to structlog, so that it is scrubbed and shaped like the rest."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        log.log(
            record.levelno, "library.logged", logger=record.name, message=record.getMessage(), exc_info=record.exc_info
        )


def _scrubber(redact: Redact) -> Callable[[Any, str, MutableMapping[str, Any]], MutableMapping[str, Any]]:
    def scrub(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {name: _scrubbed(name, value, redact) for name, value in event.items()}

    return scrub


def _scrubbed(name: str, value: Any, redact: Redact) -> Any:
    if any(secret in name.lower() for secret in _SECRET_NAMES):
        return "[redacted]"
    if isinstance(value, bytes):
        return redact(value.decode("latin-1"))
    if isinstance(value, dict):
        table = cast("dict[Any, Any]", value)
        return {redact(str(key)): _scrubbed(str(key), item, redact) for key, item in table.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_scrubbed("", item, redact) for item in cast("list[Any]", value)]
    return value if value is None or isinstance(value, bool | int | float) else redact(str(value))
