"""Prices: rows that are never changed, the import that adds to them, and the book that each process reads from."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import ManualClock
from core.database import DOWN, Database
from core.ids import OrganizationId, new_id
from keys.errors import TenantNotFound
from keys.tenants import create_organization
from metering import prices
from metering.price_import import BUILTIN_PRICES, PriceChange, diff, import_prices, vanished
from metering.price_list import PriceList, installed_price_list, read_price_list
from metering.prices import CallPrices, Price, PriceBook, add_price, get_prices_by_id, list_prices, missing_prices
from metering.rating import PriceTerms, Rates, Step, rate
from metering.tables import PriceRow
from metering.usage import Units
from tests.harness.gateway import free_port
from tests.harness.tenant import Tenant
from tests.harness.usage_rows import add_window

DIGEST = "d" * 64


def costing(usd_per_million: int, *, output: int | None = None, above: dict[int, int] | None = None) -> PriceTerms:
    """A price of input tokens, and of output tokens where it is given."""
    first = Rates(input_tokens=usd_per_million * 10**9, output_tokens=None if output is None else output * 10**9)
    later = (
        Step(above_input_tokens=bound, rates=Rates(input_tokens=usd * 10**9)) for bound, usd in (above or {}).items()
    )
    return PriceTerms(tiers={"default": (Step(rates=first), *later)})


def prioritised(terms: PriceTerms, usd_per_million: int) -> PriceTerms:
    return PriceTerms(tiers={**terms.tiers, "priority": costing(usd_per_million).tiers["default"]})


def usd_of(price: Price | None) -> int | None:
    return None if price is None else (rate(Units(input_tokens=1_000_000), price.terms, None) or 0) // 10**9


def fresh(name: str = "model") -> str:
    """A name that no other test uses: rows of prices stay."""
    return f"{name}-{new_id('x')}"


async def import_all(session: AsyncSession, wanted: dict[str, PriceTerms]) -> int:
    return await import_prices(session, await diff(session, wanted), DIGEST)


@pytest.fixture
def clock() -> ManualClock:
    # Behind PostgreSQL's clock a price that was just set would not hold yet.
    return ManualClock(datetime.now(UTC) + timedelta(minutes=1))


class TestRows:
    async def test_a_price_is_for_everybody_or_for_one_organization(self, session: AsyncSession) -> None:
        organization = await create_organization(session, "A")
        other = await create_organization(session, "B")
        model = fresh()
        public = await add_price(session, model, costing(1))
        own = await add_price(session, model, costing(2), organization_id=organization.id)
        assert (public.organization_id, own.organization_id, own.source) == (None, organization.id, "manual")
        assert await list_prices(session, organization_id=None, model=model) == [public]
        assert await list_prices(session, organization_id=organization.id) == [own]
        assert await list_prices(session, organization_id=other.id) == []

    async def test_a_price_for_nobody_is_refused(self, session: AsyncSession) -> None:
        with pytest.raises(TenantNotFound):
            await add_price(session, "m", costing(1), organization_id=OrganizationId("org_nope"))

    @pytest.mark.parametrize(
        "statement",
        [update(PriceRow).values(model="other"), delete(PriceRow), text("TRUNCATE prices CASCADE")],
        ids=["update", "delete", "truncate"],
    )
    async def test_nothing_is_ever_changed_or_removed(self, session: AsyncSession, statement: object) -> None:
        """Guarantee: an entry can be rated again by the price that it was rated by, for good."""
        await add_price(session, fresh(), costing(1))
        with pytest.raises(DBAPIError, match="append-only"):
            await session.execute(statement)  # type: ignore[call-overload]

    async def test_the_newest_that_has_begun_is_listed_and_all_are_on_request(self, session: AsyncSession) -> None:
        model, now = fresh(), datetime.now(UTC) + timedelta(minutes=1)
        first = await add_price(session, model, costing(1))
        second = await add_price(session, model, costing(2))
        third = await add_price(session, model, costing(3), effective_from=now + timedelta(days=1))

        async def listed(at: datetime | None = None, *, all_versions: bool = False) -> list[str]:
            found = await list_prices(session, organization_id=None, model=model, at=at, all_versions=all_versions)
            return [version.id for version in found]

        assert await listed() == await listed(now) == [second.id]
        assert await listed(now + timedelta(days=2)) == [third.id]
        assert await listed(all_versions=True) == [third.id, second.id, first.id]
        found = await get_prices_by_id(session, [first.id, second.id, "price_nope"])
        assert {price.id: usd_of(price) for price in found.values()} == {first.id: 1, second.id: 2}

    async def test_what_was_used_without_a_price_is_told_by_model_and_hour(self, session: AsyncSession) -> None:
        model, hour = fresh(), datetime(2026, 3, 1, 12, tzinfo=UTC)
        later = hour + timedelta(hours=5)
        for at, organization, unpriced in ((hour, "org_1", 2), (later, "org_2", 3), (later, "org_1", 0)):
            await add_window(session, organization, at, model=model, requests=9, unpriced_requests=unpriced)
        await add_window(session, "org_1", hour, seconds=60, model=model, unpriced_requests=2)
        await add_window(session, "org_1", hour, model=fresh("priced"))
        [found] = [one for one in await missing_prices(session) if model in one.model]
        assert (found.requests, found.first_hour, found.last_hour) == (5, hour, later)


@pytest.fixture(scope="module")
def installed() -> PriceList:
    return read_price_list(installed_price_list())


class TestImport:
    async def test_the_whole_list_of_litellm_and_once_only(self, session: AsyncSession, installed: PriceList) -> None:
        """Guarantee: importing a file again adds nothing, and what was imported is what the file says."""
        wanted = {**installed.prices, **BUILTIN_PRICES}
        changes = await diff(session, wanted)
        assert await import_prices(session, changes, installed.digest) == len(changes)
        assert await diff(session, wanted) == []
        assert await import_prices(session, changes, installed.digest) == 0
        assert wanted.keys().isdisjoint(await vanished(session, installed.prices))
        newest = {one.model: one for one in await list_prices(session, organization_id=None) if one.model in wanted}
        assert {model: one.terms for model, one in newest.items()} == wanted
        rows = await session.scalars(select(PriceRow).where(PriceRow.id.in_([one.id for one in newest.values()])))
        marks = {row.model: (row.source, row.source_digest) for row in rows}
        assert marks.pop("demo/demo") == ("builtin", None)
        assert set(marks.values()) == {("litellm", installed.digest)}

    async def test_only_what_differs_is_added_and_what_was_there_stays(self, session: AsyncSession) -> None:
        same, changed, gone = fresh("same"), fresh("changed"), fresh("gone")
        await import_all(session, {same: costing(1), changed: costing(2), gone: costing(3)})
        wanted = {same: costing(1), changed: costing(5)}
        [change] = await diff(session, wanted)
        assert change == PriceChange(
            model=changed, kind="changed", old=costing(2), new=costing(5), largest_change_percent=150
        )
        assert await import_prices(session, [change], DIGEST) == 1
        assert {same, changed}.isdisjoint(await vanished(session, wanted))
        assert gone in await vanished(session, wanted)
        versions = await session.scalar(select(func.count()).where(PriceRow.model == changed))
        assert versions == 2

    async def test_a_price_that_comes_back_to_what_it_was_is_a_new_version(self, session: AsyncSession) -> None:
        model = fresh()
        for usd in (1, 2, 1):
            assert await import_all(session, {model: costing(usd)}) == 1
        assert await import_all(session, {model: costing(1)}) == 0

    @pytest.mark.parametrize(
        ("old", "new", "percent"),
        [
            (costing(2), costing(1), 50),
            (costing(3), costing(4), 34),
            (costing(0), costing(1), 100),
            (costing(1), costing(1, output=9), 0),
            (costing(1, output=9), costing(1), 100),
            (costing(10), costing(10, above={200_000: 25}), 150),
            (costing(10, above={200_000: 20}), costing(10), 50),
            (costing(10, above={200_000: 20}), costing(10, above={100_000: 20}), 100),
            (costing(10), prioritised(costing(10), 25), 150),
            (prioritised(costing(10), 25), costing(10), 60),
        ],
    )
    async def test_the_largest_change_is_of_what_a_unit_costs(
        self, session: AsyncSession, old: PriceTerms, new: PriceTerms, percent: int
    ) -> None:
        """Guarantee: a step that is new or gone counts as the change that it is for long prompts."""
        model = fresh()
        await import_all(session, {model: old})
        [change] = await diff(session, {model: new})
        assert change.largest_change_percent == percent

    async def test_what_a_new_model_costs_is_no_change(self, session: AsyncSession) -> None:
        [change] = await diff(session, {fresh(): costing(7)})
        assert (change.kind, change.old, change.largest_change_percent) == ("new", None, None)

    async def test_two_who_import_at_once_add_one_version(self, database: Database) -> None:
        wanted = {fresh(): costing(index) for index in range(20)}

        async def once() -> int:
            async with database.transaction() as session:
                return await import_all(session, wanted)

        assert sorted(await asyncio.gather(*(once() for _ in range(3)))) == [0, 0, 20]

    async def test_what_the_operator_set_is_not_touched(self, session: AsyncSession) -> None:
        model = fresh()
        await add_price(session, model, costing(9))
        [change] = await diff(session, {model: costing(1)})
        assert change.kind == "new"


class Shelf:
    """A book on the worker's database, and an organization of its own."""

    def __init__(self, database: Database, clock: ManualClock, tenant: Tenant) -> None:
        self.database, self.tenant = database, tenant
        self.book = PriceBook(clock)

    async def set(
        self, model: str, usd: int, *, for_: OrganizationId | None = None, from_: datetime | None = None
    ) -> None:
        async with self.database.transaction() as session:
            await add_price(session, model, costing(usd), organization_id=for_, effective_from=from_)

    async def list(self, **usd: int) -> None:
        async with self.database.transaction() as session:
            await import_all(session, {name: costing(value) for name, value in usd.items()})

    async def refresh(self, *names: str) -> bool:
        return await self.book.refresh(self.database, names)

    def found(self, model: str, *names: str, by: OrganizationId | None = None) -> tuple[int | None, int | None] | None:
        """Cost and charge in USD per million; None where neither is known."""
        found = self.book.find(by or self.tenant.organization_id, model, names)
        return None if found is None else (usd_of(found.cost), usd_of(found.charge))


@pytest.fixture
def shelf(database: Database, clock: ManualClock, tenant: Tenant) -> Shelf:
    return Shelf(database, clock, tenant)


class TestBook:
    async def test_the_operators_price_wins_over_lists_and_the_first_list_name_over_others(self, shelf: Shelf) -> None:
        model, best, other = fresh(), fresh("p/best"), fresh("other")
        assert not shelf.book.is_loaded
        await shelf.refresh(model, best, other)
        assert shelf.book.is_loaded
        assert shelf.found(model, best, other) is None
        await shelf.list(**{other: 1})
        await shelf.refresh(model, best, other)
        assert shelf.found(model, best, other) == (1, 1)
        await shelf.list(**{best: 2})
        await shelf.refresh(model, best, other)
        assert shelf.found(model, best, other) == (2, 2)
        assert shelf.found(model, other) == (1, 1)
        await shelf.set(model, 3)
        await shelf.refresh(model, best, other)
        assert shelf.found(model, best, other) == (3, 3)

    async def test_an_organizations_own_price_is_what_it_pays_and_nobody_elses(self, shelf: Shelf) -> None:
        """Guarantee: the provider's cost stays the same, and no other organization sees the price."""
        model, mine = fresh(), shelf.tenant.organization_id
        await shelf.set(model, 5, for_=mine)
        await shelf.refresh(model)
        assert shelf.found(model) == (None, 5)
        assert shelf.found(model, by=OrganizationId("org_other")) is None
        await shelf.set(model, 3)
        await shelf.refresh(model)
        assert shelf.found(model) == (3, 5)
        assert shelf.found(model, by=OrganizationId("org_other")) == (3, 3)
        found = shelf.book.find(OrganizationId("org_other"), model, ())
        assert found is not None
        assert found.cost is found.charge

    async def test_a_name_in_a_list_is_no_name_of_the_catalog(self, shelf: Shelf) -> None:
        name = fresh()
        await shelf.list(**{name: 1})
        await shelf.refresh(name)
        assert shelf.found(name) is None
        assert shelf.found("alias", name) == (1, 1)

    async def test_a_price_for_later_takes_effect_by_the_clock(self, shelf: Shelf, clock: ManualClock) -> None:
        """Guarantee: at its moment, without a reading, for everybody's and for an organization's own."""
        model, mine = fresh(), shelf.tenant.organization_id
        await shelf.set(model, 1)
        await shelf.set(model, 2, from_=clock.now() + timedelta(hours=1))
        await shelf.set(model, 3, from_=clock.now() + timedelta(hours=2), for_=mine)
        await shelf.refresh(model)
        for step, found in ((3_599, (1, 1)), (1, (2, 2)), (3_599, (2, 2)), (1, (2, 3)), (10**6, (2, 3))):
            clock.advance(timedelta(seconds=step))
            assert shelf.found(model) == found
            assert shelf.found(model) == found

    async def test_a_clock_that_was_set_is_noticed_at_the_next_look(self, shelf: Shelf, clock: ManualClock) -> None:
        model = fresh()
        await shelf.set(model, 1)
        await shelf.set(model, 2, from_=clock.now() + timedelta(hours=1))
        await shelf.refresh(model)
        assert shelf.found(model) == (1, 1)
        clock._now += timedelta(hours=2)
        assert not await shelf.refresh(model)
        assert shelf.found(model) == (2, 2)

    async def test_of_two_that_begin_together_the_later_one_holds(self, shelf: Shelf, clock: ManualClock) -> None:
        model, moment = fresh(), clock.now() - timedelta(hours=1)
        async with shelf.database.transaction() as session:
            for serial, usd in (("b", 2), ("a", 1)):
                row = {"id": f"price_{serial}{new_id('x')}", "model": model, "source": "manual"}
                terms = {"tiers": {"default": [{"rates": {"input_tokens": usd * 10**9}}]}}
                await session.execute(insert(PriceRow), [{**row, "terms": terms, "effective_from": moment}])
        await shelf.refresh(model)
        assert shelf.found(model) == (2, 2)

    async def test_it_reads_only_when_something_was_added_or_other_names_are_wanted(self, shelf: Shelf) -> None:
        model, other = fresh(), fresh()
        await shelf.set(model, 1)
        assert await shelf.refresh(model)
        assert not await shelf.refresh(model)
        assert shelf.found(other) is None
        await shelf.set(other, 2)
        assert await shelf.refresh(model)
        assert shelf.found(other) is None
        assert await shelf.refresh(model, other)
        assert shelf.found(other) == (2, 2)

    async def test_a_row_whose_id_is_older_than_others_is_noticed(self, shelf: Shelf) -> None:
        """Guarantee: whoever commits last is seen, whenever and wherever the id was made."""
        model = fresh()
        await shelf.refresh(model)
        async with shelf.database.transaction() as session:
            terms = {"tiers": {"default": [{"rates": {"input_tokens": 4 * 10**9}}]}}
            row = {"id": f"price_000{new_id('x')}", "model": model, "source": "manual", "terms": terms}
            await session.execute(insert(PriceRow), [row])
        assert await shelf.refresh(model)
        assert shelf.found(model) == (4, 4)

    @pytest.mark.parametrize("terms", [{"tiers": {}}, {"tiers": {"default": [{"rates": {"thoughts": 1}}]}}, {}])
    async def test_terms_that_cannot_be_read_price_nothing_and_stop_nobody(
        self, shelf: Shelf, terms: dict[str, object]
    ) -> None:
        """Guarantee: a later release's price leaves calls unpriced; they are not rated by an older one, or a list's."""
        model, listed = fresh(), fresh()
        await shelf.set(model, 1)
        await shelf.list(**{listed: 2})
        async with shelf.database.transaction() as session:
            row = {"id": new_id("price"), "source": "manual", "terms": terms}
            await session.execute(insert(PriceRow), [{**row, "model": model}])
            row = {"id": new_id("price"), "source": "litellm", "terms": terms}
            await session.execute(insert(PriceRow), [{**row, "model": listed}])
        await shelf.refresh(model, listed)
        for found in (
            shelf.book.find(OrganizationId("org_1"), model, (listed,)),
            shelf.book.find(OrganizationId("org_1"), "other", (listed,)),
        ):
            assert found is not None
            assert found.charge is not None
            assert rate(Units(input_tokens=1), found.charge.terms, None) is None
        async with shelf.database.transaction() as session:
            assert [change.kind for change in await diff(session, {listed: costing(2)})] == ["changed"]

    async def test_while_postgresql_is_down_the_book_stays_as_it_was(self, shelf: Shelf) -> None:
        model = fresh()
        await shelf.set(model, 1)
        await shelf.refresh(model)
        down = Database(f"postgresql://u:p@127.0.0.1:{free_port()}/x", connections_max=1)
        with pytest.raises(DOWN):
            await shelf.book.refresh(down, [model])
        await down.close()
        assert shelf.book.is_loaded
        assert shelf.found(model) == (1, 1)

    async def test_what_is_remembered_is_bounded(self, shelf: Shelf) -> None:
        for number in range(prices._FOUND_MAX + 10):
            assert shelf.book.find(OrganizationId("org_1"), f"no such {number}", ()) is None
        assert len(shelf.book._found) <= prices._FOUND_MAX


owners = st.sampled_from([None, "A", "B", "C"])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    entries=st.lists(st.tuples(owners, st.sampled_from(["m1", "m2"]), st.integers(1, 50), st.booleans()), max_size=12),
    later=st.sets(st.integers(0, 11)),
)
async def test_no_organization_is_ever_given_anothers_price(
    database: Database, entries: list[tuple[str | None, str, int, bool]], later: Collection[int]
) -> None:
    """Guarantee: what an organization pays is its own newest price or else everybody's, and never a third one's."""
    clock, suffix = ManualClock(datetime.now(UTC) + timedelta(minutes=1)), new_id("x")
    async with database.transaction() as session:
        ids = {name: (await create_organization(session, name)).id for name in "ABC"}
        newest: dict[tuple[str | None, str], int] = {}
        for index, (owner, model, usd, is_listed) in enumerate(entries):
            begins = clock.now() + timedelta(days=1) if index in later else None
            name = f"{model}-{suffix}"
            if is_listed and owner is None:
                await import_all(session, {name: costing(usd)})
                continue
            own = None if owner is None else ids[owner]
            await add_price(session, name, costing(usd), organization_id=own, effective_from=begins)
            if begins is None:
                newest[owner, model] = usd
    book = PriceBook(clock)
    await book.refresh(database, [f"m1-{suffix}", f"m2-{suffix}"])
    for owner, organization_id in ids.items():
        for model in ("m1", "m2"):
            found = book.find(organization_id, f"{model}-{suffix}", ()) or CallPrices(cost=None, charge=None)
            cost = newest.get((None, model))
            assert (usd_of(found.cost), usd_of(found.charge)) == (cost, newest.get((owner, model), cost))
