"""PostgreSQL: the engine, transactions, and the base of every table."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final, TypeVar

import asyncpg
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

_T = TypeVar("_T")
_NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


# What a query may raise when PostgreSQL is down, starting or full: SQLAlchemy wraps nothing that connecting raises.
DOWN: Final = (SQLAlchemyError, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


class Table(DeclarativeBase):
    """The base of every typed row."""

    metadata = MetaData(naming_convention=_NAMING)


async def database_now(session: AsyncSession) -> datetime:
    """Return the time by PostgreSQL's clock, which all processes share; not when the transaction began."""
    return (await session.execute(text("SELECT clock_timestamp()"))).scalar_one()


class Database:
    """A pool of connections to PostgreSQL. A function that takes a session never commits; this class does."""

    def __init__(
        self,
        url: str,
        *,
        connections_max: int = 5,
        connect_timeout_seconds: float = 5.0,
        statement_seconds_max: float = 30.0,
        is_read_only: bool = False,
    ) -> None:
        """Connect to nothing yet. With *is_read_only*, PostgreSQL refuses every statement that would change a row."""
        self._engine: AsyncEngine = create_async_engine(
            asyncpg_url(url),
            pool_size=connections_max,
            max_overflow=0,
            pool_timeout=connect_timeout_seconds,
            # A restarted PostgreSQL leaves dead connections in the pool; the ping finds them before a caller does.
            pool_pre_ping=True,
            connect_args={"timeout": connect_timeout_seconds, "command_timeout": statement_seconds_max},
            execution_options={"postgresql_readonly": True} if is_read_only else {},
        )
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncSession]:
        """Open a session in a transaction; commit at the end, roll back on any error."""
        async with self._sessions() as session, session.begin():
            yield session

    async def run(self, act: Callable[[Connection], _T]) -> _T:
        """Run *act* on a plain connection in a transaction: for migrations, which are not asynchronous."""
        async with self._engine.begin() as connection:
            return await connection.run_sync(act)

    async def ping(self) -> None:
        """Return when PostgreSQL answers. Errors: whatever the driver raises when it does not."""
        async with self._engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


def driver_url(url: str) -> str:
    """Return *url* as asyncpg itself reads it; there, unlike in SQLAlchemy's URLs, `sslmode` has libpq's name."""
    parsed = make_url(asyncpg_url(url)).set(drivername="postgresql")
    if "ssl" in parsed.query:
        parsed = parsed.update_query_dict({"sslmode": str(parsed.query["ssl"])}).difference_update_query(["ssl"])
    return parsed.render_as_string(hide_password=False)


def asyncpg_url(url: str) -> str:
    """Return *url* with asyncpg as its driver, whatever spelling of `postgres://` it came in."""
    parsed = make_url(url.replace("postgres://", "postgresql://", 1) if url.startswith("postgres://") else url)
    # What libpq calls sslmode, and managed services write into their addresses, asyncpg calls ssl.
    if "sslmode" in parsed.query:
        parsed = parsed.update_query_dict({"ssl": str(parsed.query["sslmode"])}).difference_update_query(["sslmode"])
    parsed = parsed.difference_update_query(["channel_binding"])
    return parsed.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
