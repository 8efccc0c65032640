"""Reading the ledger page by page, along the index of (organization, request): the last costs no more than the first.

A page begins behind the last entry of the one before (keyset). Request ids sort by time, so a range of time is a range
of ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Select, and_, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from core.errors import Invalid
from core.ids import OrganizationId, id_range_start
from core.money import usd_text
from metering.summary_queries import is_one_of
from metering.tables import LedgerEntryRow
from metering.usage import UNIT_NAMES

Order = Literal["newest first", "oldest first"]
_ENTRY_ID: Final = re.compile(r"(req_[0-9a-z]{26})_([a-z]{1,12})_(\d{1,5})", re.ASCII)
_SEQ_MAX: Final = 32_767
_BEFORE_CHARGE: Final = (
    *("request_id", "kind", "seq", "organization_id", "project_id", "key_id", "secret_id"),
    *("model", "operation", "service_tier"),
    *UNIT_NAMES,
)
_AFTER_CHARGE: Final = (
    *("charge_price_id", "is_unpriced", "quality", "requests", "status", "outcome"),
    *("duration_ms", "first_byte_ms", "corrects_kind", "corrects_seq", "occurred_at", "booked_at"),
)
_TENANTS: Final = (*_BEFORE_CHARGE, "charge_nano_usd", *_AFTER_CHARGE)
_OPERATORS: Final = ("deployment", "price_id", "cost_nano_usd", "reported_cost_nano_usd", "note")
# In the order of the index a page is read, and no more. Left to itself PostgreSQL reads all that is left and sorts it
# where it takes that for little: for page after page, in a month that has grown since it last counted.
_IN_ORDER: Final = text(
    "SELECT set_config('enable_bitmapscan', 'off', true), set_config('enable_seqscan', 'off', true)"
)


class LedgerEntry(msgspec.Struct, frozen=True):
    """An entry as its organization sees it, in the order of the columns above. Money is exact: decimal US dollars.

    What the operator pays, and to whom, is not among it.
    """

    id: str
    request_id: str
    kind: str
    seq: int
    organization_id: str
    project_id: str
    api_key_id: str
    secret_id: str
    model: str
    operation: str
    service_tier: str
    input_tokens: int
    cached_input_tokens: int
    cache_write_tokens: int
    cache_write_1h_tokens: int
    input_audio_tokens: int
    input_image_tokens: int
    output_tokens: int
    reasoning_tokens: int
    output_audio_tokens: int
    output_image_tokens: int
    images: int
    audio_seconds: int
    charge_usd: str
    charge_price_id: str | None
    is_unpriced: bool
    quality: str
    requests: int
    status: int
    outcome: str
    duration_ms: int
    first_byte_ms: int | None
    corrects_kind: str | None
    corrects_seq: int | None
    occurred_at: datetime
    booked_at: datetime
    object: Literal["organization.ledger_entry"] = "organization.ledger_entry"


class OperatorEntry(LedgerEntry, frozen=True, kw_only=True):
    """An entry as the operator sees it: also what the provider takes, and says that it takes."""

    deployment: str
    price_id: str | None
    cost_usd: str
    reported_cost_usd: str | None
    note: str | None


class EntryFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which entries; an empty filter lets everything through. Times are those of the calls' ids, the end exclusive."""

    start_at: datetime | None = None
    end_at: datetime | None = None
    request_id: str | None = None
    project_ids: tuple[str, ...] = ()
    key_ids: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


class _Position(NamedTuple):
    request_id: str
    kind: str
    seq: int


async def read_rows(
    session: AsyncSession,
    chosen: EntryFilter,
    *,
    organization_id: OrganizationId,
    order: Order,
    after: str | None,
    count: int,
) -> Sequence[Sequence[Any]]:
    """Return the next *count* entries behind the one whose id is *after*, for `entry_of` or `operator_entry_of`.

    Errors: Invalid for what is no such id.
    """
    await session.execute(_IN_ORDER)
    statement = _select(chosen, organization_id=organization_id, order=order, after=after).limit(count)
    return (await session.execute(statement)).all()


def entry_of(row: Sequence[Any]) -> LedgerEntry:
    """Return the entry that was read as *row*, for its organization."""
    return LedgerEntry(*_tenants_fields(row))


def operator_entry_of(row: Sequence[Any]) -> OperatorEntry:
    """Return the entry that was read as *row*, for the operator."""
    deployment, price_id, cost, reported, note = row[len(_TENANTS) :]
    return OperatorEntry(
        *_tenants_fields(row),
        deployment=deployment,
        price_id=price_id,
        cost_usd=usd_text(cost),
        reported_cost_usd=None if reported is None else usd_text(reported),
        note=note,
    )


def _tenants_fields(row: Sequence[Any]) -> tuple[Any, ...]:
    charge = len(_BEFORE_CHARGE)
    name = f"{row[0]}_{row[1]}_{row[2]}"
    return (name, *row[:charge], usd_text(row[charge]), *row[charge + 1 : len(_TENANTS)])


def _select(
    chosen: EntryFilter, *, organization_id: OrganizationId, order: Order, after: str | None
) -> Select[*tuple[Any, ...]]:
    row = LedgerEntryRow
    key = (row.request_id, row.kind, row.seq)
    columns = [getattr(row, name) for name in (*_TENANTS, *_OPERATORS)]
    conditions = [row.organization_id == organization_id, *_conditions(chosen)]
    if after is not None:
        conditions.append(_behind(_position(after), order))
    is_newest_first = order == "newest first"
    return (
        select(*columns).where(*conditions).order_by(*(part.desc() if is_newest_first else part.asc() for part in key))
    )


def _conditions(chosen: EntryFilter) -> list[ColumnElement[bool]]:
    row = LedgerEntryRow
    conditions: list[ColumnElement[bool]] = []
    if chosen.start_at is not None:
        conditions.append(row.request_id >= id_range_start("req", chosen.start_at))
    if chosen.end_at is not None:
        conditions.append(row.request_id < id_range_start("req", chosen.end_at))
    if chosen.request_id is not None:
        conditions.append(row.request_id == chosen.request_id)
    columns = ((row.project_id, chosen.project_ids), (row.key_id, chosen.key_ids), (row.model, chosen.models))
    return conditions + [is_one_of(column, names) for column, names in columns if names]


def _behind(position: _Position, order: Order) -> ColumnElement[bool]:
    """Return the condition. Its first half follows from the second: by it PostgreSQL leaves out whole months."""
    row = LedgerEntryRow
    key = tuple_(row.request_id, row.kind, row.seq)
    if order == "newest first":
        return and_(row.request_id <= position.request_id, key < position)
    return and_(row.request_id >= position.request_id, key > position)


def _position(entry_id: str) -> _Position:
    found = _ENTRY_ID.fullmatch(entry_id)
    if found is None or int(found[3]) > _SEQ_MAX:
        raise Invalid("Invalid 'after': expected the id of an entry.", param="after")
    return _Position(found[1], found[2], int(found[3]))
