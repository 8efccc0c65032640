"""Plans' unit prices: from the file to rows, from rows to what a call is charged, and never mistaken for others."""

from __future__ import annotations

import asyncio
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from core.clock import ManualClock
from core.configuration import ConfigurationInvalid
from core.ids import OrganizationId
from gateway.catalog_file import parse
from gateway.plan_file import PlanFile
from metering import partitions
from metering.billing.plan_prices import PlanPrices, keep_prices, wanted_of
from metering.billing.plans import Plans, build_plans
from metering.entries import SETTLE, settle_arguments
from metering.price_import import diff, import_prices
from metering.prices import PriceBook, PriceVersion, add_price, get_prices_by_id, list_prices
from metering.rating import PriceTerms, Rates, Step, rate
from metering.tables import PriceRow
from metering.usage import Units
from metering.verify import verify
from tests.metering.conftest import OwnBooks
from tests.metering.test_prices import costing, usd_of

ORGANIZATION = OrganizationId("org_1")
UNITS = Units(input_tokens=1_234, output_tokens=567)


def plans_of(**usd: int) -> Plans:
    """Plans, each with one price of the model `m` in US dollars."""
    lines = (f"[plans.{name}.prices.m]\ninput_usd_per_million = {value}" for name, value in usd.items())
    return build_plans(tomllib.loads("\n".join(lines)))


class Shop:
    """An operator whose file changes, a worker and a gateway."""

    def __init__(self, own: OwnBooks) -> None:
        self.own = own
        self.clock = ManualClock(datetime.now(UTC) + timedelta(minutes=1))
        self.book = PriceBook(self.clock)

    async def keep(self, plans: Plans) -> int:
        async with self.own.database.transaction() as session:
            return await keep_prices(session, wanted_of(plans))

    async def set(self, usd: int, *, organization_id: OrganizationId | None = None) -> None:
        async with self.own.database.transaction() as session:
            await add_price(session, "m", costing(usd), organization_id=organization_id)

    async def found(self, plan: str | None, *, by: OrganizationId = ORGANIZATION) -> tuple[int | None, int | None]:
        """What a call costs and is charged, in USD per million."""
        await self.book.refresh(self.own.database, ["m"])
        found = self.book.find(by, "m", ("p/m",), plan)
        return (None, None) if found is None else (usd_of(found.cost), usd_of(found.charge))

    async def listed(self, plan: str | None = None, *, all_versions: bool = False) -> list[PriceVersion]:
        async with self.own.database.transaction() as session:
            return await list_prices(session, organization_id=None, plan=plan, all_versions=all_versions)

    async def rows(self) -> int:
        async with self.own.database.transaction() as session:
            return await session.scalar(select(func.count()).select_from(PriceRow)) or 0


@pytest.fixture
def shop(own: OwnBooks) -> Shop:
    return Shop(own)


class TestResolution:
    async def test_its_own_price_then_its_plans_then_the_cost(self, shop: Shop) -> None:
        """Guarantee: what is charged goes from the nearest to the farthest, and the cost is the same for all."""
        mine = shop.own.books.tenant.organization_id
        assert await shop.found("pro") == (None, None)
        await shop.set(1)
        assert await shop.found("pro") == (1, 1)
        await shop.keep(plans_of(pro=2, free=3))
        assert await shop.found("pro") == (1, 2)
        assert await shop.found("free") == (1, 3)
        assert [await shop.found(plan) for plan in (None, "other")] == [(1, 1), (1, 1)]
        await shop.set(5, organization_id=mine)
        assert await shop.found("pro", by=mine) == (1, 5)
        assert await shop.found("pro") == (1, 2)

    async def test_a_plans_price_is_no_cost(self, shop: Shop) -> None:
        """Guarantee: without a price for everybody the cost is unknown, whatever a plan charges."""
        await shop.keep(plans_of(pro=2))
        assert await shop.found("pro") == (None, 2)
        assert await shop.found("free") == (None, None)

    async def test_a_model_without_a_price_in_the_plan_costs_what_it_costs(self, shop: Shop) -> None:
        await shop.keep(plans_of(pro=2))
        async with shop.own.database.transaction() as session:
            await add_price(session, "other", costing(7))
        await shop.book.refresh(shop.own.database, ["m", "other"])
        found = shop.book.find(ORGANIZATION, "other", (), "pro")
        assert found is not None
        assert found.charge is found.cost

    async def test_where_no_plan_has_prices_nothing_changes(self, shop: Shop) -> None:
        """Guarantee: the charge is the cost's own object, so that a call is rated once."""
        await shop.set(1)
        await shop.book.refresh(shop.own.database, ["m"])
        found = shop.book.find(ORGANIZATION, "m", (), "pro")
        assert found is not None
        assert found.charge is found.cost
        assert shop.book.find(ORGANIZATION, "m", (), "pro") is found


class TestChanges:
    async def test_another_price_is_another_version(self, shop: Shop) -> None:
        assert [await shop.keep(plans_of(pro=2)) for _ in range(2)] == [1, 0]
        assert await shop.keep(plans_of(pro=3, free=1)) == 2
        assert await shop.found("pro") == (None, 3)
        versions = await shop.listed("pro", all_versions=True)
        assert [(usd_of_terms(one.terms), one.source) for one in versions] == [(3, "plan"), (2, "plan")]

    async def test_what_the_file_no_longer_has_is_ended_and_may_begin_again(self, shop: Shop) -> None:
        await shop.set(1)
        await shop.keep(plans_of(pro=2))
        assert [await shop.keep(plans_of()) for _ in range(2)] == [1, 0]
        assert await shop.found("pro") == (1, 1)
        assert await shop.listed("pro") == []
        assert [one.source for one in await shop.listed("pro", all_versions=True)] == ["plan_end", "plan"]
        assert await shop.keep(plans_of(pro=2)) == 1
        assert await shop.found("pro") == (1, 2)

    async def test_two_workers_that_start_together_write_once(self, shop: Shop) -> None:
        plans = plans_of(pro=2, free=3)
        assert sum(await asyncio.gather(*[shop.keep(plans) for _ in range(4)])) == 2

    async def test_a_worker_writes_when_its_file_changes_and_not_otherwise(self, shop: Shop, tmp_path: Path) -> None:
        """Guarantee: two workers with two files, as during a release, do not overrule each other in turns."""
        old, new = plans_of(pro=2), plans_of(pro=3)
        workers = [PlanPrices(shop.own.database, lambda plans=plans: plans) for plans in (old, new)]
        assert [await worker.keep() for _ in range(3) for worker in workers] == [1, 1, 0, 0, 0, 0]
        assert await shop.found("pro") == (None, 3)

    @pytest.mark.parametrize("text", [None, "[plans", "[plans.pro]\nprices = 3"], ids=["gone", "no toml", "wrong"])
    async def test_a_file_that_cannot_be_read_ends_nothing(self, shop: Shop, tmp_path: Path, text: str | None) -> None:
        """Guarantee: a worker that starts with a broken file, or with none, does not change what customers pay."""
        await shop.keep(plans_of(pro=2))
        path = tmp_path / "aap.toml"
        if text is not None:
            path.write_text(text)
        file = PlanFile(path)
        worker = PlanPrices(shop.own.database, file.known_plans)
        assert [await worker.keep() for _ in range(3)] == [0, 0, 0]
        path.write_text("[plans.pro.prices.m]\ninput_usd_per_million = 4")
        assert sum([await worker.keep() for _ in range(3)]) == 1
        assert await shop.found("pro") == (None, 4)

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(files=st.lists(st.dictionaries(st.sampled_from(["pro", "free"]), st.integers(0, 3)), max_size=6))
    async def test_the_last_file_is_what_holds(self, shop: Shop, files: list[dict[str, int]]) -> None:
        """Guarantee: whatever came before, after a round the prices are those of the file, and no round adds to that."""
        for file in files:
            await shop.keep(plans_of(**file))
            assert await shop.keep(plans_of(**file)) == 0
            for plan in ("pro", "free"):
                assert await shop.found(plan) == (None, file.get(plan))


class TestNobodyElses:
    async def test_lists_and_everybodys_prices_do_not_see_them(self, shop: Shop) -> None:
        """Guarantee: a plan's price is not listed as everybody's, and stops or changes no import of the same name."""
        await shop.keep(plans_of(pro=2))
        assert await shop.listed() == []
        assert await shop.listed(all_versions=True) == []
        async with shop.own.database.transaction() as session:
            changes = await diff(session, {"m": costing(9)})
            assert [change.kind for change in changes] == ["new"]
            assert await import_prices(session, changes, "d" * 64) == 1
        await shop.keep(plans_of(pro=4))
        async with shop.own.database.transaction() as session:
            assert await diff(session, {"m": costing(9)}) == []
        [everybodys] = await shop.listed()
        [plans] = await shop.listed("pro")
        assert (everybodys.source, everybodys.plan, plans.source, plans.plan) == ("litellm", None, "plan", "pro")
        await shop.book.refresh(shop.own.database, ["m", "x"])
        found = shop.book.find(ORGANIZATION, "x", ("m",))
        assert found is not None
        assert usd_of(found.cost) == 9

    async def test_an_entry_is_rated_again_by_the_price_that_it_names(self, shop: Shop) -> None:
        """Guarantee: `verify` agrees with what a plan charged, also after its price has changed and ended."""
        own, terms = shop.own, PriceTerms(tiers={"default": (Step(rates=Rates(input_tokens=1, output_tokens=3)),)})
        dear = msgspec.structs.replace(terms, tiers=costing(7, output=11).tiers)
        async with own.database.transaction() as session:
            cost_id = (await add_price(session, "m", terms)).id
            await keep_prices(session, {("pro", "m"): dear})
        await shop.book.refresh(own.database, ["m"])
        found = shop.book.find(own.books.tenant.organization_id, "m", (), "pro")
        assert found is not None
        assert found.charge is not None
        entry = own.books.entry(
            units=UNITS, cost=rate(UNITS, terms, None) or 0, charge=rate(UNITS, found.charge.terms, None)
        )
        named = entry.attribution._replace(price_id=cost_id, charge_price_id=found.charge.id)
        entry = msgspec.structs.replace(entry, attribution=named)
        await partitions.make_for(own.writer.fetch, [entry.request_id])
        await own.writer.fetch(SETTLE, *settle_arguments([entry]))
        await shop.keep(plans_of(pro=1))
        await shop.keep(plans_of())
        found_again = await verify(own.database)
        assert (found_again.rated, found_again.drifts) == (1, [])
        async with own.database.transaction() as session:
            again = await get_prices_by_id(session, [found.charge.id])
        assert again[found.charge.id].terms == dear

    def test_a_model_that_is_not_in_the_catalog_is_a_mistake(self) -> None:
        file = '[plans.p.prices.demmo]\ninput_usd_per_million = 1\n[plans.p.prices."demo"]\ninput_usd_per_million = 1'
        with pytest.raises(ConfigurationInvalid) as caught:
            parse(tomllib.loads(file), {})
        assert caught.value.problems == ["plans.p.prices.demmo: unknown, did you mean demo?"]


def usd_of_terms(terms: PriceTerms) -> int:
    return (rate(Units(input_tokens=1_000_000), terms, None) or 0) // 10**9
