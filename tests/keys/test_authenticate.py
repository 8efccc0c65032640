"""From a credential to a Principal: who gets in, who is asked again, and what happens when nobody can tell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database
from core.ids import KeyId
from core.settings import Pepper
from keys import usage_marks
from keys.authenticate import Authenticator
from keys.errors import (
    AddressNotAllowed,
    AuthenticationUnavailable,
    KeyIncorrect,
    KeyMissing,
    ModelNotAllowed,
    ScopeMissing,
    TooManyFailures,
)
from keys.lifecycle import NewKey, create_key, revoke_key, rotate_key, set_limits
from keys.limits import DefaultLimits, RateLimits
from keys.principal import Principal
from keys.secrets import mint
from keys.tables import KeyRow
from tests.harness.stores import TestStores, with_database
from tests.harness.tenant import Tenant, new_tenant


class CountingDatabase(Database):
    """The real one, which counts transactions and can hold them up after their work is done."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.transactions = 0
        self.hold: asyncio.Event | None = None
        self.held = asyncio.Event()

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[AsyncSession]:
        self.transactions += 1
        async with super().transaction() as session:
            yield session
            if self.hold is not None:
                self.held.set()
                await self.hold.wait()


class Door:
    """An authenticator, and knobs for what it stands on."""

    def __init__(self, database: CountingDatabase, *peppers: Pepper) -> None:
        self.database = database
        self.is_live = True
        self.defaults = DefaultLimits()
        self.authenticator = Authenticator(
            database, peppers, defaults=lambda: self.defaults, is_feed_live=lambda: self.is_live
        )

    async def opens(self, key: str | bytes, address: str = "192.0.2.1") -> Principal:
        token = key if isinstance(key, bytes) else key.encode()
        return await self.authenticator.authenticate(token, lambda: address)

    async def refuses(self, key: str | bytes, address: str = "192.0.2.1") -> KeyIncorrect:
        with pytest.raises(KeyIncorrect) as caught:
            await self.opens(key, address)
        return caught.value


@pytest.fixture
async def counting(stores: TestStores) -> AsyncIterator[CountingDatabase]:
    made = CountingDatabase(stores.database_url)
    yield made
    await made.close()


@pytest.fixture
def door(counting: CountingDatabase, stores: TestStores) -> Door:
    return Door(counting, stores.pepper)


def nobody() -> str:
    raise AssertionError("the address was asked for")


class TestRecognised:
    async def test_a_principal_says_who_and_what_they_may(
        self, door: Door, database: Database, stores: TestStores
    ) -> None:
        tenant = await new_tenant(
            database, stores.pepper, NewKey(name="k", scopes=("chat:write",), models=("m",)), policy="abort"
        )
        principal = await door.opens(tenant.key)
        assert (principal.organization_id, principal.project_id, principal.key_id) == tenant[:3]
        assert principal.secret_id.startswith("ksec_")
        assert principal.disconnect_policy == "abort"
        principal.require_scope("chat:write")
        with pytest.raises(ScopeMissing):
            principal.require_scope("embeddings:write")
        principal.require_model("m")
        with pytest.raises(ModelNotAllowed):
            principal.require_model("n")

    async def test_a_known_key_costs_no_query(self, door: Door, tenant: Tenant) -> None:
        first = await door.opens(tenant.key)
        for _ in range(20):
            assert await door.authenticator.authenticate(tenant.key.encode(), nobody) is first
        assert door.database.transactions == 1

    async def test_a_hundred_first_uses_at_once_make_one_query(self, door: Door, tenant: Tenant) -> None:
        found = await asyncio.gather(*(door.opens(tenant.key) for _ in range(100)))
        assert len({id(principal) for principal in found}) == 1
        assert door.database.transactions == 1

    async def test_one_callers_hang_up_does_not_end_the_load_for_the_others(self, door: Door, tenant: Tenant) -> None:
        waiting = [asyncio.ensure_future(door.opens(tenant.key)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(ended[0], asyncio.CancelledError)
        assert all(isinstance(one, Principal) for one in ended[1:])

    async def test_an_old_pepper_goes_on_working_until_it_leaves_the_ring(
        self, counting: CountingDatabase, stores: TestStores, tenant: Tenant
    ) -> None:
        fresh = Pepper("fresh", bytes(32))
        assert (await Door(counting, fresh, stores.pepper).opens(tenant.key)).key_id == tenant.key_id
        newer = await new_tenant(counting, fresh)
        assert (await Door(counting, fresh, stores.pepper).opens(newer.key)).key_id == newer.key_id
        await Door(counting, fresh).refuses(tenant.key)
        await Door(counting, stores.pepper).refuses(newer.key)


class TestLimits:
    async def test_what_was_set_stands_before_the_defaults_scope_by_scope(
        self, door: Door, database: Database, stores: TestStores
    ) -> None:
        door.defaults = DefaultLimits(
            key=RateLimits(requests_per_minute=1, tokens_per_minute=2),
            organization=RateLimits(concurrent_requests=3),
            model={"fake": RateLimits(requests_per_day=4, tokens_per_day=5), "other": RateLimits(requests_per_day=6)},
        )
        tenant = await new_tenant(
            database,
            stores.pepper,
            limits={
                "key": RateLimits(requests_per_minute=10),
                "project": RateLimits(tokens_per_day=20),
                "model": RateLimits(requests_per_day=40),
            },
        )
        # Somebody else's, and another key's of the same organization.
        await new_tenant(
            database,
            stores.pepper,
            limits={"organization": RateLimits(requests_per_day=1), "model": RateLimits(tokens_per_day=1)},
        )
        own = tenant.organization_id
        async with database.transaction() as session:
            other = await create_key(
                session, NewKey(name="o"), organization_id=own, project_id=tenant.project_id, pepper=stores.pepper
            )
            await set_limits(session, "key", other.id, RateLimits(requests_per_day=1), organization_id=own)
        limits = (await door.opens(tenant.key)).limits
        assert limits.key == RateLimits(requests_per_minute=10, tokens_per_minute=2)
        assert limits.project == RateLimits(tokens_per_day=20)
        assert limits.organization == RateLimits(concurrent_requests=3)
        assert limits.model == {
            "fake": RateLimits(requests_per_day=40, tokens_per_day=5),
            "other": RateLimits(requests_per_day=6),
        }

    async def test_a_plan_holds_the_four_scopes_and_leaves_out_the_unlimited(
        self, door: Door, database: Database, stores: TestStores
    ) -> None:
        door.defaults = DefaultLimits(organization=RateLimits())
        tenant = await new_tenant(
            database,
            stores.pepper,
            limits={"key": RateLimits(tokens_per_minute=9), "model": RateLimits(tokens_per_day=7)},
        )
        principal = await door.opens(tenant.key)
        assert principal.plan_for("fake") is principal.plan_for("fake")
        assert [(one.scope, one.id) for one in principal.plan_for("fake").scopes] == [
            ("key", tenant.key_id),
            ("model", "fake"),
        ]
        assert (principal.plan_for("fake").tokens_max, principal.plan_for("fake").tokens_scope) == (
            7,
            "model tokens per day",
        )
        assert [one.scope for one in principal.plan_for("unlimited").scopes] == ["key"]
        for number in range(1_000):
            principal.plan_for(f"m{number}")
        assert len(principal.plans) <= 256


class TestRefused:
    @pytest.mark.parametrize("token", [None, b""])
    async def test_nothing_sent(self, door: Door, token: bytes | None) -> None:
        with pytest.raises(KeyMissing):
            await door.authenticator.authenticate(token, nobody)

    @pytest.mark.parametrize(
        "token", [b"x", b"sk-aap-", b"sk-aap-" + b"a" * 59, b"\xff" * 66, "sk-aap-é".encode(), b"\x00" * 100_000]
    )
    async def test_what_has_no_keys_form_costs_no_query_and_no_bucket(self, door: Door, token: bytes) -> None:
        for _ in range(100):
            with pytest.raises(KeyIncorrect):
                await door.authenticator.authenticate(token, nobody)
        assert door.database.transactions == 0

    async def test_unknown_keys_are_asked_for_once(self, door: Door) -> None:
        key = mint().text
        messages = {(await door.refuses(key)).message for _ in range(10)}
        assert len(messages) == 1
        assert key not in messages.pop()
        assert door.database.transactions == 1

    async def test_only_who_holds_the_secret_hears_that_it_has_ended(
        self, door: Door, database: Database, stores: TestStores
    ) -> None:
        past = datetime.now(UTC) - timedelta(seconds=1)
        tenant = await new_tenant(database, stores.pepper, NewKey(name="k", expires_at=past))
        assert "expired" in (await door.refuses(tenant.key)).message
        assert "expired" not in (await door.refuses(mint().text)).message

    async def test_a_key_works_until_its_second_and_not_after_cached_or_not(
        self, door: Door, database: Database, stores: TestStores
    ) -> None:
        ends = datetime.now(UTC) + timedelta(seconds=0.6)
        tenant = await new_tenant(database, stores.pepper, NewKey(name="k", expires_at=ends))
        while time.time() < ends.timestamp():
            asked_at = time.time()
            try:
                await door.opens(tenant.key)
            except KeyIncorrect:
                assert time.time() >= ends.timestamp()
            else:
                assert asked_at < ends.timestamp()
            await asyncio.sleep(0)
        await door.refuses(tenant.key)
        assert door.database.transactions == 1

    async def test_a_revoked_key_is_refused_though_the_revokers_clock_is_ahead(
        self, door: Door, database: Database, tenant: Tenant
    ) -> None:
        """Guarantee: disabled is disabled, whatever the time was where that was decided."""
        async with database.transaction() as session:
            await revoke_key(
                session,
                tenant.key_id,
                organization_id=tenant.organization_id,
                now=datetime.now(UTC) + timedelta(hours=1),
            )
        await door.refuses(tenant.key)

    @pytest.mark.parametrize(
        ("grace", "old_works"), [(timedelta(hours=1), True), (timedelta(0), False), (timedelta(seconds=-1), False)]
    )
    async def test_a_rotated_keys_old_secret_works_through_its_grace(
        self, door: Door, database: Database, stores: TestStores, tenant: Tenant, grace: timedelta, *, old_works: bool
    ) -> None:
        now = datetime.now(UTC)
        async with database.transaction() as session:
            issued = await rotate_key(
                session,
                tenant.key_id,
                organization_id=tenant.organization_id,
                grace=grace,
                pepper=stores.pepper,
                now=now,
            )
        new = await door.opens(issued.secret)
        assert new.key_id == tenant.key_id
        if old_works:
            old = await door.opens(tenant.key)
            assert (old.key_id, old.secret_id != new.secret_id) == (tenant.key_id, True)
            assert old.usable_until_seconds == pytest.approx((now + grace).timestamp(), abs=1e-3)
        else:
            await door.refuses(tenant.key)

    async def test_a_grace_never_outlives_the_key(self, door: Door, database: Database, stores: TestStores) -> None:
        ends = datetime.now(UTC) + timedelta(minutes=5)
        tenant = await new_tenant(database, stores.pepper, NewKey(name="k", expires_at=ends))
        async with database.transaction() as session:
            issued = await rotate_key(
                session,
                tenant.key_id,
                organization_id=tenant.organization_id,
                grace=timedelta(days=9),
                pepper=stores.pepper,
                now=datetime.now(UTC),
            )
        for key in (tenant.key, issued.secret):
            assert (await door.opens(key)).usable_until_seconds == pytest.approx(ends.timestamp(), abs=1e-3)


class TestAddress:
    @pytest.fixture
    async def fenced(self, database: Database, stores: TestStores) -> Tenant:
        return await new_tenant(
            database, stores.pepper, NewKey(name="k", ip_networks=("192.0.2.7/24", "2001:db8::/32", "203.0.113.5"))
        )

    @pytest.mark.parametrize(
        "address", ["192.0.2.1", "192.0.2.255", "203.0.113.5", "2001:db8::1", "2001:db8:ffff::", "::ffff:192.0.2.9"]
    )
    async def test_inside(self, door: Door, fenced: Tenant, address: str) -> None:
        assert await door.opens(fenced.key, address)

    @pytest.mark.parametrize(
        "address",
        [
            "192.0.3.1",
            "203.0.113.6",
            "2001:db9::1",
            "::ffff:192.0.3.9",
            "::1",
            "",
            "unknown",
            "192.0.2.1, 1.1.1.1",
            "192.0.2.1:80",
        ],
    )
    async def test_outside_also_when_the_key_is_cached(self, door: Door, fenced: Tenant, address: str) -> None:
        await door.opens(fenced.key, "192.0.2.1")
        for _ in range(2):
            with pytest.raises(AddressNotAllowed):
                await door.opens(fenced.key, address)


class TestGuessing:
    @staticmethod
    async def guess_until_stopped(
        door: Door, addresses: Callable[[int], str], key: str | None = None
    ) -> TooManyFailures:
        """Fail until it is too much: after 60 failures, and those that time gives back meanwhile."""
        began = time.monotonic()
        for count in range(200):
            try:
                await door.opens(key or mint().text, addresses(count))
            except KeyIncorrect:
                continue
            except TooManyFailures as error:
                assert 60 <= count <= 61 + (time.monotonic() - began) / 2
                return error
        raise AssertionError("nobody was stopped")

    async def test_one_address_runs_out_of_failures_and_others_do_not(self, door: Door) -> None:
        stopped = await self.guess_until_stopped(door, lambda _: "198.51.100.1")
        assert stopped.retry_after_seconds is not None
        assert 0 < stopped.retry_after_seconds <= 2
        asked = door.database.transactions
        await door.refuses(mint().text, "198.51.100.2")
        assert door.database.transactions == asked + 1

    async def test_a_repeated_wrong_key_counts_without_being_asked_for(self, door: Door) -> None:
        await self.guess_until_stopped(door, lambda _: "198.51.100.1", mint().text)
        assert door.database.transactions == 1

    async def test_a_known_key_works_from_an_address_of_guessers(self, door: Door, tenant: Tenant) -> None:
        await door.opens(tenant.key)
        await self.guess_until_stopped(door, lambda _: "192.0.2.1")
        assert await door.opens(tenant.key)

    async def test_an_ipv6_guesser_owns_a_whole_network(self, door: Door) -> None:
        await self.guess_until_stopped(door, lambda count: f"2001:db8:1:2:{count:x}::1")
        await door.refuses(mint().text, "2001:db8:1:3::1")

    async def test_ipv4_in_ipv6_is_one_guesser_per_ipv4_address(self, door: Door) -> None:
        """Guarantee: on a socket that listens on `::`, one guesser does not lock out every other IPv4 caller."""
        await self.guess_until_stopped(door, lambda _: "::ffff:198.51.100.1")
        await door.refuses(mint().text, "::ffff:198.51.100.2")


class TestCache:
    async def test_it_is_not_trusted_while_the_feed_is_not_live(
        self, door: Door, database: Database, tenant: Tenant
    ) -> None:
        await door.opens(tenant.key)
        async with database.transaction() as session:
            await revoke_key(session, tenant.key_id, organization_id=tenant.organization_id, now=datetime.now(UTC))
        assert await door.opens(tenant.key)
        door.is_live = False
        await door.refuses(tenant.key)
        assert door.database.transactions == 2

    async def test_forgetting_a_key_or_its_organization_asks_again_and_leaves_others(
        self, door: Door, database: Database, stores: TestStores, tenant: Tenant
    ) -> None:
        other = await new_tenant(database, stores.pepper)
        forgets: list[Callable[[], None]] = [
            lambda: door.authenticator.forget(tenant.organization_id, tenant.key_id),
            lambda: door.authenticator.forget(tenant.organization_id, None),
        ]
        for forget in forgets:
            await door.opens(tenant.key)
            await door.opens(other.key)
            before = door.database.transactions
            forget()
            await door.opens(other.key)
            assert door.database.transactions == before
            await door.opens(tenant.key)
            assert door.database.transactions == before + 1

    async def test_every_secret_of_a_key_is_forgotten_with_it(
        self, door: Door, database: Database, stores: TestStores, tenant: Tenant
    ) -> None:
        async with database.transaction() as session:
            issued = await rotate_key(
                session,
                tenant.key_id,
                organization_id=tenant.organization_id,
                grace=timedelta(hours=1),
                pepper=stores.pepper,
                now=datetime.now(UTC),
            )
        keys = (tenant.key, issued.secret)
        for key in keys:
            await door.opens(key)
        async with database.transaction() as session:
            await revoke_key(session, tenant.key_id, organization_id=tenant.organization_id, now=datetime.now(UTC))
        door.authenticator.forget(tenant.organization_id, tenant.key_id)
        for key in keys:
            await door.refuses(key)

    async def test_forgetting_all_forgets_unknown_keys_too(self, door: Door, tenant: Tenant) -> None:
        unknown = mint().text
        await door.opens(tenant.key)
        await door.refuses(unknown)
        door.authenticator.forget_all()
        await door.opens(tenant.key)
        await door.refuses(unknown)
        assert door.database.transactions == 4

    @pytest.mark.parametrize("whole_organization", [True, False])
    async def test_a_change_announced_while_a_load_runs_is_not_lost(
        self, door: Door, database: Database, tenant: Tenant, *, whole_organization: bool
    ) -> None:
        """Guarantee: what a query read before the change does not get into the cache after the announcement."""
        door.database.hold = asyncio.Event()
        loading = asyncio.ensure_future(door.opens(tenant.key))
        await asyncio.wait_for(door.database.held.wait(), 10)
        async with database.transaction() as session:
            await revoke_key(session, tenant.key_id, organization_id=tenant.organization_id, now=datetime.now(UTC))
        door.authenticator.forget(tenant.organization_id, None if whole_organization else tenant.key_id)
        door.database.hold.set()
        with pytest.raises(KeyIncorrect):
            await loading
        await door.refuses(tenant.key)


class TestPostgresqlDown:
    @pytest.mark.parametrize("how", ["nobody listens", "no such database", "wrong password", "closed at once"])
    async def test_nobody_new_gets_in_and_the_known_do_while_the_feed_lives(
        self, stores: TestStores, door: Door, tenant: Tenant, how: str
    ) -> None:
        """Guarantee: whatever way PostgreSQL is not there, it is 503 and no guess."""
        hangs_up = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = hangs_up.sockets[0].getsockname()[1]
        url = {
            "nobody listens": "postgresql://x@127.0.0.1:1/x",
            "no such database": with_database(stores.database_url, "no_such_database"),
            "wrong password": f"postgresql://x:y@127.0.0.1:{port}/x",
            "closed at once": f"postgresql://x@127.0.0.1:{port}/x",
        }[how]
        await door.opens(tenant.key)
        down = CountingDatabase(url)
        door.authenticator._database = down
        assert await door.opens(tenant.key)
        with pytest.raises(AuthenticationUnavailable):
            await door.opens(mint().text)
        door.is_live = False
        with pytest.raises(AuthenticationUnavailable):
            await door.opens(tenant.key)
        # Being down is nobody's failed guess, and is not remembered as "unknown".
        door.authenticator._database = door.database
        assert await door.opens(tenant.key)
        await down.close()
        hangs_up.close()


class TestLastUsed:
    async def last_used(self, database: Database, key_id: KeyId) -> datetime | None:
        async with database.transaction() as session:
            return await session.scalar(select(KeyRow.last_used_at).where(KeyRow.id == key_id))

    async def test_uses_are_written_in_one_go_and_never_moved_back(
        self, door: Door, database: Database, tenant: Tenant
    ) -> None:
        before = datetime.now(UTC)
        await door.opens(tenant.key)
        marks = door.authenticator.last_used
        assert await usage_marks.flush(database, marks) == 1
        assert marks == {}
        first = await self.last_used(database, tenant.key_id)
        assert first is not None
        assert before <= first <= datetime.now(UTC)
        await usage_marks.flush(database, {tenant.key_id: first.timestamp() - 60})
        assert await self.last_used(database, tenant.key_id) == first
        assert await usage_marks.flush(database, {}) == 0

    async def test_refused_uses_are_not_marked(self, door: Door, database: Database, stores: TestStores) -> None:
        ended = await new_tenant(
            database, stores.pepper, NewKey(name="k", expires_at=datetime.now(UTC) - timedelta(days=1))
        )
        fenced = await new_tenant(database, stores.pepper, NewKey(name="k", ip_networks=("203.0.113.5",)))
        await door.refuses(ended.key)
        with pytest.raises(AddressNotAllowed):
            await door.opens(fenced.key)
        assert door.authenticator.last_used == {}

    async def test_what_could_not_be_written_is_kept_and_newer_marks_win(self, tenant: Tenant) -> None:
        down = Database("postgresql://x@127.0.0.1:1/x")
        marks = {tenant.key_id: 5.0}
        with pytest.raises(OSError):
            await usage_marks.flush(down, marks)
        assert marks == {tenant.key_id: 5.0}
        await down.close()
