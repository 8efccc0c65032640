"""Statements as asyncpg has them, with $1, $2 … for arguments, within a session's transaction: those of *.sql files."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession


async def fetch(session: AsyncSession, statement: str, *arguments: Any) -> list[Any]:
    """Run *statement*; return its rows. Errors: SQLAlchemy's; the transaction is then broken."""
    connection = await session.connection()
    result = await connection.exec_driver_sql(statement, arguments)
    return list(result.all()) if result.returns_rows else []
