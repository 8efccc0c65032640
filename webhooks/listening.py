"""Being told by PostgreSQL that there is something to do. A hint: who hears nothing looks by itself, a second later."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final, cast

import asyncpg
import structlog

from core.database import DOWN, driver_url
from webhooks.publish import CHANNEL

_log = structlog.get_logger(__name__)
_CONNECT_SECONDS_MAX: Final = 5.0
_RETRY_SECONDS: Final = 1.0
# A connection that was cut off somewhere on its way does not say so.
_PROBE_SECONDS: Final = 15.0


async def listen(url: str, heard: Callable[[str], None]) -> None:
    """Call *heard* with each message until cancelled; a connection that is lost is made again."""
    while True:
        connection: Any = None
        try:
            connection = await cast("Any", asyncpg).connect(
                driver_url(url),
                timeout=_CONNECT_SECONDS_MAX,
                command_timeout=_CONNECT_SECONDS_MAX,
                server_settings={"application_name": "aap-webhooks"},
            )

            def receive(_connection: Any, _pid: int, _channel: str, message: str) -> None:
                heard(message)

            await connection.add_listener(CHANNEL, receive)
            # What happened before this moment was told to nobody.
            heard("")
            while not connection.is_closed():
                await asyncio.sleep(_PROBE_SECONDS)
                await connection.execute("SELECT 1")
        except DOWN:
            pass
        except Exception:  # noqa: BLE001 - a hint: whoever hears nothing looks by itself
            _log.exception("webhooks.listening_broke")
        finally:
            if connection is not None:
                with contextlib.suppress(*DOWN):
                    connection.terminate()
        await asyncio.sleep(_RETRY_SECONDS)
