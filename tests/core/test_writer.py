"""Rows of many calls in one commit: whatever goes wrong, none is dropped."""

from __future__ import annotations

import asyncio

from core.writer import GroupCommit
from tests.harness.eventually import eventually


async def test_an_error_that_nobody_expected_stops_nothing() -> None:
    """Guarantee: what a batch raises, also a mistake of our own, is logged and tried again."""
    written: list[int] = []
    errors: list[Exception] = [RuntimeError("a mistake"), RecursionError()]

    async def write(batch: list[int]) -> None:
        await asyncio.sleep(0)
        if errors:
            raise errors.pop()
        written.extend(batch)

    commit = GroupCommit[int]("test", write, pause_seconds=0.001, rows_max=10)
    commit.start()
    for number in range(25):
        commit.add(number)
    await eventually(lambda: len(written) == 25)
    assert written == list(range(25))
    assert commit.failures == 2
    assert await commit.close(1) == 0
