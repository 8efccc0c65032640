"""Sums and entries for tests of what reads them, inserted as they are: what writes them has tests of its own."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import id_range_start


async def add_window(
    session: AsyncSession,
    organization_id: str,
    at: datetime,
    *,
    seconds: int = 3600,
    project_id: str = "proj_1",
    key_id: str = "key_1",
    model: str = "fake",
    operation: str = "chat",
    service_tier: str = "default",
    requests: int = 1,
    **sums: int,
) -> None:
    """The sum of *requests* calls in the window that begins at *at*."""
    row = {
        "organization_id": organization_id,
        "seconds": seconds,
        "starts_at": at,
        "project_id": project_id,
        "key_id": key_id,
        "model": model,
        "operation": operation,
        "service_tier": service_tier,
        "requests": requests,
        "unpriced_requests": 0,
        "cost_nano_usd": 0,
        "charge_nano_usd": 0,
        **sums,
    }
    await _insert(session, "spend_windows", row)


async def add_entry(
    session: AsyncSession, organization_id: str, at: datetime, number: int = 0, **columns: object
) -> str:
    """An entry of a call at *at*, the *number*th of its millisecond; return the id of the call."""
    row = {
        "request_id": request_id(organization_id, at, number),
        "kind": "usage",
        "seq": 0,
        "organization_id": organization_id,
        "project_id": "proj_1",
        "key_id": "key_1",
        "secret_id": "ksec_1",
        "model": "fake",
        "deployment": "p0/fake",
        "operation": "chat",
        "service_tier": "default",
        "cost_nano_usd": 0,
        "charge_nano_usd": 0,
        "is_unpriced": False,
        "quality": "exact",
        "requests": 1,
        "status": 200,
        "outcome": "done",
        "duration_ms": 10,
        "occurred_at": at,
        **columns,
    }
    await _insert(session, "ledger_entries", row)
    return str(row["request_id"])


async def add_entries(session: AsyncSession, organization_id: str, at: datetime, count: int) -> None:
    """*count* entries of calls of one millisecond, each with a charge of its own."""
    await session.execute(
        text(
            "INSERT INTO ledger_entries (request_id, kind, seq, organization_id, project_id, key_id, secret_id, model,"
            " deployment, operation, service_tier, cost_nano_usd, charge_nano_usd, is_unpriced, quality, requests,"
            " status, outcome, duration_ms, occurred_at, input_tokens, output_tokens)"
            " SELECT :prefix || lpad(to_hex(n), 6, '0'), 'usage', 0, :organization_id, 'proj_1', 'key_1', 'ksec_1',"
            " 'fake', 'p0/fake', 'chat', 'default', n, n, false, 'exact', 1, 200, 'done', 10, :at, n, 1"
            " FROM generate_series(1, :count) n"
        ),
        {"prefix": request_id(organization_id, at)[:-6], "organization_id": organization_id, "at": at, "count": count},
    )


def request_id(organization_id: str, at: datetime, number: int = 0) -> str:
    """An id that was made at *at*, and for no other organization."""
    return f"{id_range_start('req', at)}{organization_id[-10:]}{number:06x}"


async def make_month(session: AsyncSession, at: datetime) -> None:
    """Make the partition that holds *at*."""
    first = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    last = (first + timedelta(days=32)).replace(day=1)
    bounds = f"FROM ('{id_range_start('req', first)}') TO ('{id_range_start('req', last)}')"
    name = f"ledger_entries_{first:%Y_%m}"
    await session.execute(text(f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF ledger_entries FOR VALUES {bounds}"))


async def _insert(session: AsyncSession, table: str, row: dict[str, object]) -> None:
    values = ", ".join(f":{name}" for name in row)
    await session.execute(text(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})"), row)
