"""The organization's ledger: entry by entry, and as a file. Ours, beside OpenAI's usage API and in its style."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from litestar import Request, get
from litestar.response import Stream
from msgspec import Meta

from core.errors import Invalid
from gateway.routes.export_stream import begun
from gateway.routes.query_string import described_by, read_query
from gateway.routes.reading import Reading
from gateway.routes.usage_forms import EndTime, StartTime, Texts
from gateway.runtime import Runtime
from keys.principal import Principal
from metering.entry_export import Format
from metering.entry_pages import EntryFilter, LedgerEntry, entry_of, read_rows

_MEDIA_TYPES: Final[dict[Format, str]] = {"csv": "text/csv", "jsonl": "application/jsonl"}


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
    return await _page(runtime.reading, principal, asked)


@get(
    "/v1/organization/ledger_entries/export",
    summary="Export ledger entries",
    operation_id="export_ledger_entries",
    operation_class=described_by(ExportQuery),
)
async def export_entries(request: Request[Any, Any, Any], principal: Principal, runtime: Runtime) -> Stream:
    """Stream the entries of a time, oldest first, as CSV or as a JSON object per line. Amounts are exact US dollars."""
    principal.require_scope("usage:read")
    asked = read_query(request, ExportQuery)
    chosen = _filter(asked)
    pieces = runtime.reading.export(chosen, organization_id=principal.organization_id, form=asked.format)
    headers = {"content-disposition": f'attachment; filename="{_file_name(chosen, asked.format)}"'}
    return await begun(pieces, media_type=_MEDIA_TYPES[asked.format], headers=headers)


async def _page(reading: Reading, principal: Principal, asked: LedgerQuery) -> LedgerPage:
    """Return the page. PostgreSQL down: UsageUnreadable. Errors: those of `Reading.page`; Invalid for the query."""
    chosen = _filter(asked)
    async with reading.page(principal.organization_id) as session:
        rows = await read_rows(
            session,
            chosen,
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


ROUTES = (list_entries, export_entries)
