"""The stores that come with the gateway."""

from __future__ import annotations

from pathlib import Path

from core.writer import Writer
from tests.harness.private_stores import PrivatePostgres


async def test_a_large_machines_processes_all_find_their_connections(workdir: Path) -> None:
    """Guarantee: what is said once holds for every later start, and for a folder that was there before."""
    server = PrivatePostgres(workdir / "p")
    for _ in range(2):
        writer = Writer(await server.start(), statement_seconds_max=10)
        assert [tuple(row) for row in await writer.fetch("SHOW max_connections")] == [("500",)]
        await writer.close()
        await server.stop()
    text = (workdir / "p" / "postgresql.conf").read_text()
    assert text.count("max_connections = 500") == 1
