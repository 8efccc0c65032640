"""What reading routes do when PostgreSQL does not answer."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import structlog

from core.database import DOWN
from core.errors import Unavailable

_log = structlog.get_logger(__name__)


class UsageUnreadable(Unavailable):
    """PostgreSQL is down, or takes too long. Calls of models may go on meanwhile."""

    code = "usage_unavailable"

    def __init__(self) -> None:
        super().__init__("Usage cannot be read just now. Please try again.", retry_after_seconds=1)


@contextmanager
def told_when_down() -> Generator[None]:
    """Answer 503 where a query finds no database. Errors: UsageUnreadable."""
    try:
        yield
    except DOWN as error:
        _log.warning("usage.unreadable", exc_info=error)
        raise UsageUnreadable from error
