"""Waiting for what must come true, with an end."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

_LOOK_SECONDS = 0.01


async def eventually(condition: Callable[[], Any], timeout_seconds: float = 5.0) -> Any:
    """Return the first true result of *condition* (which may be asynchronous); fail when there is none in time."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {inspect.getsource(condition).strip()}"
        await moment(_LOOK_SECONDS)


async def moment(seconds: float) -> None:
    """Let *seconds* pass: the pace of a slow client or of a load, never a guess at when something is done."""
    try:
        async with asyncio.timeout(seconds):
            await asyncio.Event().wait()
    except TimeoutError:
        return
