"""What `aap prices` does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from core.ids import OrganizationId
from core.money import usd_text
from gateway.catalog_file import CatalogFile
from gateway.cli.stores import Stores, chosen_organization, on_stores
from metering import prices
from metering.price_import import BUILTIN_PRICES, PriceChange, diff, import_prices, vanished
from metering.price_list import installed_price_list, read_price_list
from metering.prices import MANUAL, MissingPrice, PriceVersion
from metering.rating import DEFAULT_TIER, UNITS_PER_PRICE, PriceTerms, Rates, Step
from metering.usage import UNIT_NAMES

# More than this is likelier a mistake in the list than a provider's decision.
_CHANGE_PERCENT_MAX: Final = 50
_COUNTED: Final = frozenset({"images", "audio_seconds"})
_T = TypeVar("_T")


class PriceLine(msgspec.Struct, frozen=True):
    """A price as a row of a table: the default tier's, for short prompts, in US dollars."""

    model: str
    source: str
    input: str | None
    cached_input: str | None
    cache_write: str | None
    output: str | None
    image: str | None
    audio_second: str | None
    more: str
    effective_from: datetime
    id: str


class SetLine(msgspec.Struct, frozen=True):
    """One dimension of a price that was set."""

    price: str
    before: str | None
    now: str | None


class SetReport(msgspec.Struct, frozen=True):
    """A price that was set, and the one that was set before it."""

    id: str
    model: str
    organization_id: OrganizationId | None
    effective_from: datetime
    terms: PriceTerms
    before: PriceVersion | None
    is_in_catalog: bool


class ChangeLine(msgspec.Struct, frozen=True):
    """A price in a list that is not the imported one, in US dollars per million tokens."""

    model: str
    kind: str
    largest_change_percent: int | None
    input_before: str | None
    input: str | None
    output_before: str | None
    output: str | None


class ImportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an import did, or would do."""

    file: str
    digest: str
    is_dry: bool
    models: int
    imported: int
    changes: list[ChangeLine]
    held_back: list[str]
    vanished: list[str]
    incomplete: dict[str, tuple[str, ...]]
    skipped: int
    without_price: int
    rounded: int


def list_all(glob: str | None, org: str | None, plan: str | None, *, all_versions: bool) -> list[PriceVersion]:
    """Return everybody's prices, or an organization's own, or a plan's."""

    async def act(stores: Stores) -> list[PriceVersion]:
        organization_id = None if org is None else await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            found = await prices.list_prices(
                session, organization_id=organization_id, plan=plan, all_versions=all_versions
            )
        return [version for version in found if glob is None or fnmatchcase(version.model, glob)]

    return on_stores(act)


def set_price(model: str, rates: Mapping[str, int], org: str | None, effective_from: datetime | None) -> SetReport:
    """Set the price of a model from now on, or from later on; return it with the one that was set before."""
    terms = PriceTerms(tiers={DEFAULT_TIER: (Step(rates=Rates(**rates)),)})

    async def act(stores: Stores) -> SetReport:
        organization_id = None if org is None else await chosen_organization(stores, org)
        catalog = CatalogFile(stores.settings.config_path, os.environ).catalog
        async with stores.database.transaction() as session:
            present = await prices.list_prices(session, organization_id=organization_id, model=model, at=effective_from)
            made = await prices.add_price(
                session, model, terms, organization_id=organization_id, effective_from=effective_from
            )
        before = next((one for one in present if one.source == MANUAL), None)
        return SetReport(
            made.id, model, organization_id, made.effective_from, terms, before, catalog.find(model) is not None
        )

    return on_stores(act)


def import_list(file: Path | None, glob: str | None, *, is_dry: bool, accepts_all: bool) -> ImportReport:
    """Import a price list, except for changes that are too large; with *is_dry* only say what would be done.

    Errors: PriceListUnreadable.
    """

    async def act(stores: Stores) -> ImportReport:
        path = file or installed_price_list()
        listed = read_price_list(path)
        listed = msgspec.structs.replace(
            listed, prices=_matching(listed.prices, glob), incomplete=_matching(listed.incomplete, glob)
        )
        async with stores.database.transaction() as session:
            changes = await diff(session, {**_matching(BUILTIN_PRICES, glob), **listed.prices})
            gone = await vanished(session, listed.prices.keys() | listed.incomplete.keys())
            taken = [change for change in changes if accepts_all or not _is_large(change)]
            imported = len(taken) if is_dry else await import_prices(session, taken, listed.digest)
        return ImportReport(
            file=str(path),
            digest=listed.digest,
            is_dry=is_dry,
            models=len(listed.prices),
            imported=imported,
            changes=[_change_line(change) for change in changes],
            held_back=[] if accepts_all else [change.model for change in changes if _is_large(change)],
            vanished=list(_matching(dict.fromkeys(gone), glob)),
            incomplete=listed.incomplete,
            skipped=listed.skipped,
            without_price=listed.without_price,
            rounded=listed.rounded,
        )

    return on_stores(act)


def missing() -> list[MissingPrice]:
    """Return the models that were used without a price."""

    async def act(stores: Stores) -> list[MissingPrice]:
        async with stores.database.transaction() as session:
            return await prices.missing_prices(session)

    return on_stores(act)


def price_row(version: PriceVersion) -> PriceLine:
    """Return a price as a row of a table."""
    rates = version.terms.tiers[DEFAULT_TIER][0].rates
    return PriceLine(
        version.model,
        version.source,
        _usd(rates, "input_tokens"),
        _usd(rates, "cached_input_tokens"),
        _usd(rates, "cache_write_tokens"),
        _usd(rates, "output_tokens"),
        _usd(rates, "images"),
        _usd(rates, "audio_seconds"),
        ", ".join(_more(version.terms)),
        version.effective_from,
        version.id,
    )


def set_rows(report: SetReport) -> list[SetLine]:
    """Return what was set, dimension by dimension, beside what held before."""
    now = report.terms.tiers[DEFAULT_TIER][0].rates
    before = report.before.terms.tiers[DEFAULT_TIER][0].rates if report.before else Rates()
    lines = (SetLine(unit.replace("_", " "), _usd(before, unit), _usd(now, unit)) for unit in UNIT_NAMES)
    return [line for line in lines if line.before or line.now]


def _matching(by_model: Mapping[str, _T], glob: str | None) -> dict[str, _T]:
    return {model: value for model, value in by_model.items() if glob is None or fnmatchcase(model, glob)}


def _is_large(change: PriceChange) -> bool:
    return change.largest_change_percent is not None and change.largest_change_percent > _CHANGE_PERCENT_MAX


def _change_line(change: PriceChange) -> ChangeLine:
    old = change.old.tiers[DEFAULT_TIER][0].rates if change.old else Rates()
    new = change.new.tiers[DEFAULT_TIER][0].rates
    return ChangeLine(
        change.model,
        change.kind,
        change.largest_change_percent,
        _usd(old, "input_tokens"),
        _usd(new, "input_tokens"),
        _usd(old, "output_tokens"),
        _usd(new, "output_tokens"),
    )


def _usd(rates: Rates, unit: str) -> str | None:
    """Return a rate in US dollars, exactly: for one picture or second, or for a million tokens."""
    rate: int | None = getattr(rates, unit)
    if rate is None:
        return None
    if unit not in _COUNTED:
        return usd_text(rate)
    whole, rest = divmod(rate, UNITS_PER_PRICE)
    # A millionth of a nano-USD is the finest: six further decimals.
    finer = f"{rest:06d}".rstrip("0")
    text = usd_text(whole)
    if not finer:
        return text
    head, _, decimals = text.partition(".")
    return f"{head}.{decimals:0<9}{finer}"


def _more(terms: PriceTerms) -> Iterator[str]:
    """Yield what a row of the table does not show."""
    yield from (tier for tier in terms.tiers if tier != DEFAULT_TIER)
    yield from (f"above {step.above_input_tokens} tokens" for step in terms.tiers[DEFAULT_TIER][1:])
    shown = {"input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", *_COUNTED}
    rates = terms.tiers[DEFAULT_TIER][0].rates
    yield from (unit.replace("_", " ") for unit in UNIT_NAMES if unit not in shown and getattr(rates, unit) is not None)
