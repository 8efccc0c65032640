"""What was used of plans' allowances: by the ledger's sums, told to Redis, put right there, and told at thresholds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis.asyncio import Redis

from core.clock import ManualClock, SystemClock
from core.ids import OrganizationId, new_id
from core.redis import scripts_for
from core.settings import LedgerSettings
from keys.allowances import Allowance, AllowanceUnit, Counted, allowances_of, month_of
from keys.caps import Standing, state_key
from keys.errors import PlanLimitReached
from keys.limits import QUOTA_SCRIPTS, QuotaPlan, RateLimits, ScopedLimits
from keys.local_quota import LocalQuota
from keys.plans import PlanLimits
from keys.quota import Quota, Reservation, Spend
from keys.tenants import set_plan
from metering.allowances import AllowanceStanding, list_allowances, note_thresholds
from metering.billing.plans import Plans, build_plans
from metering.caps import SpentCaps, allowance_pages
from metering.entries import INTEND, SETTLE, Entry, intend_arguments, settle_arguments
from metering.reconcile import Rounds, reconcile
from metering.usage import Units
from metering.verify_redis import AllowanceInRedis, compare_allowances
from metering.worker import MeteringStores, MeteringWorker
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant
from tests.metering.conftest import Books, OwnBooks, now_ms, request_id_at

LIMITS = PlanLimits(chat_requests_per_month=10, tokens_per_month=1_000)


def plans_of(chat_requests: int = 10, tokens: int = 1_000) -> Plans:
    limits = {"chat_requests_per_month": chat_requests, "tokens_per_month": tokens}
    return build_plans({"plans": {"small": {"limits": limits}, "large": {}}})


class Place:
    """An organization on a plan, a gateway's quota, and a worker's rounds on a clock that is moved by hand."""

    def __init__(self, own: OwnBooks, redis: Redis, quota: Quota) -> None:
        self.own, self.redis, self.quota = own, redis, quota
        self.organization_id = own.books.tenant.organization_id
        self.plan = QuotaPlan(self.organization_id, [], allowances_of(LIMITS, self.organization_id))
        self.clock = ManualClock(datetime.now(UTC))
        self.rounds = Rounds(self.clock)

    async def enter(self, tokens: int = 30, *, operation: str = "chat", **facts: object) -> Entry:
        return await enter(self.own.books, Units(input_tokens=tokens), operation=operation, **facts)

    async def intend(self, request_id: str, prompt: int = 10, operation: str = "chat") -> None:
        intent = self.own.books.intent(request_id, prompt=prompt)
        attribution = intent.attribution._replace(operation=operation)
        intent = type(intent)(request_id, attribution, prompt, 0, now_ms())
        await self.own.books.run(INTEND, *intend_arguments("gw_1", [intent]))

    async def reserve(self, request_id: str | None = None, tokens: int = 50) -> Reservation:
        spend = Spend(0, now_ms())
        return await self.quota.reserve(request_id or new_id("req"), self.plan, 1, tokens - 1, spend)

    async def end(self, reservation: Reservation, tokens: int) -> None:
        """End a call as its gateway does: in PostgreSQL, then in Redis."""
        await self.enter(tokens, request_id=reservation.request_id)
        self.quota.settle(reservation, tokens, 0, Counted(1, tokens))
        self.quota.flush()
        # In order: this is answered behind it.
        limited = [ScopedLimits("key", "k", RateLimits(requests_per_minute=10**6))]
        await self.quota.reserve(new_id("req"), QuotaPlan(self.organization_id, limited), 1, 1)

    async def round(self, after_seconds: float = 0.0) -> int:
        self.clock.advance(timedelta(seconds=after_seconds))
        return await reconcile(self.own.database, self.redis, self.clock, self.rounds, allowance_pages)

    def key(self, unit: AllowanceUnit) -> bytes:
        return state_key(Allowance(self.organization_id, unit, 0), month_of(datetime.now(UTC))[0])

    async def state(self, unit: AllowanceUnit) -> tuple[int, int]:
        """What is used and reserved."""
        used, reserved = await self.redis.hmget(self.key(unit), "s", "r")  # type: ignore[misc]
        return int(used), int(reserved)

    async def standing(self, unit: AllowanceUnit) -> Standing:
        allowance = Allowance(self.organization_id, unit, 0)
        return await SpentCaps(self.own.database).standing(allowance, month_of(datetime.now(UTC))[0])

    async def used(self) -> list[AllowanceStanding]:
        async with self.own.database.transaction() as session:
            return await list_allowances(session, LIMITS, datetime.now(UTC), organization_id=self.organization_id)

    async def events(self) -> list[tuple[str, int, int, int]]:
        rows = await self.own.books.run(
            'SELECT unit, threshold_percent, used, "limit" FROM allowance_events WHERE organization_id = $1'
            " AND starts_at = $2 ORDER BY 1, 2",
            self.organization_id,
            month_of(datetime.now(UTC))[0],
        )
        return [tuple(row) for row in rows]


async def enter(books: Books, units: Units, *, operation: str = "chat", **facts: object) -> Entry:
    entry = books.entry(units=units, **facts)  # type: ignore[arg-type]
    fields = {name: getattr(entry, name) for name in entry.__struct_fields__}
    entry = Entry(**{**fields, "attribution": entry.attribution._replace(operation=operation)})
    await books.run(SETTLE, *settle_arguments([entry]))
    return entry


@pytest.fixture
async def place(own: OwnBooks, stores: TestStores, redis: Redis) -> AsyncIterator[Place]:
    scripts = scripts_for(stores.redis_url, QUOTA_SCRIPTS, deadline_seconds=10)
    await scripts.start()
    async with own.database.transaction() as session:
        await set_plan(session, "small", organization_id=own.books.tenant.organization_id)
    quota = Quota(scripts, LocalQuota(SystemClock(), lambda: 1), SpentCaps(own.database))
    yield Place(own, redis, quota)
    await scripts.close()


class TestUsed:
    async def test_it_is_the_sum_of_the_months_hours(self, place: Place, stores: TestStores) -> None:
        """Guarantee: every token of every call counts, chat requests those that a provider answered."""
        starts_at, ends_at = month_of(datetime.now(UTC))
        every = Units(
            input_tokens=1,
            cached_input_tokens=2,
            cache_write_tokens=4,
            cache_write_1h_tokens=8,
            input_audio_tokens=16,
            input_image_tokens=32,
            output_tokens=64,
            reasoning_tokens=128,
            output_audio_tokens=256,
            output_image_tokens=512,
            images=5,
            audio_seconds=7,
        )
        await enter(place.own.books, every)
        await place.enter(2_000, operation="text_completion", started_ms=int(starts_at.timestamp() * 1000))
        await place.enter(4_000, operation="embeddings")
        await place.enter(9_999, started_ms=int(starts_at.timestamp() * 1000) - 1)
        other = Books(place.own.writer, await new_tenant(place.own.database, stores.pepper))
        await enter(other, Units(input_tokens=9_999))
        assert every.all_tokens == 1_023
        assert await place.used() == [
            AllowanceStanding(unit="chat_requests", used=2, limit=10, renews_at=ends_at),
            AllowanceStanding(unit="tokens", used=7_023, limit=1_000, renews_at=ends_at),
            AllowanceStanding(unit="workflow_executions", used=0, limit=None, renews_at=ends_at),
        ]

    async def test_nothing_was_used_where_nobody_called(self, place: Place) -> None:
        assert [one.used for one in await place.used()] == [0, 0, 0]
        assert await place.standing("tokens") == Standing(0, ())

    async def test_running_calls_are_held_by_what_is_known_of_them(self, place: Place) -> None:
        await place.enter(30)
        chat, embedding = new_id("req"), new_id("req")
        await place.intend(chat, 10)
        await place.intend(embedding, 7, "embeddings")
        await place.own.books.run("UPDATE usage_intents SET observed_output_tokens = 5 WHERE request_id = $1", chat)
        assert await place.standing("chat_requests") == Standing(1, ((chat, 1),))
        tokens = await place.standing("tokens")
        assert (tokens.spent, sorted(tokens.held)) == (30, sorted([(chat, 15), (embedding, 7)]))
        assert await place.standing("workflow_executions") == Standing(0, ())


class TestRedisIsToldAndPutRight:
    async def test_a_redis_that_lost_everything_goes_on_where_postgresql_is(self, place: Place) -> None:
        for _ in range(7):
            await place.enter(10)
        running = await place.reserve()
        await place.intend(running.request_id)
        assert await place.state("chat_requests") == (7, 1)
        await place.redis.delete(place.key("chat_requests"), place.key("tokens"))
        for _ in range(2):
            await place.reserve()
        with pytest.raises(PlanLimitReached):
            await place.reserve()
        assert await place.state("chat_requests") == (7, 3)
        await place.end(running, 40)
        assert (await place.state("chat_requests"), await place.state("tokens")) == ((8, 2), (110, 100))

    async def test_what_was_admitted_without_redis_counts_within_a_round(self, place: Place) -> None:
        await place.end(await place.reserve(), 20)
        await place.enter(500)
        await place.enter(100, operation="embeddings")
        assert await place.state("tokens") == (20, 0)
        await place.round()
        assert (await place.state("chat_requests"), await place.state("tokens")) == ((2, 0), (620, 0))

    async def test_a_dead_gateways_calls_are_settled_by_the_ledger(self, place: Place) -> None:
        """Guarantee: in each unit what the ledger says; given back if it says nothing."""
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        lost, unknown = request_id_at(hour_ago), request_id_at(hour_ago)
        await place.reserve(lost)
        await place.reserve(unknown)
        await place.enter(17, request_id=lost, outcome="gateway_lost")
        assert await place.round() == 0
        assert await place.state("tokens") == (0, 100)
        assert await place.round(5) == 4
        assert (await place.state("chat_requests"), await place.state("tokens")) == ((1, 0), (17, 0))
        assert await place.round(5) == 0

    async def test_a_running_call_keeps_what_it_holds(self, place: Place) -> None:
        running = await place.reserve(request_id_at(datetime.now(UTC) - timedelta(hours=1)))
        await place.intend(running.request_id)
        for _ in range(3):
            assert await place.round(5) == 0
        assert await place.state("tokens") == (0, 50)

    async def test_more_than_the_ledger_knows_is_taken_away(self, place: Place) -> None:
        await place.end(await place.reserve(), 20)
        await place.redis.hset(place.key("tokens"), "s", 900)  # type: ignore[misc]
        await place.round()
        assert await place.state("tokens") == (20, 0)

    async def test_also_while_the_plan_does_not_limit_it(self, place: Place) -> None:
        """Guarantee: a limit that is taken away and comes back finds what was used meanwhile."""
        await place.end(await place.reserve(), 20)
        async with place.own.database.transaction() as session:
            await set_plan(session, "large", organization_id=place.organization_id)
        await place.enter(300)
        await place.round()
        assert await place.state("tokens") == (320, 0)


class TestThresholds:
    async def test_each_is_told_once_a_month(self, place: Place) -> None:
        for _ in range(7):
            await place.enter(10)
        assert await self.note(place) == 0
        await place.enter(10)
        assert [await self.note(place) for _ in range(2)] == [1, 0]
        assert await place.events() == [("chat_requests", 80, 8, 10)]
        for _ in range(3):
            await place.enter(400)
        assert [await self.note(place) for _ in range(2)] == [3, 0]
        assert await place.events() == [
            ("chat_requests", 80, 8, 10),
            ("chat_requests", 100, 11, 10),
            ("tokens", 80, 1_280, 1_000),
            ("tokens", 100, 1_280, 1_000),
        ]

    async def test_who_has_no_limit_is_told_nothing(self, place: Place) -> None:
        for _ in range(20):
            await place.enter(1_000)
        assert await note_thresholds(place.own.database, Plans(), place.clock) == 0
        for plan in ("large", "gone", None):
            async with place.own.database.transaction() as session:
                await set_plan(session, plan, organization_id=place.organization_id)
            assert await self.note(place) == 0
        assert await place.events() == []

    async def test_of_nothing_at_all_there_is_no_part(self, place: Place) -> None:
        assert await note_thresholds(place.own.database, plans_of(0, 0), place.clock) == 0

    async def test_last_months_use_is_not_this_months(self, place: Place) -> None:
        starts_ms = int(month_of(datetime.now(UTC))[0].timestamp() * 1000)
        await place.enter(5_000, started_ms=starts_ms - 1)
        assert await self.note(place) == 0

    async def test_a_workers_round_writes_them(self, place: Place) -> None:
        await place.enter(1_000)
        own = place.own
        settings = LedgerSettings(lease_seconds=10, retention_months=0, archive_dir=Path("/nowhere"))
        stores = MeteringStores(own.url, own.database, place.redis)
        worker = MeteringWorker(stores, settings, SystemClock(), plans=plans_of)
        await worker.reconcile_allowances()
        assert [event[:2] for event in await place.events()] == [("tokens", 80), ("tokens", 100)]

    async def note(self, place: Place) -> int:
        return await note_thresholds(place.own.database, plans_of(), place.clock)


class TestCompared:
    async def test_what_agrees_and_what_does_not(self, place: Place) -> None:
        assert await self.compared(place) == []
        await place.end(await place.reserve(), 20)
        running = await place.reserve()
        await place.intend(running.request_id)
        requests, tokens = await self.compared(place)
        assert (requests.agrees, tokens.agrees) == (True, True)
        assert tokens == AllowanceInRedis(
            organization_id=place.organization_id,
            unit="tokens",
            used=20,
            used_in_redis=20,
            reserved_in_redis=50,
            held=50,
            without_call=0,
        )
        await place.reserve()
        await place.redis.hset(place.key("tokens"), "s", 19)  # type: ignore[misc]
        requests, tokens = await self.compared(place)
        assert (requests.agrees, requests.without_call) == (False, 1)
        assert (tokens.agrees, tokens.used_in_redis) == (False, 19)

    async def compared(self, place: Place) -> list[AllowanceInRedis]:
        found = await compare_allowances(place.own.database, place.redis, SystemClock())
        assert {one.organization_id for one in found} <= {OrganizationId(place.organization_id)}
        return found
