"""What happens is told: each in the transaction in which it does, and only where somebody listens."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest

from core.clock import SystemClock
from core.database import Database
from core.ids import OrganizationId
from core.plain_sql import fetch
from keys.lifecycle import NewKey
from keys.plans import PlanLimits
from metering import allowances
from metering.billing.plans import Plan, Plans
from metering.billing.webhook_mails import note_webhooks
from metering.budgets import set_budget
from metering.entries import SETTLE, settle_arguments
from metering.usage import Units
from tests.conftest import PEPPER
from tests.harness.tenant import new_tenant
from tests.harness.webhook_place import new_endpoint
from tests.metering.conftest import OwnBooks
from webhooks import key_acts
from webhooks.events import EXAMPLES, EndpointFailing
from webhooks.publish import publish


async def events(database: Database, organization_id: OrganizationId, kind: str) -> list[dict[str, Any]]:
    """The data of the organization's events of a type, each of the form that is published for it."""
    async with database.transaction() as session:
        rows = await fetch(
            session,
            "SELECT id, data::text AS data FROM webhook_events WHERE organization_id = $1 AND type = $2 ORDER BY id",
            organization_id,
            kind,
        )
    for row in rows:
        msgspec.json.decode(row.data, type=type(EXAMPLES[kind]), strict=True)
        assert msgspec.json.decode(row.data).keys() == msgspec.to_builtins(EXAMPLES[kind]).keys()
    return [msgspec.json.decode(row.data) for row in rows]


class TestCalls:
    async def test_a_call_is_told_once_to_who_names_the_type(self, own: OwnBooks) -> None:
        books = own.books
        owner = books.tenant.organization_id
        await new_endpoint(own.database, "http://127.0.0.1:9/", owner, event_types=["chat.completed"])
        entry = books.entry(units=Units(input_tokens=120, output_tokens=48), cost=1, charge=46_800)
        for _ in range(2):
            # As after a commit whose answer was lost.
            await own.writer.fetch(SETTLE, *settle_arguments([entry]))
        (told,) = await events(own.database, owner, "chat.completed")
        assert told == {
            "request_id": entry.request_id,
            "project_id": books.tenant.project_id,
            "key_id": books.tenant.key_id,
            "model": "m",
            "operation": "chat",
            "status": 200,
            "outcome": "done",
            "is_estimated": False,
            "input_tokens": 120,
            "cached_input_tokens": 0,
            "output_tokens": 48,
            "reasoning_tokens": 0,
            "charge_usd": "0.0000468",
            "started_at": entry.started_ms // 1_000,
            "duration_ms": 5,
        }

    @pytest.mark.parametrize("types", [["*"], ["key.created"], None])
    async def test_where_nobody_names_it_nothing_is_written(self, own: OwnBooks, types: list[str] | None) -> None:
        owner = own.books.tenant.organization_id
        if types is not None:
            await new_endpoint(own.database, "http://127.0.0.1:9/", owner, event_types=types)
        await own.writer.fetch(SETTLE, *settle_arguments([own.books.entry()]))
        assert await events(own.database, owner, "chat.completed") == []

    @pytest.mark.parametrize("column", ["disabled_at", "deleted_at"])
    async def test_an_endpoint_that_is_off_does_not_listen(self, own: OwnBooks, column: str) -> None:
        owner = own.books.tenant.organization_id
        await new_endpoint(own.database, "http://127.0.0.1:9/", owner, event_types=["chat.completed"])
        statements = {
            "disabled_at": "UPDATE webhook_endpoints SET disabled_at = now()",
            "deleted_at": "UPDATE webhook_endpoints SET deleted_at = now()",
        }
        await own.writer.fetch(statements[column])
        await own.writer.fetch(SETTLE, *settle_arguments([own.books.entry()]))
        assert await events(own.database, owner, "chat.completed") == []

    async def test_others_calls_are_not_told(self, own: OwnBooks) -> None:
        other = await new_tenant(own.database, PEPPER)
        await new_endpoint(own.database, "http://127.0.0.1:9/", other.organization_id, event_types=["chat.completed"])
        await own.writer.fetch(SETTLE, *settle_arguments([own.books.entry()]))
        assert await events(own.database, own.books.tenant.organization_id, "chat.completed") == []
        assert await events(own.database, other.organization_id, "chat.completed") == []


async def test_a_budgets_thresholds_are_told_once_each(own: OwnBooks) -> None:
    books = own.books
    owner = books.tenant.organization_id
    async with own.database.transaction() as session:
        await set_budget(
            session,
            ("project", books.tenant.project_id),
            "month",
            limit=1_000_000_000,
            is_hard=True,
            organization_id=owner,
        )
    for _ in range(3):
        await own.writer.fetch(SETTLE, *settle_arguments([books.entry(cost=0, charge=450_000_000)]))
    told = await events(own.database, owner, "budget.threshold_reached")
    found = sorted((one["threshold_percent"], one["spent_usd"], one["limit_usd"]) for one in told)
    assert found == [(50, "0.9", "1"), (80, "0.9", "1"), (100, "1.35", "1")]
    assert {(one["scope"], one["scope_id"], one["is_hard"]) for one in told} == {
        ("project", books.tenant.project_id, True)
    }


async def test_a_plans_thresholds_are_told_once_each(own: OwnBooks) -> None:
    books = own.books
    owner = books.tenant.organization_id
    async with own.database.transaction() as session:
        await fetch(session, "UPDATE organizations SET plan = 'small' WHERE id = $1", owner)
    limits = PlanLimits(chat_requests_per_month=5)
    small = Plan(name="small", title="Small", price_cents_per_month=0, trial_days=0, bills_usage=False, limits=limits)
    plans = Plans(by_name={"small": small})
    clock = SystemClock()
    for count in range(5):
        await own.writer.fetch(SETTLE, *settle_arguments([books.entry()]))
        await allowances.note_thresholds(own.database, plans, clock)
        told = await events(own.database, owner, "limit.threshold_reached")
        assert sorted(one["threshold_percent"] for one in told) == {3: [80], 4: [80, 100]}.get(count, [])
    assert {(one["unit"], one["limit"]) for one in told} == {("chat_requests", 5)}


class TestKeys:
    async def test_making_rotating_and_revoking_are_told(self, own: OwnBooks) -> None:
        tenant, now = own.books.tenant, SystemClock().now()
        owner = tenant.organization_id
        async with own.database.transaction() as session:
            made = await key_acts.create_key(
                session, NewKey(name="app"), organization_id=owner, project_id=tenant.project_id, pepper=PEPPER
            )
        (created,) = await events(own.database, owner, "key.created")
        assert (created["id"], created["name"]) == (made.id, "app")
        assert made.secret not in str(created)
        async with own.database.transaction() as session:
            await key_acts.rotate_key(
                session, made.id, organization_id=owner, grace=timedelta(hours=1), pepper=PEPPER, now=now
            )
        (rotated,) = await events(own.database, owner, "key.rotated")
        assert rotated["old_secret_ends_at"] == int((now + timedelta(hours=1)).timestamp())
        for _ in range(2):
            async with own.database.transaction() as session:
                await key_acts.revoke_key(session, made.id, organization_id=owner, now=now)
        (revoked,) = await events(own.database, owner, "key.revoked")
        assert revoked["id"] == made.id

    async def test_a_leak_is_told_with_where(self, own: OwnBooks) -> None:
        tenant = own.books.tenant
        async with own.database.transaction() as session:
            await key_acts.revoke_key(
                session,
                tenant.key_id,
                organization_id=tenant.organization_id,
                now=SystemClock().now(),
                found_at="a public repository",
            )
        (leaked,) = await events(own.database, tenant.organization_id, "key.leaked")
        assert (leaked["id"], leaked["found_at"]) == (tenant.key_id, "a public repository")
        assert len(await events(own.database, tenant.organization_id, "key.revoked")) == 1

    async def test_a_key_that_ends_within_a_week_is_told_once(self, own: OwnBooks) -> None:
        tenant, now = own.books.tenant, SystemClock().now()
        owner = tenant.organization_id
        ids: dict[int, str] = {}
        for days in (1, 6, 8, -1):
            async with own.database.transaction() as session:
                new = NewKey(name=f"{days}", expires_at=now + timedelta(days=days))
                made = await key_acts.create_key(
                    session, new, organization_id=owner, project_id=tenant.project_id, pepper=PEPPER
                )
            ids[days] = made.id
        assert await key_acts.tell_expiring(own.database, now) == 2
        assert await key_acts.tell_expiring(own.database, now) == 0
        told = await events(own.database, owner, "key.expiring")
        assert {one["id"] for one in told} == {ids[1], ids[6]}
        assert await key_acts.tell_expiring(own.database, now + timedelta(days=2)) == 1


async def test_an_endpoint_that_fails_is_mailed_of_once(own: OwnBooks) -> None:
    owner = own.books.tenant.organization_id
    endpoint, _ = await new_endpoint(own.database, "http://127.0.0.1:9/secret-path", owner)
    async with own.database.transaction() as session:
        failing = EndpointFailing(
            endpoint_id=endpoint.id, description="orders", failing_since=1, disabled_after=2, problem="answered 500"
        )
        event_id = await publish(session, failing, organization_id=owner)
    assert [await note_webhooks(own.database) for _ in range(2)] == [1, 0]
    async with own.database.transaction() as session:
        (mail,) = await fetch(session, "SELECT kind, reason, facts FROM emails WHERE organization_id = $1", owner)
    assert (mail.kind, mail.reason) == ("webhook_failing", event_id)
    assert "secret-path" not in str(mail.facts)
