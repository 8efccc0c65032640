"""What routes that read usage and the ledger read by: connections of their own, and places.

An organization that reads without measure takes nothing from calls, from authentication, or from other organizations.
PostgreSQL down: 503, and in the middle of an export its end without HTTP's last chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import DOWN, Database
from core.errors import Unavailable
from core.ids import OrganizationId
from gateway.routes.places import Bounds, Places
from metering.entry_export import Format, export
from metering.entry_pages import EntryFilter

# Most pages are a statement of milliseconds; the largest answer takes 50 ms to build (`metering.summaries.GROUPS_MAX`).
# Two at once are quick enough for a screen of eleven, and leave as many to all others.
_PAGES: Final = Bounds(of_one=2, in_all=4)
# Each takes its share of a process that has calls to answer, for as long as its reader is quick.
_EXPORTS: Final = Bounds(of_one=1, in_all=3, retry_after_seconds=5.0)
# One for each place: who has a place waits for no connection.
CONNECTIONS_MAX: Final = _PAGES.in_all + _EXPORTS.in_all
# Time for 2.5 million entries over 10 Mbit/s (873 bytes each as JSON, measured); what is larger is asked for in parts.
# It is also how long three readers who take little at a time can keep a fourth organization out.
EXPORT_SECONDS_MAX: Final = 1_800.0
_log = structlog.get_logger(__name__)


class UsageUnreadable(Unavailable):
    """PostgreSQL is down, or takes too long. Calls of models may go on meanwhile."""

    code = "usage_unavailable"

    def __init__(self) -> None:
        super().__init__("Usage cannot be read just now. Please try again.", retry_after_seconds=1)


class ExportTooLong(Unavailable):
    """An export was not read to its end in time. It has begun, so that nobody sees this: the file breaks off."""


class Reading:
    """Gives those who read usage or the ledger a place and a connection. One per process."""

    def __init__(self, database: Database, clock: Clock) -> None:
        """*database* is for this alone, and has CONNECTIONS_MAX connections."""
        self._database = database
        self._clock = clock
        self._pages = Places(_PAGES)
        self._exports = Places(_EXPORTS)

    @asynccontextmanager
    async def page(self, organization_id: OrganizationId) -> AsyncGenerator[AsyncSession]:
        """Open a transaction, which can only read, from a place of the organization's.

        PostgreSQL down or stuck: the place is free again when the connection or the statement has run out of time.
        Errors: ShareTaken, PlacesTaken, UsageUnreadable.
        """
        async with self._pages.taken(organization_id):
            with told_when_down():
                async with self._database.transaction() as session:
                    yield session

    async def export(
        self, chosen: EntryFilter, *, organization_id: OrganizationId, form: Format
    ) -> AsyncGenerator[bytes]:
        """Yield the organization's entries as a file, from a place that is free again however this generator ends.

        Errors: ShareTaken and PlacesTaken before the first piece; those of the database (DOWN) before any;
        ExportTooLong instead of a piece that comes after EXPORT_SECONDS_MAX.
        """
        pieces = export(self._database, chosen, organization_id=organization_id, form=form)
        async with self._exports.taken(organization_id), contextlib.aclosing(pieces):
            began_at = self._clock.monotonic_seconds()
            async for piece in pieces:
                if self._clock.monotonic_seconds() - began_at > EXPORT_SECONDS_MAX:
                    _log.warning("export.cut", organization_id=organization_id, seconds_max=EXPORT_SECONDS_MAX)
                    raise ExportTooLong("The export took too long.")
                yield piece

    async def close(self) -> None:
        """Close every connection."""
        await self._database.close()


@contextmanager
def told_when_down() -> Generator[None]:
    """Answer 503 where a query finds no database. Errors: UsageUnreadable."""
    try:
        yield
    except DOWN as error:
        _log.warning("usage.unreadable", exc_info=error)
        raise UsageUnreadable from error
