"""Corrections and credits that an operator makes by hand: entries like all others, with a note that says why.

Nothing is changed: an adjustment is a difference beside the call's entry, a credit an amount of its own. Windows and
budgets follow in the same transaction, hard budgets in Redis within seconds (`metering.reconcile`).
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import msgspec
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import KeyId, OrganizationId, ProjectId, new_id
from core.plain_sql import fetch
from keys.dimensions import BUDGET_LIMIT_MAX
from keys.errors import TenantNotFound
from keys.lifecycle import require_scope_target
from keys.tables import KeyRow
from metering import partitions
from metering.entries import SETTLE, Attribution, Entry, EntryKind, Result, settle_arguments
from metering.errors import AdjustmentInvalid, EntryNotFound
from metering.tables import LedgerEntryRow
from metering.usage import NO_UNITS

ADJUSTED: Final = "operator_adjustment"
CREDITED: Final = "operator_credit"
# The first adjustment's place is kept for what the call's own gateway may come to know (metering/corrections.py).
_FIRST_SEQ: Final = 2
_REASON_CHARACTERS_MAX: Final = 1_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Booked(msgspec.Struct, frozen=True, kw_only=True):
    """An entry that an operator has made. What a credit does not concern is empty."""

    request_id: str
    kind: EntryKind
    seq: int
    organization_id: OrganizationId
    project_id: str
    key_id: str
    model: str
    cost_nano_usd: int
    charge_nano_usd: int
    occurred_at: datetime
    note: str


class CallStanding(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the ledger for one call: the sum of its entries."""

    request_id: str
    organization_id: OrganizationId
    project_id: str
    key_id: str
    model: str
    occurred_at: datetime
    entries: int
    cost_nano_usd: int
    charge_nano_usd: int


async def standing(session: AsyncSession, request_id: str) -> CallStanding:
    """Return what a call is charged by now. Errors: EntryNotFound."""
    row = await _usage(session, request_id)
    organization_id = OrganizationId(row.organization_id)
    count, cost, charge = await _sums(session, request_id, organization_id=organization_id)
    return CallStanding(
        request_id=request_id,
        organization_id=organization_id,
        project_id=row.project_id,
        key_id=row.key_id,
        model=row.model,
        occurred_at=row.occurred_at,
        entries=count,
        cost_nano_usd=cost,
        charge_nano_usd=charge,
    )


async def adjust(
    session: AsyncSession, request_id: str, *, charge_nano_usd: int, cost_nano_usd: int = 0, reason: str
) -> Booked:
    """Add to what a call is charged, and to what it costs; below 0 takes away. It counts when the call began.

    Errors: EntryNotFound, AdjustmentInvalid.
    """
    _require(reason, charge_nano_usd, cost_nano_usd)
    row = await _usage(session, request_id)
    while True:
        seq = await _next_seq(session, request_id, organization_id=OrganizationId(row.organization_id))
        result = Result(
            kind="adjustment",
            seq=seq,
            service_tier=row.service_tier,
            quality="exact",
            is_unpriced=False,
            requests=0,
            status=row.status,
            outcome=ADJUSTED,
            corrects_kind="usage",
            corrects_seq=0,
        )
        started_ms = (row.occurred_at - _EPOCH) // timedelta(milliseconds=1)
        attribution = Attribution(*(getattr(row, name) for name in Attribution._fields))
        entry = Entry(request_id, attribution, result, NO_UNITS, cost_nano_usd, charge_nano_usd, started_ms)
        if await _enter(session, entry, reason):
            return _booked(entry, reason)
        # Somebody else has just taken the place.


async def credit(
    session: AsyncSession,
    amount_nano_usd: int,
    *,
    organization_id: OrganizationId,
    project_id: ProjectId | None = None,
    key_id: KeyId | None = None,
    reason: str,
) -> Booked:
    """Give an organization *amount_nano_usd* back, in the present period; for a project or key, to its budgets too.

    Errors: TenantNotFound, AdjustmentInvalid.
    """
    if amount_nano_usd <= 0:
        raise AdjustmentInvalid("A credit is an amount above 0.")
    _require(reason, amount_nano_usd)
    if key_id is not None:
        project_id = await _project_of(session, key_id, project_id, organization_id=organization_id)
    elif project_id is not None:
        await require_scope_target(session, "project", project_id, organization_id=organization_id)
    else:
        await require_scope_target(session, "organization", organization_id, organization_id=organization_id)
    owner = (organization_id, project_id or "", key_id or "", "")
    attribution = Attribution(
        *owner, model="credit", deployment="", operation="credit", price_id=None, charge_price_id=None
    )
    result = Result("credit", 0, "default", "exact", is_unpriced=False, requests=0, status=0, outcome=CREDITED)
    now_ms = time.time_ns() // 1_000_000
    entry = Entry(new_id("req"), attribution, result, NO_UNITS, 0, -amount_nano_usd, now_ms)
    await partitions.make_for(partial(fetch, session), [entry.request_id])
    await _enter(session, entry, reason)
    return _booked(entry, reason)


async def _usage(session: AsyncSession, request_id: str) -> LedgerEntryRow:
    """Return the entry that the call's gateway made, or a worker in its place. Errors: EntryNotFound."""
    row = await session.get(LedgerEntryRow, (request_id, "usage", 0))
    if row is None:
        raise EntryNotFound
    return row


async def _sums(session: AsyncSession, request_id: str, *, organization_id: OrganizationId) -> tuple[int, int, int]:
    """Return how many entries a call has, what it costs and what it is charged."""
    row = LedgerEntryRow
    sums = select(func.count(), func.sum(row.cost_nano_usd), func.sum(row.charge_nano_usd))
    of_call = (row.organization_id == organization_id, row.request_id == request_id)
    count, cost, charge = (await session.execute(sums.where(*of_call))).one()
    return count, int(cost), int(charge)


async def _next_seq(session: AsyncSession, request_id: str, *, organization_id: OrganizationId) -> int:
    row = LedgerEntryRow
    of_call = (row.organization_id == organization_id, row.request_id == request_id, row.kind == "adjustment")
    return max(await session.scalar(select(func.max(row.seq)).where(*of_call)) or 0, _FIRST_SEQ - 1) + 1


async def _project_of(
    session: AsyncSession, key_id: KeyId, project_id: ProjectId | None, *, organization_id: OrganizationId
) -> ProjectId:
    """Return the key's project. Errors: TenantNotFound, also when it is not *project_id*."""
    found = await session.scalar(
        select(KeyRow.project_id).where(KeyRow.organization_id == organization_id, KeyRow.id == key_id)
    )
    if found is None or project_id not in {None, found}:
        raise TenantNotFound("key")
    return ProjectId(found)


async def _enter(session: AsyncSession, entry: Entry, reason: str) -> bool:
    """Enter *entry*; tell whether its place was free."""
    # The note is the column's default, for as long as it is set.
    await session.execute(select(func.set_config("aap.entry_note", reason.strip(), True)))
    [[count]] = await fetch(session, SETTLE, *settle_arguments([entry]))
    await session.execute(select(func.set_config("aap.entry_note", "", True)))
    return count == 1


def _require(reason: str, *amounts: int) -> None:
    if not reason.strip() or len(reason) > _REASON_CHARACTERS_MAX or not reason.isprintable():
        raise AdjustmentInvalid(f"Give a reason: one line of at most {_REASON_CHARACTERS_MAX} characters.")
    if not any(amounts):
        raise AdjustmentInvalid("An adjustment of nothing changes nothing.")
    if any(abs(amount) > BUDGET_LIMIT_MAX for amount in amounts):
        raise AdjustmentInvalid("Amounts are at most nine million US dollars.")


def _booked(entry: Entry, reason: str) -> Booked:
    named: dict[str, Any] = {name: getattr(entry.attribution, name) for name in ("project_id", "key_id", "model")}
    return Booked(
        request_id=entry.request_id,
        kind=entry.result.kind,
        seq=entry.result.seq,
        organization_id=OrganizationId(entry.attribution.organization_id),
        **named,
        cost_nano_usd=entry.cost_nano_usd,
        charge_nano_usd=entry.charge_nano_usd,
        occurred_at=_EPOCH + timedelta(milliseconds=entry.started_ms),
        note=reason.strip(),
    )
