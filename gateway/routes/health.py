"""`/livez` and `/readyz`: for those who start, stop and load-balance this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import structlog
from litestar import Response, get

from core.migrations import is_current
from gateway.runtime import Runtime

_CHECK_SECONDS_MAX: Final = 1.0
_log = structlog.get_logger(__name__)


class Readiness(msgspec.Struct, frozen=True):
    """Whether new calls should come here, and (verbose) why not."""

    status: str
    checks: dict[str, str]


@get("/livez", summary="Is the process alive?", operation_id="livez", sync_to_thread=False)
def livez() -> dict[str, str]:
    """Answer as long as the event loop turns. Tests no dependency: restarting us would not mend one."""
    return {"status": "ok"}


@get("/readyz", summary="Should new calls come here?", operation_id="readyz")
async def readyz(runtime: Runtime, verbose: str | None = None) -> Response[Readiness]:
    """Answer 503 while stopping, without PostgreSQL, or on an unknown schema.

    Redis down is reported and does not turn traffic away: limits then hold per process.
    """
    checks = {
        "stopping": "ok" if not runtime.is_stopping else "stopping",
        "postgresql": await _checked(runtime.database.ping),
        "schema": await _checked(lambda: is_current(runtime.database)),
    }
    is_ready = all(result == "ok" for result in checks.values())
    checks |= {
        "redis": "ok" if runtime.scripts.is_up else "down: limits hold per process",
        "key_feed": "ok" if runtime.feed.is_live() else "down: every key is read from PostgreSQL",
    }
    shown = checks if verbose is not None else {}
    return Response(Readiness("ok" if is_ready else "unavailable", shown), status_code=200 if is_ready else 503)


async def _checked(check: Callable[[], Awaitable[object]]) -> str:
    try:
        async with asyncio.timeout(_CHECK_SECONDS_MAX):
            return "ok" if await check() is not False else "failed"
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer is "not ready"; what it was is logged
        _log.warning("readiness.failed", error=type(error).__name__)
        return "down"


ROUTES = (livez, readyz)
