"""What one statement does: intents leave, entries come, and windows and budgets grow by exactly those."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.database import Database
from core.ids import id_range_start, new_id
from core.money import NanoUsd
from core.writer import Writer
from keys.dimensions import BudgetPeriod, BudgetScope
from metering import partitions
from metering.budgets import list_events, list_standings, set_budget
from metering.corrections import correct
from metering.entries import INTEND, LOST, SETTLE, Entry, intend_arguments, settle_arguments
from metering.usage import UNIT_NAMES, Units
from tests.metering.conftest import Books, now_ms

SUMS = ("requests", "cost_nano_usd", "charge_nano_usd", *UNIT_NAMES)


async def settle(books: Books, *entries: Entry) -> int:
    rows = await books.run(SETTLE, *settle_arguments(entries))
    return rows[0][0]


async def test_an_entry_comes_and_its_intent_leaves(books: Books) -> None:
    intent = books.intent()
    await books.run(INTEND, *intend_arguments("gw_1", [intent]))
    assert [row["request_id"] for row in await books.intents()] == [intent.request_id]
    units = Units(**{name: number for number, name in enumerate(UNIT_NAMES, 1)})
    assert await settle(books, books.entry(intent.request_id, units=units, cost=7, charge=9)) == 1
    [entry] = await books.entries()
    assert {name: entry[name] for name in UNIT_NAMES} == {name: getattr(units, name) for name in UNIT_NAMES}
    assert (entry["cost_nano_usd"], entry["charge_nano_usd"], entry["quality"], entry["status"]) == (7, 9, "exact", 200)
    assert await books.intents() == []


async def test_what_is_sent_again_is_entered_once_and_counted_once(books: Books) -> None:
    entries = [books.entry() for _ in range(5)]
    assert await settle(books, *entries) == 5
    assert await settle(books, *entries, books.entry(cost=1)) == 1
    assert await settle(books, *entries) == 0
    [window] = await books.windows()
    assert (window["requests"], window["cost_nano_usd"]) == (6, 501)


async def test_several_gateways_at_once_lose_and_double_nothing(books: Books, stores: object) -> None:
    """Guarantee: batches that overlap and come in any order, on connections of their own, leave the true sums."""
    entries = [books.entry(model=f"m{number % 7}") for number in range(200)]
    writers = [Writer(stores.database_url, statement_seconds_max=30) for _ in range(4)]  # type: ignore[attr-defined]

    async def send(writer: Writer, seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(10):
            await writer.fetch(SETTLE, *settle_arguments(chosen.sample(entries, 60)))

    await asyncio.gather(*(send(writer, seed) for seed, writer in enumerate(writers)))
    await settle(books, *entries)
    windows = await books.windows()
    assert len(await books.entries()) == 200
    assert sum(window["cost_nano_usd"] for window in windows) == 200 * 100
    assert await books.windows(60) == [{**window, "seconds": 60} for window in windows] or len(windows) == 7
    await asyncio.gather(*(writer.close() for writer in writers))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(
        st.tuples(
            st.integers(0, 3 * 86_400),
            st.sampled_from(["a", "b"]),
            st.integers(0, 10**12),
            st.integers(0, 10_000_000),
            st.integers(0, 10_000_000),
        ),
        min_size=1,
        max_size=30,
    )
)
async def test_windows_are_the_sums_of_their_entries(books: Books, calls: list[tuple[int, str, int, int, int]]) -> None:
    entries = [
        books.entry(
            units=Units(input_tokens=tokens, reasoning_tokens=more, images=tokens % 3),
            cost=cost,
            charge=cost // 2,
            started_ms=now_ms() - seconds * 1000,
            model=model,
        )
        for seconds, model, cost, tokens, more in calls
    ]
    await settle(books, *entries)
    stored = await books.entries()
    for seconds in (60, 3600):
        expected: dict[tuple[object, object], dict[str, int]] = {}
        for entry in stored:
            at = entry["occurred_at"].timestamp() // seconds * seconds
            sums = expected.setdefault((at, entry["model"]), dict.fromkeys(SUMS, 0))
            for name in SUMS:
                sums[name] += entry[name]
        found = {
            (window["starts_at"].timestamp(), window["model"]): {name: window[name] for name in SUMS}
            for window in await books.windows(seconds)
        }
        assert found == expected


async def test_a_further_attempt_replaces_the_intent(books: Books) -> None:
    intent = books.intent()
    await books.run(INTEND, *intend_arguments("gw_1", [intent]))
    other = books.intent(intent.request_id, prompt=99)
    await books.run(INTEND, *intend_arguments("gw_2", [other]))
    [row] = await books.intents()
    assert (row["gateway_id"], row["prompt_tokens"]) == ("gw_2", 99)


async def test_entries_and_prices_refuse_update_delete_and_truncate(books: Books) -> None:
    await settle(books, books.entry())
    for statement in (
        "UPDATE ledger_entries SET cost_nano_usd = 0",
        "DELETE FROM ledger_entries",
        "TRUNCATE ledger_entries",
        f"DELETE FROM {partitions.name_of(datetime.now(UTC))}",
        "TRUNCATE prices",
    ):
        with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
            await books.run(statement)


async def test_a_month_without_a_partition_is_refused_until_it_is_made(books: Books) -> None:
    moment = datetime(2031, 5, 17, tzinfo=UTC)
    entry = books.entry(id_range_start("req", moment) + "0000000000000000")
    with pytest.raises(asyncpg.CheckViolationError):
        await settle(books, entry)
    assert await partitions.make_for(books.run, [entry.request_id]) == ["ledger_entries_2031_05"]
    assert await partitions.make_for(books.run, [entry.request_id]) == []
    assert await settle(books, entry) == 1
    first = id_range_start("req", datetime(2031, 5, 1, tzinfo=UTC))
    last = id_range_start("req", datetime(2031, 6, 1, tzinfo=UTC) - timedelta(milliseconds=1))
    for request_id in (first + "0" * 16, last + "z" * 16):
        assert await settle(books, books.entry(request_id)) == 1


class TestBudgets:
    async def set(
        self, database: Database, books: Books, scope: BudgetScope, limit: int, period: BudgetPeriod = "month"
    ) -> None:
        tenant = books.tenant
        target = {"organization": tenant.organization_id, "project": tenant.project_id, "key": tenant.key_id}[scope]
        async with database.transaction() as session:
            await set_budget(
                session,
                (scope, target),
                period,
                limit=NanoUsd(limit),
                is_hard=False,
                organization_id=tenant.organization_id,
            )

    async def spent(self, database: Database, books: Books) -> list[int]:
        async with database.transaction() as session:
            found = await list_standings(session, datetime.now(UTC), organization_id=books.tenant.organization_id)
        return [one.spent_nano_usd for one in found]

    async def test_every_scope_and_period_counts_what_is_charged(self, database: Database, books: Books) -> None:
        for scope in ("organization", "project", "key"):
            for period in ("day", "week", "month", "total"):
                await self.set(database, books, scope, 1_000, period)
        await settle(books, books.entry(cost=1, charge=30), books.entry(cost=1, charge=12))
        assert await self.spent(database, books) == [42] * 12

    async def test_a_new_budget_counts_what_was_charged_before(self, database: Database, books: Books) -> None:
        await settle(books, books.entry(charge=30), books.entry(charge=5, started_ms=now_ms() - 400 * 86_400_000))
        await self.set(database, books, "key", 1_000)
        await self.set(database, books, "key", 1_000, "total")
        assert await self.spent(database, books) == [30, 35]

    async def test_a_budget_that_is_made_under_load_counts_everything_once(
        self, database: Database, books: Books, writer: Writer
    ) -> None:
        """Guarantee: no settlement falls between the sum of the past and the budget's first day."""

        async def load() -> None:
            for _ in range(40):
                await settle(books, *(books.entry(charge=1) for _ in range(5)))

        running = asyncio.create_task(load())
        for period in ("day", "week", "month", "total"):
            await self.set(database, books, "organization", 10**9, period)
        await running
        assert await self.spent(database, books) == [200] * 4

    async def test_each_threshold_is_told_once_a_period(self, database: Database, books: Books) -> None:
        await self.set(database, books, "organization", 100)

        async def told() -> list[int]:
            async with database.transaction() as session:
                rows = await list_events(session, 50, organization_id=books.tenant.organization_id)
            return sorted(row.threshold_percent for row in rows)

        for charge, expected in (
            (49, []),
            (1, [50]),
            (20, [50]),
            (10, [50, 80]),
            (40, [50, 80, 100]),
            (5, [50, 80, 100]),
        ):
            await settle(books, books.entry(charge=charge))
            assert await told() == expected

    async def test_another_organizations_calls_do_not_count(
        self, database: Database, books: Books, writer: Writer, tenant: object
    ) -> None:
        await self.set(database, books, "organization", 100)
        await settle(Books(writer, tenant), Books(writer, tenant).entry())  # type: ignore[arg-type]
        assert await self.spent(database, books) == [0]


class TestLaterTruth:
    async def test_what_a_gateway_knows_better_stands_beside_the_estimate(self, books: Books) -> None:
        lost = books.entry(units=Units(input_tokens=10, output_tokens=3), cost=50, charge=60, outcome=LOST)
        truth = books.entry(lost.request_id, units=Units(input_tokens=8, output_tokens=9), cost=90, charge=55)
        await settle(books, lost)
        assert await settle(books, truth) == 0
        assert await correct(books.run, [truth]) == 1
        assert await correct(books.run, [truth]) == 0
        usage, adjustment = await books.entries()
        assert (usage["kind"], usage["outcome"], adjustment["kind"]) == ("usage", LOST, "adjustment")
        assert (adjustment["corrects_kind"], adjustment["corrects_seq"], adjustment["requests"]) == ("usage", 0, 0)
        assert [adjustment[name] for name in ("input_tokens", "output_tokens")] == [-2, 6]
        [window] = await books.windows()
        assert [window[name] for name in ("requests", "cost_nano_usd", "charge_nano_usd", "output_tokens")] == [
            1,
            90,
            55,
            9,
        ]

    async def test_what_was_exact_is_not_corrected(self, books: Books) -> None:
        first = books.entry()
        await settle(books, first)
        other = books.entry(first.request_id, cost=999)
        assert await settle(books, other) == 0
        assert await correct(books.run, [other]) == 0
        assert len(await books.entries()) == 1

    async def test_an_estimate_that_was_right_is_left_alone(self, books: Books) -> None:
        lost = books.entry(outcome=LOST)
        await settle(books, lost)
        assert await correct(books.run, [books.entry(lost.request_id, started_ms=lost.started_ms)]) == 0


def test_request_ids_and_partitions_agree_about_months() -> None:
    month = datetime(2026, 12, 1, tzinfo=UTC)
    assert partitions.month_after(month) == datetime(2027, 1, 1, tzinfo=UTC)
    assert partitions.month_before(datetime(2027, 1, 1, tzinfo=UTC)) == month
    assert partitions.month_named(partitions.name_of(month)) == month
    assert id_range_start("req", datetime.now(UTC) - timedelta(seconds=1)) < new_id("req")
    assert new_id("req") < id_range_start("req", datetime.now(UTC) + timedelta(seconds=1))
