"""`metering.verify`: whatever does not agree is found, and what only looks so is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from core.ids import new_id
from core.money import NanoUsd
from core.writer import Writer
from keys.dimensions import BudgetPeriod, BudgetScope
from metering import partitions
from metering.archive import archive_old
from metering.budgets import set_budget
from metering.corrections import correct
from metering.entries import INTEND, LOST, SETTLE, Entry, intend_arguments, settle_arguments
from metering.prices import add_price
from metering.rating import PriceTerms, Rates, Step, rate
from metering.usage import Units
from metering.verify import _PAGE_ROWS, Verification, verify
from metering.worker import _FORGET_MINUTES, MINUTES_KEPT
from tests.metering.conftest import OwnBooks, request_id_at

TERMS = PriceTerms(tiers={"default": (Step(rates=Rates(input_tokens=150_000_001, output_tokens=600_000_003)),)})
UNITS = Units(input_tokens=1_234, output_tokens=567)
PRICE = rate(UNITS, TERMS, "default") or 0
NOW = datetime.now(UTC)
SCOPES: tuple[BudgetScope, ...] = ("organization", "project", "key")
PERIODS: tuple[BudgetPeriod, ...] = ("day", "week", "month", "total")


async def settle(own: OwnBooks, *entries: Entry) -> None:
    await partitions.make_for(own.writer.fetch, [entry.request_id for entry in entries])
    await own.writer.fetch(SETTLE, *settle_arguments(entries))


async def priced(own: OwnBooks) -> None:
    """Have entries rated by a price that is there."""
    async with own.database.transaction() as session:
        own.books.price_id = (await add_price(session, "m", TERMS)).id


def entry_at(own: OwnBooks, moment: datetime, *, cost: int = PRICE, **facts: object) -> Entry:
    started_ms = int(moment.timestamp() * 1000)
    return own.books.entry(request_id_at(moment), units=UNITS, cost=cost, started_ms=started_ms, **facts)  # type: ignore[arg-type]


async def set_budgets(own: OwnBooks, scopes: Iterable[BudgetScope] = SCOPES) -> None:
    tenant = own.books.tenant
    ids = {"organization": tenant.organization_id, "project": tenant.project_id, "key": tenant.key_id}
    for scope in scopes:
        for period in PERIODS:
            async with own.database.transaction() as session:
                await set_budget(
                    session,
                    (scope, ids[scope]),
                    period,
                    limit=NanoUsd(10**12),
                    is_hard=False,
                    organization_id=tenant.organization_id,
                )


async def healthy(own: OwnBooks) -> list[Entry]:
    """Calls of two hours, refused, unpriced and lost ones among them; a correction, a credit, budgets."""
    await priced(own)
    books = own.books
    entries = [entry_at(own, NOW - timedelta(minutes=minutes), model=f"m{minutes % 2}") for minutes in range(0, 120, 9)]
    await settle(own, *entries[:7])
    await set_budgets(own)
    refused, unpriced = books.entry(units=Units(), cost=0), books.entry(cost=0)
    unpriced = msgspec.structs.replace(
        unpriced,
        attribution=books.attribution()._replace(price_id=None, charge_price_id=None),
        result=unpriced.result._replace(is_unpriced=True),
    )
    lost = entry_at(own, NOW, outcome=LOST)
    truth = books.entry(lost.request_id, units=Units(input_tokens=1_000), cost=150_001, started_ms=lost.started_ms)
    credit = books.entry(units=Units(), cost=0, charge=-9_000)
    credit = msgspec.structs.replace(credit, result=credit.result._replace(kind="credit", requests=0))
    await settle(own, *entries[7:], refused, unpriced, lost, credit)
    assert await correct(own.writer.fetch, [truth]) == 1
    return entries


async def found(own: OwnBooks, **how: object) -> list[str]:
    return [drift.what for drift in (await verify(own.database, **how)).drifts]  # type: ignore[arg-type]


async def test_a_healthy_book_agrees_and_was_looked_at(own: OwnBooks) -> None:
    await healthy(own)
    verification = await verify(own.database)
    assert verification.drifts == []
    rows = await own.writer.fetch("SELECT count(*) FROM ledger_entries")
    windows = await own.writer.fetch("SELECT count(*) FROM spend_windows")
    assert (verification.entries, verification.windows) == (rows[0][0], windows[0][0])
    assert (verification.budgets, verification.intents) == (12, 0)
    # All but the correction and the credit.
    assert verification.rated == verification.entries - 2


async def test_an_empty_book_agrees(own: OwnBooks) -> None:
    assert await verify(own.database) == Verification(entries=0, windows=0, budgets=0, intents=0, rated=0, drifts=[])


ONE_HOUR = "(SELECT ctid FROM spend_windows WHERE seconds = 3600 AND charge_nano_usd > 0 ORDER BY model LIMIT 1)"
ONE_MINUTE = "(SELECT ctid FROM spend_windows WHERE seconds = 60 AND charge_nano_usd > 0 ORDER BY starts_at LIMIT 1)"
NOBODYS_HOUR = (
    "INSERT INTO spend_windows (organization_id, seconds, starts_at, project_id, key_id, model, operation, service_tier,"
    " requests, unpriced_requests, cost_nano_usd, charge_nano_usd)"
    " VALUES ('org_x', 3600, {}, 'p', 'k', 'm', 'chat', 'default', {}, 0, 0, 0)"
)


class TestWindows:
    @pytest.mark.parametrize(
        "statement",
        [
            f"UPDATE spend_windows SET cost_nano_usd = cost_nano_usd + 1 WHERE ctid = {ONE_HOUR}",
            f"UPDATE spend_windows SET cost_nano_usd = cost_nano_usd - 1 WHERE ctid = {ONE_HOUR}",
            f"UPDATE spend_windows SET charge_nano_usd = charge_nano_usd + 1 WHERE ctid = {ONE_MINUTE}",
            f"UPDATE spend_windows SET requests = requests - 1 WHERE ctid = {ONE_MINUTE}",
            f"UPDATE spend_windows SET unpriced_requests = unpriced_requests + 1 WHERE ctid = {ONE_HOUR}",
            f"UPDATE spend_windows SET audio_seconds = 1 WHERE ctid = {ONE_HOUR}",
            f"UPDATE spend_windows SET output_tokens = output_tokens - 1 WHERE ctid = {ONE_HOUR}",
            f"UPDATE spend_windows SET model = 'another' WHERE ctid = {ONE_MINUTE}",
            f"DELETE FROM spend_windows WHERE ctid = {ONE_MINUTE}",
            NOBODYS_HOUR.format("date_trunc('hour', now())", 1),
            # Of a year in which there are no entries at all.
            NOBODYS_HOUR.format("'2020-01-01'", 0),
        ],
    )
    async def test_one_that_is_not_the_sum_of_its_entries_is_found(self, own: OwnBooks, statement: str) -> None:
        """Guarantee: too high, too low, in any number, missing, or of nothing."""
        await healthy(own)
        await own.writer.fetch(statement)
        drifts = await found(own, rerate=False)
        # A window that changed its name is missing under one and too many under the other.
        assert drifts in (["window"], ["window"] * 2)
        assert len(drifts) == 1 + ("model = 'another'" in statement)

    async def test_a_charge_that_is_gone_from_an_hour_is_missed_by_its_budgets_too(self, own: OwnBooks) -> None:
        await healthy(own)
        await own.writer.fetch(f"DELETE FROM spend_windows WHERE ctid = {ONE_HOUR}")
        assert set(await found(own)) == {"window", "budget"}

    async def test_an_entry_that_was_slipped_in_is_found(self, own: OwnBooks) -> None:
        await healthy(own)
        await own.writer.fetch(
            "INSERT INTO ledger_entries SELECT (jsonb_populate_record(e, jsonb_build_object('request_id', $1::text))).*"
            " FROM ledger_entries e WHERE outcome = 'done' AND charge_nano_usd > 0 LIMIT 1",
            new_id("req"),
        )
        # Its minute and its hour.
        assert await found(own) == ["window"] * 2

    async def test_a_drift_says_where_and_what(self, own: OwnBooks) -> None:
        await priced(own)
        await settle(own, entry_at(own, NOW))
        await own.writer.fetch("UPDATE spend_windows SET cost_nano_usd = 5 WHERE seconds = 3600")
        [drift] = (await verify(own.database)).drifts
        hour = NOW.replace(minute=0, second=0, microsecond=0).isoformat()
        tenant = own.books.tenant
        place = f"{tenant.organization_id} {tenant.project_id} {tenant.key_id} m chat default"
        assert drift.where == f"{place} {hour} +3600 s"
        assert drift.found == drift.expected.replace(f"cost_nano_usd={PRICE}", "cost_nano_usd=5")

    async def test_what_was_forgotten_after_a_week_is_not_missed(self, own: OwnBooks) -> None:
        """Guarantee: nor is a minute that a late correction has called back, in part."""
        await priced(own)
        old = [entry_at(own, NOW - timedelta(days=days), outcome=LOST) for days in (6, 7, 8, 20)]
        await settle(own, *old)
        assert await found(own) == []
        await own.writer.fetch(_FORGET_MINUTES, MINUTES_KEPT)
        assert await found(own) == []
        for entry in old:
            truth = msgspec.structs.replace(
                entry, cost_nano_usd=1, charge_nano_usd=1, result=entry.result._replace(outcome="done")
            )
            assert await correct(own.writer.fetch, [truth]) == 1
        assert await found(own) == []
        await own.writer.fetch(_FORGET_MINUTES, MINUTES_KEPT)
        assert await found(own) == []

    async def test_archived_months_are_not_missed_and_those_beside_them_are_looked_at(
        self, own: OwnBooks, tmp_path: Path
    ) -> None:
        """Guarantee: also where a call's id was made in one month and it began in the next, and the other way round."""
        await priced(own)
        january, february = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
        moment = timedelta(milliseconds=1)
        for made, began in (
            (january, january),
            (february - moment, february + moment),
            (february, february - moment),
            (february + timedelta(days=9), february + timedelta(days=9)),
        ):
            entry = msgspec.structs.replace(entry_at(own, began), request_id=request_id_at(made))
            await settle(own, entry)
        assert await found(own) == []
        [file] = await archive_old(own.writer, datetime(2026, 3, 3, tzinfo=UTC), 1, tmp_path)
        assert "2026_01" in file.name
        assert await found(own) == []
        # Somebody far behind brings a call of January: the month is there again, in part.
        await settle(own, entry_at(own, january + timedelta(days=1)))
        assert await found(own) == []
        await own.writer.fetch("UPDATE spend_windows SET images = 1 WHERE starts_at > '2026-02-05' AND seconds = 3600")
        assert await found(own) == ["window"]


class TestBudgets:
    @pytest.mark.parametrize(
        ("statement", "count"),
        [
            ("UPDATE budget_periods SET spent_nano_usd = spent_nano_usd + 1 WHERE starts_at = 'epoch'", 3),
            ("UPDATE budget_periods SET spent_nano_usd = 0", 12),
            ("DELETE FROM budget_periods WHERE starts_at = 'epoch'", 3),
            ("INSERT INTO budget_periods SELECT id, '2100-01-01', 5 FROM budgets WHERE scope = 'key'", 4),
        ],
    )
    async def test_a_period_that_is_not_the_sum_of_its_windows_is_found(
        self, own: OwnBooks, statement: str, count: int
    ) -> None:
        await priced(own)
        await settle(own, entry_at(own, NOW))
        await set_budgets(own)
        # A period is looked at from the moment on in which its budget surely counted.
        await own.writer.fetch("UPDATE budgets SET created_at = created_at - interval '1 hour'")
        assert await found(own) == []
        await own.writer.fetch(statement)
        assert await found(own) == ["budget"] * count

    async def test_periods_meet_at_their_borders(self, own: OwnBooks) -> None:
        """Guarantee: the last moment of a day, week and month counts there, the first one of the next in the next."""
        await priced(own)
        await set_budgets(own)
        await own.writer.fetch("UPDATE budgets SET created_at = '2026-01-01'")
        borders = [datetime(2026, month, day, tzinfo=UTC) for month, day in ((3, 1), (3, 2), (4, 1), (5, 11))]
        for border in borders:
            await settle(own, entry_at(own, border), entry_at(own, border - timedelta(milliseconds=1)))
        assert await found(own) == []

    async def test_what_comes_late_for_a_period_before_the_budget_was_made_is_no_drift(self, own: OwnBooks) -> None:
        await priced(own)
        long_ago = NOW - timedelta(days=40)
        await settle(own, entry_at(own, long_ago))
        await set_budgets(own)
        await settle(own, entry_at(own, long_ago), entry_at(own, NOW))
        assert await found(own) == []


class TestIntents:
    async def intend(self, own: OwnBooks, request_id: str | None = None, *, age: timedelta, gateway: str) -> None:
        intent = own.books.intent(request_id)
        await own.writer.fetch(INTEND, *intend_arguments(gateway, [intent]))
        await own.writer.fetch(
            "UPDATE usage_intents SET checkpoint_at = now() - $2::interval WHERE request_id = $1",
            intent.request_id,
            age,
        )

    async def found(self, own: OwnBooks) -> list[str]:
        # This PostgreSQL came up a moment ago, and has not heard of anybody for long yet.
        drifts = (await verify(own.database, overdue=timedelta(milliseconds=10))).drifts
        return [drift.expected.partition(":")[0] for drift in drifts if drift.what == "intent"]

    async def test_a_running_call_is_no_drift(self, own: OwnBooks) -> None:
        await self.intend(own, age=timedelta(seconds=3), gateway="gw_1")
        verification = await verify(own.database)
        assert (verification.intents, verification.drifts) == (1, [])

    async def test_a_call_that_nobody_has_settled_is_found(self, own: OwnBooks) -> None:
        await self.intend(own, age=timedelta(hours=1), gateway="gw_1")
        assert await self.found(own) == ["an entry"]

    async def test_so_is_one_that_its_living_gateway_has_forgotten(self, own: OwnBooks) -> None:
        await self.intend(own, age=timedelta(hours=1), gateway="gw_1")
        await own.writer.fetch("INSERT INTO gateway_leases (gateway_id) VALUES ('gw_1')")
        assert await self.found(own) == ["an entry"]

    async def test_so_is_one_beside_its_entry(self, own: OwnBooks) -> None:
        [entry, *_] = await healthy(own)
        await self.intend(own, entry.request_id, age=timedelta(hours=1), gateway="gw_1")
        assert await self.found(own) == ["no intent beside its entry"]


class TestRating:
    @pytest.mark.parametrize(
        "facts",
        [
            {"cost": PRICE + 1},
            {"cost": PRICE, "charge": PRICE - 1},
            {"cost": 0},
            {"cost": -PRICE},
        ],
    )
    async def test_an_entry_that_its_prices_do_not_explain_is_found(self, own: OwnBooks, facts: dict[str, int]) -> None:
        """Guarantee: although windows and budgets agree with it."""
        await healthy(own)
        await settle(own, entry_at(own, NOW, **facts))
        assert await found(own) == ["rating"]
        assert await found(own, rerate=False) == []

    @pytest.mark.parametrize(("price", "is_unpriced"), [(None, False), ("price_gone", False), ("own", True)])
    async def test_so_is_one_that_is_wrongly_called_priced_or_unpriced(
        self, own: OwnBooks, price: str | None, is_unpriced: bool
    ) -> None:
        await healthy(own)
        entry = entry_at(own, NOW, cost=PRICE if price == "own" else 0)
        name = own.books.price_id if price == "own" else price
        attribution = entry.attribution._replace(price_id=name, charge_price_id=name)
        result = entry.result._replace(is_unpriced=is_unpriced)
        await settle(own, msgspec.structs.replace(entry, attribution=attribution, result=result))
        [drift] = (await verify(own.database)).drifts
        assert (drift.what, drift.where) == ("rating", entry.request_id)

    async def test_every_page_is_rated(self, own: OwnBooks) -> None:
        await priced(own)
        entries = [entry_at(own, NOW) for _ in range(_PAGE_ROWS)]
        await settle(own, *entries, entry_at(own, NOW + timedelta(seconds=1), cost=1))
        verification = await verify(own.database)
        assert (verification.rated, [drift.what for drift in verification.drifts]) == (_PAGE_ROWS + 1, ["rating"])


async def test_books_that_are_being_written_agree_at_every_moment(own: OwnBooks) -> None:
    """Guarantee: one snapshot; what a gateway settles meanwhile is in all of it or in none."""
    await healthy(own)
    is_over = asyncio.Event()

    async def write(writer: Writer) -> int:
        batches = 0
        while not is_over.is_set():
            await writer.fetch(SETTLE, *settle_arguments([entry_at(own, datetime.now(UTC)) for _ in range(20)]))
            batches += 1
        return batches

    other = Writer(own.url, statement_seconds_max=30)
    writing = [asyncio.create_task(write(writer)) for writer in (own.writer, other)]
    for _ in range(15):
        assert await found(own) == []
    is_over.set()
    assert min(await asyncio.gather(*writing)) > 0
    await other.close()
    assert await found(own) == []
