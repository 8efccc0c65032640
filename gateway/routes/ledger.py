"""The organization's ledger: entry by entry, and as a file. Ours, beside OpenAI's usage API and in its style."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, get
from litestar.datastructures import State
from litestar.response import Stream
from msgspec import Meta

from core.errors import Invalid, Unavailable
from gateway.routes.query_string import described_by, read_query
from gateway.routes.reading import told_when_down
from gateway.routes.usage_forms import EndTime, StartTime, Texts
from gateway.runtime import Runtime
from keys.principal import Principal
from metering.entry_export import Format, export
from metering.entry_pages import EntryFilter, LedgerEntry, entry_of, read_rows

_MEDIA_TYPES: Final[dict[Format, str]] = {"csv": "text/csv", "jsonl": "application/jsonl"}
# Each takes its share of a process that has calls to answer, for as long as its reader is quick.
_EXPORTS_MAX: Final = 2


class ExportsBusy(Unavailable):
    """As many exports run in this process as it takes."""

    code = "exports_busy"

    def __init__(self) -> None:
        super().__init__("Too many exports are running. Please try again.", retry_after_seconds=5)


class ExportSlots:
    """The places for exports in one process."""

    def __init__(self, places: int = _EXPORTS_MAX) -> None:
        self._free = places

    @contextlib.contextmanager
    def taken(self) -> Generator[None]:
        """Take a place for as long as the context lasts. Errors: ExportsBusy."""
        if not self._free:
            raise ExportsBusy
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


def provide_export_slots(state: State) -> ExportSlots:
    """Return the places for exports of this process."""
    return state["export_slots"]


class _EntriesQuery(msgspec.Struct, frozen=True, kw_only=True):
    project_ids: Texts = ()
    api_key_ids: Texts = ()
    models: Texts = ()
    end_time: EndTime | None = None


class LedgerQuery(_EntriesQuery, frozen=True, kw_only=True):
    """A page of entries."""

    start_time: StartTime | None = None
    request_id: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    after: Annotated[str, Meta(description="The last_id of the page before.")] | None = None


class ExportQuery(_EntriesQuery, frozen=True, kw_only=True):
    """A file of entries."""

    start_time: StartTime
    format: Format = "csv"


class LedgerPage(msgspec.Struct, frozen=True):
    """Entries, newest first."""

    data: list[LedgerEntry]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


@get(
    "/v1/organization/ledger_entries",
    summary="List ledger entries",
    operation_id="list_ledger_entries",
    operation_class=described_by(LedgerQuery),
)
async def list_entries(request: Request[Any, Any, Any], principal: Principal, runtime: Runtime) -> LedgerPage:
    """Return a page of entries, newest first. Times are those of the calls; `after` goes on behind a page."""
    principal.require_scope("usage:read")
    asked = read_query(request, LedgerQuery)
    with told_when_down():
        return await _page(runtime, principal, asked)


@get(
    "/v1/organization/ledger_entries/export",
    summary="Export ledger entries",
    operation_id="export_ledger_entries",
    operation_class=described_by(ExportQuery),
)
async def export_entries(
    request: Request[Any, Any, Any], principal: Principal, runtime: Runtime, export_slots: ExportSlots
) -> Stream:
    """Stream the entries of a time, oldest first, as CSV or as a JSON object per line. Amounts are exact US dollars."""
    principal.require_scope("usage:read")
    asked = read_query(request, ExportQuery)
    chosen = _filter(asked)
    pieces = export(runtime.database, chosen, organization_id=principal.organization_id, form=asked.format)
    headers = {"content-disposition": f'attachment; filename="{_file_name(chosen, asked.format)}"'}
    return Stream(await _begun(_in_place(export_slots, pieces)), media_type=_MEDIA_TYPES[asked.format], headers=headers)


async def _page(runtime: Runtime, principal: Principal, asked: LedgerQuery) -> LedgerPage:
    async with runtime.database.transaction() as session:
        rows = await read_rows(
            session,
            _filter(asked),
            organization_id=principal.organization_id,
            order="newest first",
            after=asked.after,
            count=asked.limit + 1,
        )
    entries = [entry_of(row) for row in rows[: asked.limit]]
    first, last = (entries[0].id, entries[-1].id) if entries else (None, None)
    return LedgerPage(entries, first, last, has_more=len(rows) > asked.limit)


def _filter(asked: LedgerQuery | ExportQuery) -> EntryFilter:
    """Return what is asked for. An export that is asked for without an end ends now, not when it is read."""
    end_time = asked.end_time
    if end_time is None and isinstance(asked, ExportQuery):
        end_time = int(datetime.now(UTC).timestamp()) + 1
    if asked.start_time is not None and end_time is not None and end_time <= asked.start_time:
        raise Invalid("Invalid 'end_time': it must be later than 'start_time'.", param="end_time")
    return EntryFilter(
        start_at=None if asked.start_time is None else datetime.fromtimestamp(asked.start_time, UTC),
        end_at=None if end_time is None else datetime.fromtimestamp(end_time, UTC),
        request_id=asked.request_id if isinstance(asked, LedgerQuery) else None,
        project_ids=asked.project_ids,
        key_ids=asked.api_key_ids,
        models=asked.models,
    )


def _file_name(chosen: EntryFilter, form: Format) -> str:
    return f"ledger_{chosen.start_at:%Y%m%dT%H%M%SZ}_{chosen.end_at:%Y%m%dT%H%M%SZ}.{form}"


async def _in_place(slots: ExportSlots, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Yield *pieces* from a place of their own, free again however this generator ends. Errors: ExportsBusy."""
    with slots.taken():
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece


async def _begun(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Return *pieces* with the first one read: until then what goes wrong is a plain answer."""
    with told_when_down():
        first = await anext(pieces, b"")

    async def whole() -> AsyncGenerator[bytes]:
        async with contextlib.aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return whole()


ROUTES = (list_entries, export_entries)
