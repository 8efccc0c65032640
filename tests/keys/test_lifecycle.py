"""Making, rotating, limiting and revoking keys: what the database holds afterwards."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database, Table
from core.errors import Invalid
from core.ids import KeyId, OrganizationId, ProjectId, new_id
from core.settings import Pepper
from keys import lifecycle
from keys.errors import KeyRevoked, TenantNotFound
from keys.lifecycle import NewKey, create_key, list_keys, revoke_key, rotate_key, set_limits
from keys.limits import RateLimits
from keys.scopes import ADMIN_SCOPES, ALL_SCOPES, INFERENCE_SCOPES, OPERATOR_SCOPES
from keys.secrets import fingerprint, hint, is_well_formed
from keys.tables import KeyChangeRow, KeySecretRow
from keys.tenants import create_organization, create_project, list_organizations, list_projects, only_organization
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


async def secrets_of(session: AsyncSession, key_id: KeyId) -> list[KeySecretRow]:
    rows = await session.scalars(select(KeySecretRow).where(KeySecretRow.key_id == key_id).order_by(KeySecretRow.id))
    return list(rows)


async def changes_of(session: AsyncSession, organization_id: OrganizationId) -> list[tuple[int, str | None]]:
    rows = await session.scalars(
        select(KeyChangeRow).where(KeyChangeRow.organization_id == organization_id).order_by(KeyChangeRow.sequence)
    )
    return [(row.sequence, row.key_id) for row in rows]


class Made:
    """A tenant within one session that is rolled back."""

    def __init__(self, session: AsyncSession, pepper: Pepper) -> None:
        self.session, self.pepper = session, pepper

    async def tenant(self) -> tuple[OrganizationId, ProjectId]:
        organization = await create_organization(self.session, "A")
        project = await create_project(self.session, "P", organization_id=organization.id)
        return organization.id, project.id

    async def key(self, organization_id: OrganizationId, project_id: ProjectId, **new: object) -> lifecycle.IssuedKey:
        asked = NewKey(name="k", **new)  # type: ignore[arg-type]
        return await create_key(
            self.session, asked, organization_id=organization_id, project_id=project_id, pepper=self.pepper
        )

    async def rotate(
        self, organization_id: OrganizationId, key_id: KeyId, grace: timedelta, now: datetime = NOW
    ) -> lifecycle.IssuedKey:
        return await rotate_key(
            self.session, key_id, organization_id=organization_id, grace=grace, pepper=self.pepper, now=now
        )


@pytest.fixture
def made(session: AsyncSession, stores: TestStores) -> Made:
    return Made(session, stores.pepper)


class TestCreate:
    async def test_a_key_is_kept_as_fingerprint_and_hint(self, made: Made) -> None:
        organization_id, project_id = await made.tenant()
        issued = await made.key(organization_id, project_id)
        assert is_well_formed(issued.secret)
        [row] = await secrets_of(made.session, issued.id)
        assert (row.pepper_id, row.fingerprint) == fingerprint(issued.secret, made.pepper)
        assert (row.hint, row.not_after, row.organization_id) == (hint(issued.secret), None, organization_id)
        assert await changes_of(made.session, organization_id) == [(issued.change, issued.id)]
        assert issued.secret not in repr(issued)

    async def test_everything_asked_for_is_listed_and_the_secret_is_not(self, made: Made) -> None:
        organization_id, project_id = await made.tenant()
        ends = NOW + timedelta(days=3)
        issued = await made.key(
            organization_id,
            project_id,
            scopes=("chat:write",),
            models=("m",),
            ip_networks=("192.0.2.1/24", "2001:db8::1"),
            expires_at=ends,
        )
        [key] = await list_keys(made.session, organization_id=organization_id)
        assert (key.id, key.project_id, key.name, key.hint) == (issued.id, project_id, "k", hint(issued.secret))
        assert (key.scopes, key.models, key.expires_at) == (["chat:write"], ["m"], ends)
        assert key.ip_networks == ["192.0.2.1/24", "2001:db8::1"]
        assert (key.disabled_at, key.last_used_at) == (None, None)

    def test_a_key_may_call_everything_and_administer_nothing_unless_told_otherwise(self) -> None:
        new = NewKey(name="k")
        assert set(new.scopes) == set(ALL_SCOPES) - {*ADMIN_SCOPES, *OPERATOR_SCOPES} == set(INFERENCE_SCOPES)
        assert (new.models, new.ip_networks, new.expires_at) == (None, None, None)

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            ({"scopes": ("chat:write", "all")}, "all"),
            ({"ip_networks": ("300.0.0.1",)}, "300.0.0.1"),
            ({"ip_networks": ("10.0.0.0/33",)}, "/33"),
        ],
    )
    def test_nonsense_is_refused_by_name(self, wrong: dict[str, tuple[str, ...]], named: str) -> None:
        with pytest.raises(ValueError, match=named):
            NewKey(name="k", **wrong)  # type: ignore[arg-type]

    @pytest.mark.parametrize("inference", INFERENCE_SCOPES)
    @pytest.mark.parametrize("admin", [*ADMIN_SCOPES, *OPERATOR_SCOPES])
    def test_one_key_never_both_calls_and_administers(self, inference: str, admin: str) -> None:
        """Guarantee: what an application holds cannot read the books, and what reads the books cannot spend."""
        assert NewKey(name="k", scopes=[admin]).scopes == [admin]
        with pytest.raises(Invalid) as caught:
            NewKey(name="k", scopes=[inference, admin])
        assert caught.value.param == "scopes"

    async def test_a_project_of_somebody_else_does_not_exist(self, made: Made) -> None:
        mine, _ = await made.tenant()
        _, theirs = await made.tenant()
        for project_id in (theirs, ProjectId("proj_nope")):
            with pytest.raises(TenantNotFound) as caught:
                await made.key(mine, project_id)
            assert caught.value.message == "No such project."
        assert await list_keys(made.session, organization_id=mine) == []


class TestRotate:
    async def test_the_id_stays_and_the_old_secret_ends_at_the_second(self, made: Made) -> None:
        organization_id, project_id = await made.tenant()
        first = await made.key(organization_id, project_id)
        second = await made.rotate(organization_id, first.id, timedelta(hours=1))
        assert (second.id, second.secret != first.secret) == (first.id, True)
        old, new = await secrets_of(made.session, first.id)
        assert (old.not_after, new.not_after) == (NOW + timedelta(hours=1), None)
        assert new.fingerprint == fingerprint(second.secret, made.pepper).digest
        assert await changes_of(made.session, organization_id) == [(first.change, first.id), (second.change, first.id)]
        assert second.change > first.change
        [key] = await list_keys(made.session, organization_id=organization_id)
        assert key.hint == hint(second.secret)

    async def test_a_later_rotation_never_lengthens_an_older_grace(self, made: Made) -> None:
        organization_id, project_id = await made.tenant()
        first = await made.key(organization_id, project_id)
        await made.rotate(organization_id, first.id, timedelta(hours=1))
        await made.rotate(organization_id, first.id, timedelta(hours=50))
        assert [row.not_after for row in await secrets_of(made.session, first.id)] == [
            NOW + timedelta(hours=1),
            NOW + timedelta(hours=50),
            None,
        ]
        await made.rotate(organization_id, first.id, timedelta(0))
        assert [row.not_after for row in await secrets_of(made.session, first.id)] == [NOW, NOW, NOW, None]

    async def test_a_revoked_key_gets_no_new_secret(self, made: Made) -> None:
        organization_id, project_id = await made.tenant()
        first = await made.key(organization_id, project_id)
        await revoke_key(made.session, first.id, organization_id=organization_id, now=NOW)
        with pytest.raises(KeyRevoked):
            await made.rotate(organization_id, first.id, timedelta(hours=1))
        assert len(await secrets_of(made.session, first.id)) == 1

    async def test_another_organizations_key_does_not_exist(self, made: Made) -> None:
        mine, _ = await made.tenant()
        theirs = await made.key(*await made.tenant())
        with pytest.raises(TenantNotFound):
            await made.rotate(mine, theirs.id, timedelta(hours=1))
        with pytest.raises(TenantNotFound):
            await revoke_key(made.session, theirs.id, organization_id=mine, now=NOW)
        [row] = await secrets_of(made.session, theirs.id)
        assert row.not_after is None


class TestRevoke:
    async def test_it_is_idempotent_keeps_the_first_moment_and_is_told_again(self, made: Made) -> None:
        organization_id, project_id = await made.tenant()
        issued = await made.key(organization_id, project_id)
        first = await revoke_key(made.session, issued.id, organization_id=organization_id, now=NOW)
        second = await revoke_key(made.session, issued.id, organization_id=organization_id, now=NOW + timedelta(days=1))
        [key] = await list_keys(made.session, organization_id=organization_id)
        assert key.disabled_at == NOW
        assert second > first > issued.change

    async def test_the_owner_of_a_key_is_found_for_the_operator(self, made: Made) -> None:
        organization_id, project_id = await made.tenant()
        issued = await made.key(organization_id, project_id)
        assert await lifecycle.find_key_owner(made.session, issued.id) == organization_id
        with pytest.raises(TenantNotFound):
            await lifecycle.find_key_owner(made.session, KeyId("key_nope"))


class TestLimits:
    async def test_setting_replaces_the_whole_scope(self, made: Made) -> None:
        organization_id, _ = await made.tenant()
        session = made.session
        await set_limits(
            session,
            "organization",
            organization_id,
            RateLimits(requests_per_minute=5, tokens_per_day=9),
            organization_id=organization_id,
        )
        change = await set_limits(
            session, "organization", organization_id, RateLimits(requests_per_minute=6), organization_id=organization_id
        )
        found = await lifecycle.get_limits(session, organization_id=organization_id)
        assert found == {("organization", organization_id): RateLimits(requests_per_minute=6)}
        assert (await changes_of(session, organization_id))[-1] == (change, None)

    async def test_limits_are_the_organizations_own(self, made: Made) -> None:
        one, other = (await made.tenant())[0], (await made.tenant())[0]
        await set_limits(made.session, "model", "m", RateLimits(requests_per_minute=5), organization_id=one)
        assert await lifecycle.get_limits(made.session, organization_id=other) == {}


class TestTenants:
    async def test_projects_are_listed_by_owner_oldest_first(self, made: Made) -> None:
        organization_id, first = await made.tenant()
        other, _ = await made.tenant()
        second = await create_project(made.session, "Q", organization_id=organization_id)
        listed = await list_projects(made.session, organization_id=organization_id)
        assert [project.id for project in listed] == [first, second.id]
        assert {project.organization_id for project in listed} == {organization_id}
        assert {organization_id, other} <= {one.id for one in await list_organizations(made.session)}
        with pytest.raises(TenantNotFound):
            await create_project(made.session, "X", organization_id=OrganizationId(new_id("org")))
        with pytest.raises(TenantNotFound):
            await only_organization(made.session)


async def test_changes_become_visible_in_the_order_of_their_numbers(database: Database, stores: TestStores) -> None:
    """Guarantee: a reader that has seen number n has missed none below it, however the writers interleave."""
    tenants = [await new_tenant(database, stores.pepper) for _ in range(3)]
    seen: list[int] = []
    behind: list[int] = []

    async def write(tenant: Tenant, turn: int) -> None:
        async with database.transaction() as session:
            await set_limits(
                session, "model", f"m{turn}", RateLimits(requests_per_day=1), organization_id=tenant.organization_id
            )

    async def read() -> None:
        async with database.transaction() as session:
            found = list(await session.scalars(select(KeyChangeRow.sequence)))
        late = set(found) - set(seen)
        behind.extend(number for number in late if seen and number < max(seen))
        seen.extend(late)

    for _ in range(5):
        writers = [write(tenant, turn) for turn, tenant in enumerate(tenants)]
        await asyncio.gather(*writers, read(), read())
    await read()
    assert len(seen) >= 15 + 3
    assert behind == []


async def test_no_table_holds_a_secret(database: Database, stores: TestStores, tenant: Tenant) -> None:
    """Guarantee: the plain key, and its secret part, are in no column of any table."""
    async with database.transaction() as session:
        rotated = await rotate_key(
            session,
            tenant.key_id,
            organization_id=tenant.organization_id,
            grace=timedelta(hours=1),
            pepper=stores.pepper,
            now=NOW,
        )
        tables = list(await session.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")))
        assert set(Table.metadata.tables) <= set(tables)
        for table in tables:
            for secret in (tenant.key, rotated.secret):
                for part in (secret[17:60], secret.encode()[17:60].hex(), stores.pepper.key.hex()):
                    found = await session.scalar(
                        text(f'SELECT count(*) FROM "{table}" AS row WHERE row::text LIKE :part'), {"part": f"%{part}%"}
                    )
                    assert found == 0, table
        # The search itself can find something.
        hints = await session.scalar(
            text("SELECT count(*) FROM api_key_secrets AS row WHERE row::text LIKE :part"),
            {"part": f"%{tenant.key[-4:]}%"},
        )
        assert hints == 1
