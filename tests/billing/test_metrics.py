"""Business metrics out of real rows: every past day, again and again, whatever was booked when."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import text

from core.clock import ManualClock
from core.database import Database
from core.ids import OrganizationId, new_id
from core.mail import LogMailer
from gateway.back_office import BackOffice
from keys.tenants import create_organization
from metering.billing import metrics
from metering.billing.metrics import DailyMetrics, DayNotOver, MetricsBusy
from metering.billing.mrr import Change
from tests.billing.test_mrr import DAYS, HISTORIES, START, days_of
from tests.harness.billing import BillingPlace, empty
from tests.harness.usage_rows import add_window

DAY = date(2027, 1, 1)
TABLES = "TRUNCATE daily_metrics, mrr_snapshots"


@dataclass
class Business:
    database: Database
    clock: ManualClock

    async def organization(self, created_at: datetime = START) -> OrganizationId:
        async with self.database.transaction() as session:
            organization = await create_organization(session, "Acme")
            values = {"org": organization.id, "at": created_at}
            await session.execute(text("UPDATE organizations SET created_at = :at WHERE id = :org"), values)
            return organization.id

    async def book(
        self,
        organization_id: str,
        occurred_at: datetime,
        cents: int,
        *,
        status: str = "active",
        sub: str = "sub_1",
        **columns: object,
    ) -> None:
        row = {
            "id": new_id("sch"),
            "org": organization_id,
            "sub": sub,
            "plan": "pro",
            "status": status,
            "cents": cents,
            "at": occurred_at,
            "booked": datetime.now(UTC),
            **columns,
        }
        async with self.database.transaction() as session:
            await session.execute(
                text(
                    "INSERT INTO subscription_changes (id, organization_id, subscription_id, plan, status, mrr_cents,"
                    " occurred_at, booked_at) VALUES (:id, :org, :sub, :plan, :status, :cents, :at, :booked)"
                ),
                row,
            )

    async def use(self, organization_id: str, at: datetime, requests: int = 1, cost: int = 0, charge: int = 0) -> None:
        async with self.database.transaction() as session:
            await add_window(
                session, organization_id, at, requests=requests, cost_nano_usd=cost, charge_nano_usd=charge
            )

    async def compute(self, first: date = DAY, last: date = DAY) -> int:
        return await metrics.compute(self.database, self.clock, first, last)

    async def days(self, first: date = DAY, last: date = DAY + timedelta(days=400)) -> list[DailyMetrics]:
        async with self.database.transaction() as session:
            return await metrics.list_metrics(session, first, last)

    async def day(self, day: date = DAY) -> DailyMetrics:
        (found,) = await self.days(day, day)
        return found

    async def snapshots(self) -> list[tuple[Any, ...]]:
        query = "SELECT day, organization_id, mrr_cents, plan FROM mrr_snapshots ORDER BY day, organization_id"
        async with self.database.transaction() as session:
            return [tuple(row) for row in await session.execute(text(query))]

    @property
    def worker(self) -> BackOffice:
        return BackOffice(self.database, LogMailer(), self.clock)


async def clear(database: Database) -> None:
    await empty(database)
    async with database.transaction() as session:
        await session.execute(text(TABLES))


@pytest.fixture
async def business(books: Database) -> AsyncGenerator[Business]:
    await clear(books)
    yield Business(books, ManualClock(START + timedelta(days=60)))
    await clear(books)


def steady(days: list[DailyMetrics]) -> list[DailyMetrics]:
    return [msgspec.structs.replace(day, computed_at=START) for day in days]


def at(days: float) -> datetime:
    return START + timedelta(days=days)


class TestRevenue:
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(changes=HISTORIES)
    async def test_every_day_is_what_its_events_say_however_they_were_booked(
        self, business: Business, changes: list[Change]
    ) -> None:
        """Guarantee: computed early and again, or once at the end: the same days, which follow from each other."""
        await clear(business.database)
        names = {f"org_{number}": await business.organization() for number in range(3)}
        mixed = random.Random(len(changes)).sample(changes, len(changes))
        # Ids are the order of booking: they say which of two at the same time holds, and are kept.
        for number, change in enumerate(mixed):
            columns = {"id": change.id, "sub": change.subscription_id}
            await business.book(
                names[change.organization_id], change.occurred_at, change.mrr_cents, status=change.status, **columns
            )
            if number % 5 == 0:
                await business.compute(change.occurred_at.date(), change.occurred_at.date())
        await business.compute(DAY, DAY + timedelta(days=DAYS - 1))
        stored = await business.days()
        assert len(stored) == DAYS
        mrr = 0
        for day, (_, after, moved, _) in zip(stored, days_of(changes), strict=True):
            assert {name: getattr(day, name) for name in moved.__struct_fields__} == msgspec.structs.asdict(moved)
            mrr += moved.net_cents
            assert (day.mrr_cents, day.paying_organizations) == (mrr, sum(one.mrr_cents > 0 for one in after.values()))
        assert sum(row[2] for row in await business.snapshots()) == sum(day.mrr_cents for day in stored)
        await business.compute(DAY, DAY + timedelta(days=DAYS - 1))
        assert steady(await business.days()) == steady(stored)

    async def test_a_trial_is_no_revenue_until_it_is_paid(self, business: Business) -> None:
        organization_id = await business.organization()
        await business.book(organization_id, at(0.2), 0, status="trialing")
        await business.book(organization_id, at(1.2), 9_900)
        await business.compute(DAY, DAY + timedelta(days=1))
        first, second = await business.days()
        assert (first.trialing_organizations, first.paying_organizations, first.mrr_cents) == (1, 0, 0)
        assert (second.trialing_organizations, second.paying_organizations, second.new_cents) == (0, 1, 9_900)
        assert await business.snapshots() == [(DAY + timedelta(days=1), organization_id, 9_900, "pro")]

    async def test_a_late_event_changes_its_day_and_all_later_ones(self, business: Business) -> None:
        """Guarantee: a day that is computed again fits to the days after it, which are computed with it."""
        organization_id = await business.organization()
        await business.book(organization_id, at(0), 100)
        await business.compute(DAY, DAY + timedelta(days=3))
        await business.book(organization_id, at(1.5), 0, status="canceled")
        assert await business.compute(DAY + timedelta(days=1), DAY + timedelta(days=1)) == 3
        found = await business.days()
        assert [day.mrr_cents for day in found] == [100, 0, 0, 0]
        assert [day.churn_cents for day in found] == [0, 100, 0, 0]
        assert len(await business.snapshots()) == 1

    async def test_churn_is_of_those_who_paid_thirty_days_before(self, business: Business) -> None:
        organizations = [await business.organization() for _ in range(4)]
        for number, organization_id in enumerate(organizations):
            await business.book(organization_id, at(0.5), 1_000 * (number + 1), sub=f"sub_{number}")
        await business.book(organizations[0], at(10), 0, sub="sub_0", status="canceled")
        await business.book(organizations[1], at(20), 500, sub="sub_1")
        late = await business.organization()
        await business.book(late, at(12), 700, sub="sub_l")
        await business.book(late, at(14), 0, sub="sub_l", status="canceled")
        last = DAY + timedelta(days=30)
        await business.compute(last, last)
        day = await business.day(last)
        assert (day.month_ago_organizations, day.lost_organizations, day.customer_churn_basis_points) == (4, 1, 2_500)
        # 1000 of who left and 1500 of who pays less, of 10000.
        assert (day.month_ago_cents, day.lost_cents, day.revenue_churn_basis_points) == (10_000, 2_500, 2_500)
        assert (day.mrr_cents, day.paying_organizations, day.arpu_cents) == (7_500, 3, 2_500)
        assert day.clv_cents == 10_000

    async def test_nothing_to_divide_by_is_nothing(self, business: Business) -> None:
        await business.compute()
        day = await business.day()
        derived = (day.customer_churn_basis_points, day.revenue_churn_basis_points, day.arpu_cents, day.clv_cents)
        assert (derived, day.gross_margin_basis_points) == ((None,) * 4, None)
        organization_id = await business.organization()
        await business.book(organization_id, at(0) - timedelta(days=90), 100)
        await business.compute()
        day = await business.day()
        assert (day.customer_churn_basis_points, day.arpu_cents, day.clv_cents) == (0, 100, None)

    async def test_what_billing_books_is_what_counts(self, place: BillingPlace) -> None:
        """Guarantee: a checkout at Stripe is new revenue of its day, and its end is churn."""
        async with place.database.transaction() as session:
            await session.execute(text(TABLES))
        organization_id = await place.subscriber()
        day = place.clock.now().date()
        await place.customers.cancel(organization_id)
        place.pass_time(days=40)
        await place.hear()
        await metrics.compute(place.database, place.clock, day, day + timedelta(days=35))
        async with place.database.transaction() as session:
            found = await metrics.list_metrics(session, day, day + timedelta(days=35))
            await session.execute(text(TABLES))
        assert (found[0].new_cents, found[0].mrr_cents) == (9_900, 9_900)
        assert sum(one.churn_cents for one in found) == 9_900
        assert found[-1].mrr_cents == 0


class TestUse:
    async def test_who_is_active_and_what_it_brings(self, business: Business) -> None:
        one, two, idle = [await business.organization() for _ in range(3)]
        await business.organization(created_at=at(1))
        await business.use(one, at(0), 3, cost=60, charge=100)
        await business.use(one, at(0.5), 1, cost=20, charge=20)
        await business.use(two, at(-5), 1, cost=7, charge=9)
        await business.use(idle, at(0.2), 0)
        await business.use(idle, at(-29), 1)
        await business.use(idle, at(-30), 1)
        await business.use(idle, at(1), 1, cost=5, charge=5)
        await business.compute()
        day = await business.day()
        assert day.organizations == await self.organizations(business)
        active = (day.daily_active_organizations, day.weekly_active_organizations, day.monthly_active_organizations)
        assert active == (1, 2, 3)
        assert (day.usage_revenue_nano_usd, day.cost_nano_usd, day.gross_margin_nano_usd) == (120, 80, 40)
        assert day.gross_margin_basis_points == 3_333

    async def organizations(self, business: Business) -> int:
        """How many there were at the day's end, those of other tests among them."""
        query = "SELECT count(*) FROM organizations WHERE created_at < :at"
        async with business.database.transaction() as session:
            return int(await session.scalar(text(query), {"at": at(1)}) or 0)


class TestWhen:
    async def test_a_day_that_is_not_over_has_none(self, business: Business) -> None:
        today = business.clock.now().date()
        with pytest.raises(DayNotOver):
            await business.compute(today, today)

    async def test_two_at_once_do_not_mix(self, business: Business) -> None:
        async with business.database.transaction() as session:
            await session.execute(text("SELECT pg_try_advisory_xact_lock(hashtext('daily_metrics'))"))
            with pytest.raises(MetricsBusy):
                await business.compute()
            assert await business.worker.compute_metrics() == 0
        assert await business.compute() == 1

    async def test_a_worker_computes_what_is_missing_once(self, business: Business) -> None:
        assert [await business.worker.compute_metrics() for _ in range(2)] == [35, 0]
        assert [day.day for day in await business.days()] == [DAY + timedelta(days=number) for number in range(24, 59)]
        await self.settle(business)
        business.clock.advance(timedelta(days=1))
        assert [await business.worker.compute_metrics() for _ in range(2)] == [1, 0]

    async def test_yesterday_is_due_when_its_calls_have_ended(self, business: Business) -> None:
        await business.worker.compute_metrics()
        assert (await business.days())[-1].day == DAY + timedelta(days=58)
        business.clock.advance(timedelta(minutes=59))
        assert await business.worker.compute_metrics() == 0
        business.clock.advance(timedelta(minutes=1))
        assert await business.worker.compute_metrics() == 1
        assert (await business.days())[-1].day == DAY + timedelta(days=59)

    async def test_a_worker_mends_what_a_late_event_made_wrong(self, business: Business) -> None:
        organization_id = await business.organization()
        await business.worker.compute_metrics()
        await self.settle(business)
        assert await business.worker.compute_metrics() == 0
        await business.book(organization_id, at(50), 100)
        assert await business.worker.compute_metrics() == 9
        await self.settle(business)
        await business.book(organization_id, at(-500), 70)
        assert await business.worker.compute_metrics() == 35
        found = {day.day: day.mrr_cents for day in await business.days()}
        assert (found[DAY + timedelta(days=49)], found[DAY + timedelta(days=50)]) == (70, 100)

    async def settle(self, business: Business) -> None:
        """Let enough time pass that nothing could still become visible."""
        async with business.database.transaction() as session:
            await session.execute(
                text("UPDATE daily_metrics SET computed_at = clock_timestamp() + interval '10 minutes'")
            )
