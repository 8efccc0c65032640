"""Plans' unit prices over real sockets: what is charged is the plan's price, and another plan is another price."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal

import pytest

from core.database import Database
from core.money import usd_text
from metering.billing.plan_prices import keep_prices
from metering.rating import PriceTerms, Rates, Step
from tests.gateway import test_cli
from tests.gateway.test_cli import Cli
from tests.gateway.test_plans import put_on, say
from tests.harness.eventually import eventually
from tests.harness.place import Place, open_place
from tests.harness.provider import FakeProvider
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant

aap = test_cli.aap
PRICED = "priced-by-plan"
COST, CHARGE = Rates(input_tokens=10**9, output_tokens=10**9), Rates(input_tokens=3 * 10**9, output_tokens=3 * 10**9)


def terms(rates: Rates) -> PriceTerms:
    return PriceTerms(tiers={"default": (Step(rates=rates),)})


@pytest.fixture(scope="session")
async def place(
    stores: TestStores, shared_provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Place]:
    directory = tmp_path_factory.mktemp("plan-prices")
    more = "[plans.pro]\n[plans.free]\n"
    async with open_place(stores, shared_provider.base_url, directory, {PRICED: terms(COST)}, more) as made:
        async with made.database.transaction() as session:
            await keep_prices(session, {("pro", PRICED): terms(CHARGE)})
        yield made


async def test_what_is_charged_follows_the_plan(place: Place, provider: FakeProvider, tenant: Tenant) -> None:
    """Guarantee: the header and the ledger have the plan's price, from the first call on which the plan holds."""

    async def charged() -> tuple[int, int]:
        seen = len(await place.entries(tenant))
        answer = await say(place, tenant, model=PRICED)
        assert answer.status == 200
        rows = await eventually(lambda: entries_beyond(place, tenant, seen))
        assert Decimal(answer.headers["x-request-cost-usd"]) == Decimal(usd_text(rows[-1]["charge_nano_usd"]))
        return rows[-1]["cost_nano_usd"], rows[-1]["charge_nano_usd"]

    cost, charge = await charged()
    assert 0 < cost == charge
    await put_on(place, tenant, "pro")

    async def is_known() -> bool:
        return (await charged())[1] == 3 * cost

    # A price is read by gateways every few seconds.
    await eventually(is_known, 10)
    await put_on(place, tenant, "free")
    assert await charged() == (cost, cost)
    rows = await place.entries(tenant)
    named = {row["charge_price_id"]: row["price_id"] for row in rows}
    assert len(named) == 2


async def entries_beyond(place: Place, tenant: Tenant, count: int) -> list[dict[str, object]]:
    rows = await place.entries(tenant)
    return rows if len(rows) > count else []


class TestCommand:
    async def test_a_plans_prices_are_listed_apart(self, aap: Cli) -> None:
        (aap.directory / "aap.toml").write_text("")
        database = Database(aap.environ["DATABASE_URL"], connections_max=1)
        async with database.transaction() as session:
            await keep_prices(session, {("pro", "m"): terms(CHARGE)})
        await database.close()
        assert (await aap("prices", "list", "--json")).json() == []
        [own] = (await aap("prices", "list", "--plan", "pro", "--json")).json()
        assert (own["plan"], own["source"], own["model"]) == ("pro", "plan", "m")
        assert (await aap("prices", "list", "--plan", "pro", "--org", "o")).code == 2
