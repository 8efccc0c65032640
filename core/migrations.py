"""The schema's version: what is deployed, what this code expects, and how to get there."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

import structlog
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from core.database import Database

# Two processes that migrate at once take turns.
_LOCK: Final = 0x616170
_DEADLOCK: Final = "40P01"
_TRIES: Final = 5
_log = structlog.get_logger(__name__)


def expected_revision() -> str:
    """Return the revision that this code was written for: the last file, since their names begin with their number."""
    names = [entry.name for entry in files("migrations").joinpath("versions").iterdir()]
    return max(name.partition("_")[0] for name in names if name[:4].isdecimal())


async def is_current(database: Database) -> bool:
    """Tell whether the database has exactly the expected schema."""
    return await database.run(_current_revision) == expected_revision()


async def upgrade(database: Database) -> str:
    """Bring the schema up to date, one process at a time; return its revision. Idempotent.

    A process that runs may hold what this needs and want what this has: PostgreSQL ends one of the two, and if that is
    this one, it is tried again. Errors: SQLAlchemy's.
    """
    for _ in range(_TRIES - 1):
        try:
            return await database.run(_upgrade)
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _DEADLOCK:
                raise
            _log.warning("migrations.deadlocked")
    return await database.run(_upgrade)


def configuration(connection: Connection) -> Any:
    """Return alembic's configuration; it needs no ini file."""
    from alembic.config import Config  # noqa: PLC0415 - half a second of imports that only migrating needs

    config = Config()
    config.set_main_option("script_location", str(files("migrations")))
    config.attributes["connection"] = connection
    return config


def _current_revision(connection: Connection) -> str | None:
    try:
        return connection.scalar(text("SELECT version_num FROM alembic_version"))
    except ProgrammingError:
        return None


def _upgrade(connection: Connection) -> str:
    from alembic import command  # noqa: PLC0415 - as above

    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    command.upgrade(configuration(connection), "head")
    return expected_revision()
