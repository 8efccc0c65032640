"""Prices: rows that are never changed, and what of them each process holds ready for its calls.

A price is the operator's (`manual`: for everybody, or for one organization), or a plan's, or comes from a list. What a
provider takes goes by the operator's price for the model, else by the list's; what an organization pays goes by its own
price, else by its plan's, else by the same as the cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Final

import msgspec
import structlog
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import Database
from core.ids import OrganizationId, new_id
from keys.lookup import require_organization
from metering.rating import DEFAULT_TIER, PriceTerms, Rates, Step
from metering.tables import PriceRow, SpendWindowRow

MANUAL: Final = "manual"
PLAN: Final = "plan"
PLAN_END: Final = "plan_end"
"""The source of a version that ends a plan's price: from then on there is none. (`metering/billing/plan_prices.py`)"""
_FOUND_MAX: Final = 50_000
_HOUR_SECONDS: Final = 3_600
NOTHING_PRICED: Final = PriceTerms(tiers={DEFAULT_TIER: (Step(rates=Rates()),)})
_log = structlog.get_logger(__name__)


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a price. Entries keep its id, so that they can be rated again."""

    id: str
    model: str
    terms: PriceTerms


class CallPrices(msgspec.Struct, frozen=True, kw_only=True):
    """What a call is rated by: for what the provider takes, and for what the organization pays. None: not known."""

    cost: Price | None
    charge: Price | None


class PriceVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A price as operators see it. It holds from *effective_from* until a later version does."""

    id: str
    model: str
    organization_id: OrganizationId | None
    plan: str | None
    source: str
    effective_from: datetime
    terms: PriceTerms


class MissingPrice(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose calls, or some of them, could not be priced, and in which hours that was."""

    model: str
    requests: int
    first_hour: datetime
    last_hour: datetime


async def add_price(
    session: AsyncSession,
    model: str,
    terms: PriceTerms,
    *,
    organization_id: OrganizationId | None = None,
    effective_from: datetime | None = None,
) -> PriceVersion:
    """Set what a model costs, from now or from a later time on: for everybody, or for one organization.

    A version that begins earlier than one that is there already never holds. Errors: TenantNotFound.
    """
    if organization_id is not None:
        await require_organization(session, organization_id=organization_id)
    row = PriceRow(
        id=new_id("price"),
        model=model,
        organization_id=organization_id,
        source=MANUAL,
        terms=msgspec.to_builtins(terms),
        # Not now(): that is when the transaction began, the same for all that it adds.
        effective_from=effective_from or func.clock_timestamp(),
    )
    session.add(row)
    await session.flush()
    await session.refresh(row)
    return version_of(row)


async def list_prices(
    session: AsyncSession,
    *,
    organization_id: OrganizationId | None,
    plan: str | None = None,
    model: str | None = None,
    at: datetime | None = None,
    all_versions: bool = False,
) -> list[PriceVersion]:
    """Return an organization's own prices, or a plan's, or (both None) everybody's: those in force *at* a time, or now.

    By model; with *all_versions* every one that there ever was or is to be, of each model the latest first.
    """
    # Of a plan all versions are one price, ended or not; of everybody's models a list's and the operator's are two.
    price = (PriceRow.model,) if plan is not None else (PriceRow.model, PriceRow.source)
    statement = select(PriceRow).where(
        PriceRow.organization_id.is_not_distinct_from(organization_id), PriceRow.plan.is_not_distinct_from(plan)
    )
    if model is not None:
        statement = statement.where(PriceRow.model == model)
    if not all_versions:
        # Now is PostgreSQL's: by another machine's clock, what was just set might not have begun.
        statement = statement.where(PriceRow.effective_from <= (at or func.clock_timestamp()))
        statement = statement.ext(distinct_on(*price))
    latest_first = (PriceRow.effective_from.desc(), PriceRow.id.desc())
    rows = await session.scalars(statement.order_by(*price, *latest_first))
    return [version_of(row) for row in rows if all_versions or row.source != PLAN_END]


async def get_prices_by_id(session: AsyncSession, ids: Collection[str]) -> dict[str, Price]:
    """Return the versions that entries were rated by, as far as they are there. They never change."""
    rows = await session.scalars(select(PriceRow).where(PriceRow.id.in_(ids)))
    return {row.id: _price(row) for row in rows}


async def missing_prices(session: AsyncSession) -> list[MissingPrice]:
    """Return the models that were used without a price, of all organizations, most requests first."""
    window = SpendWindowRow
    requests = func.sum(window.unpriced_requests)
    rows = await session.execute(
        select(window.model, requests, func.min(window.starts_at), func.max(window.starts_at))
        .where(window.seconds == _HOUR_SECONDS, window.unpriced_requests > 0)
        .group_by(window.model)
        .order_by(requests.desc(), window.model)
    )
    return [
        MissingPrice(model=model, requests=int(count), first_hour=first, last_hour=last)
        for model, count, first, last in rows
    ]


class _Versions:
    """The versions of one price from now on, the earliest first."""

    def __init__(self) -> None:
        self._rows: list[tuple[datetime, str, Price | None]] = []

    def add(self, row: PriceRow) -> None:
        self._rows.append((row.effective_from, row.id, None if row.source == PLAN_END else _price(row)))
        self._rows.sort(key=lambda version: version[:2])

    def at(self, now: datetime) -> Price | None:
        """Return the one that holds; of two that began together the later id. None: none has begun, or it was ended."""
        held = [price for begins, _, price in self._rows if begins <= now]
        return held[-1] if held else None

    def begins_after(self, now: datetime) -> Iterable[datetime]:
        return (begins for begins, _, _ in self._rows if begins > now)


_Key = tuple[str | None, str | None, str, bool]
"""Organization, plan, model, and whether an operator set it by hand."""


class PriceBook:
    """The prices of this process's models. Asked on every call, without waiting; read anew when rows were added.

    While PostgreSQL is down, the book stays as it was: a price once in force remains one that was in force. A price for
    later takes effect when its time comes, without a reading.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._versions: Mapping[_Key, _Versions] = {}
        self._found: dict[tuple[str, str, tuple[str, ...], str | None], CallPrices | None] = {}
        self._seen: tuple[int | None, frozenset[str]] | None = None
        self._next_begins: datetime | None = None
        self._turns_at_seconds = math.inf
        self.is_loaded = False
        """Whether it was ever read: before that, that a price is missing means nothing."""

    def find(
        self, organization_id: OrganizationId, model: str, list_names: tuple[str, ...], plan: str | None = None
    ) -> CallPrices | None:
        """Return what a call of the catalog's *model* is rated by; None if no price is known for it at all.

        *list_names* are the names that lists may have for the deployment, the best first; *plan* is the organization's.
        """
        if self._turns_at_seconds != math.inf and self._clock.monotonic_seconds() >= self._turns_at_seconds:
            self._turn()
        key = (organization_id, model, list_names, plan)
        try:
            return self._found[key]
        except KeyError:
            if len(self._found) >= _FOUND_MAX:
                self._found.clear()
            found = self._found[key] = self._look_up(organization_id, model, list_names, plan)
            return found

    async def refresh(self, database: Database, names: Collection[str]) -> bool:
        """Take over what was added to the prices of *names* (models of the catalog and their names in lists).

        Tells whether there was anything to read. Cheap when there was not: to be called every few seconds.
        Errors: those of `core.database.DOWN`; the book then stays as it was.
        """
        wanted = frozenset(names)
        versions = None
        async with database.transaction() as session:
            # Rows are never removed, so that their number tells of every one that was added. The newest id would not:
            # one that was made earlier, or on another machine, may be committed later.
            seen = (await session.scalar(select(func.count()).select_from(PriceRow)), wanted)
            if seen != self._seen:
                versions = await _load(session, wanted, self._clock.now())
        if versions is not None:
            self._versions, self._seen = versions, seen
            self._found.clear()
            self.is_loaded = True
        # Also where nothing changed: clocks are set, and what is left until the next price begins is measured again.
        self._turn()
        return versions is not None

    def _turn(self) -> None:
        """Forget what was found if a price has begun since, and note when the next one does."""
        now = self._clock.now()
        if self._next_begins is not None and self._next_begins <= now:
            self._found.clear()
        coming = [begins for versions in self._versions.values() for begins in versions.begins_after(now)]
        self._next_begins = min(coming, default=None)
        left = math.inf if self._next_begins is None else (self._next_begins - now).total_seconds()
        self._turns_at_seconds = self._clock.monotonic_seconds() + left

    def _look_up(
        self, organization_id: OrganizationId, model: str, list_names: tuple[str, ...], plan: str | None
    ) -> CallPrices | None:
        now = self._clock.now()
        candidates: list[_Key] = [(None, None, model, True), *((None, None, name, False) for name in list_names)]
        cost = next((price for key in candidates if (price := self._at(key, now)) is not None), None)
        of_plan = None if plan is None else self._at((None, plan, model, False), now)
        charge = self._at((organization_id, None, model, True), now) or of_plan or cost
        return None if charge is None else CallPrices(cost=cost, charge=charge)

    def _at(self, key: _Key, now: datetime) -> Price | None:
        versions = self._versions.get(key)
        return None if versions is None else versions.at(now)


async def _load(session: AsyncSession, names: frozenset[str], now: datetime) -> dict[_Key, _Versions]:
    """Return the version of each price that holds at *now*, and all later ones."""
    wanted = PriceRow.model.in_(names)
    group = (PriceRow.model, PriceRow.organization_id, PriceRow.plan, PriceRow.source == MANUAL)
    present = await session.scalars(
        select(PriceRow)
        .where(wanted, PriceRow.effective_from <= now)
        .ext(distinct_on(*group))
        .order_by(*group, PriceRow.effective_from.desc(), PriceRow.id.desc())
    )
    later = await session.scalars(select(PriceRow).where(wanted, PriceRow.effective_from > now))
    found: dict[_Key, _Versions] = {}
    for row in [*present, *later]:
        key = (row.organization_id, row.plan, row.model, row.source == MANUAL)
        found.setdefault(key, _Versions()).add(row)
    return found


def version_of(row: PriceRow) -> PriceVersion:
    """Return a row as operators see it."""
    return PriceVersion(
        id=row.id,
        model=row.model,
        organization_id=None if row.organization_id is None else OrganizationId(row.organization_id),
        plan=row.plan,
        source=row.source,
        effective_from=row.effective_from,
        terms=terms_of(row.id, row.terms),
    )


def terms_of(price_id: str, stored: object) -> PriceTerms:
    """Return the terms in a row. Terms that cannot be read, such as a later release's, price nothing.

    They must not stop a gateway, and cannot be removed; nor may the price before them, or a list's, stand in for them.
    """
    try:
        return msgspec.convert(stored, PriceTerms)
    except msgspec.ValidationError as error:
        _log.error("price.not_understood", price_id=price_id, problem=str(error))
        return NOTHING_PRICED


def _price(row: PriceRow) -> Price:
    return Price(id=row.id, model=row.model, terms=terms_of(row.id, row.terms))
