"""What `aap stripe` does."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import TypeVar

import msgspec
from sqlalchemy import select

from core.clock import SystemClock
from core.ids import OrganizationId
from gateway.catalog_file import CatalogFile
from gateway.cli.common import fail
from gateway.cli.stores import Stores, on_stores
from keys.lookup import require_organization
from metering.billing import agreement, catalog, inbox, outbox
from metering.billing.accepting import Accepted, accept_differences
from metering.billing.apply import Applier
from metering.billing.catalog import CatalogChange
from metering.billing.errors import StripeFailed
from metering.billing.export import Exported, Exporter
from metering.billing.plans import Plans
from metering.billing.reconcile import Reconciled, Reconciler
from metering.billing.stripe_api import StripeApi
from metering.billing.tables import StripeEventRow

_T = TypeVar("_T")
_STATEMENT_SECONDS_MAX = 300.0


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """What a comparison came to."""

    round: Reconciled
    subscriptions: int
    differences: list[agreement.DifferenceView]


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the inbox."""

    id: str
    type: str
    object_id: str
    state: str
    attempts: int
    problem: str | None
    source: str
    occurred_at: datetime
    applied_at: datetime | None


def synchronise(*, is_dry_run: bool) -> list[CatalogChange]:
    """Make Stripe's catalog what aap.toml says, or say what that would be."""

    async def act(stores: Stores, api: StripeApi) -> list[CatalogChange]:
        return await catalog.synchronise(stores.database, api, _plans(stores), is_dry_run=is_dry_run)

    return _at_stripe(act)


def export(org: str | None, *, is_flush: bool, shows_progress: bool) -> Exported:
    """Report what is due, and show how far that is."""

    async def act(stores: Stores, api: StripeApi) -> Exported:
        clock = SystemClock()
        only = await _chosen(stores, org)
        async with stores.database.transaction() as session:
            await outbox.bring_forward(session, clock.now(), is_flush=is_flush, only=only)
        exporter = Exporter(stores.database, api, clock, stream_above=stores.settings.stripe.stream_above)
        if not shows_progress:
            return await exporter.round(only=only)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("reports", total=None)

            def show(done: Exported) -> None:
                progress.update(task, completed=done.turns, total=max(done.due, done.turns))
                progress.update(task, description=f"{done.acked} reports; organizations and meters")

            return await exporter.round(show, only=only)

    return _at_stripe(act)


def reconcile(org: str | None, *, days: int, may_repair: bool) -> Compared:
    """Read the subscriptions, compare the hours."""

    async def act(stores: Stores, api: StripeApi) -> Compared:
        clock = SystemClock()
        only = await _chosen(stores, org)
        plans = _plans(stores)
        applier = Applier(stores.database, api, clock, lambda: plans, meters=catalog.meters_of(plans))
        subscriptions = 0
        if may_repair:
            await applier.catch_up()
            await applier.apply_due()
            subscriptions = await applier.look_at_customers(only, with_invoices=True)
        since = clock.now().replace(minute=0, second=0, microsecond=0) - timedelta(days=days)
        found = await Reconciler(stores.database, api, clock).round(only=only, since=since, may_repair=may_repair)
        async with stores.database.transaction() as session:
            differences = (await agreement.reconciliation(session, SystemClock().now())).differences
        return Compared(round=found, subscriptions=subscriptions, differences=differences)

    return _at_stripe(act)


def status(org: str | None) -> agreement.ReconciliationView:
    """Return what stands between the ledger and Stripe, of all organizations or of one."""

    async def act(stores: Stores) -> agreement.ReconciliationView:
        only = await _chosen(stores, org)
        async with stores.database.transaction() as session:
            return await agreement.reconciliation(session, SystemClock().now(), only=only)

    return on_stores(act)


def accept(org: str) -> Accepted:
    """Take what stands between the ledger and Stripe of an organization as decided about."""

    async def act(stores: Stores) -> Accepted:
        organization_id = await _chosen(stores, org)
        assert organization_id is not None
        async with stores.database.transaction() as session:
            return await accept_differences(session, SystemClock().now(), organization_id=organization_id)

    return on_stores(act)


def list_events(state: str | None, limit: int) -> list[EventView]:
    """Return events of the inbox, newest first."""

    async def act(stores: Stores) -> list[EventView]:
        statement = select(StripeEventRow).order_by(StripeEventRow.received_at.desc()).limit(limit)
        if state is not None:
            statement = statement.where(StripeEventRow.state == state)
        async with stores.database.transaction() as session:
            rows = await session.scalars(statement)
            names = EventView.__struct_fields__
            return [EventView(**{name: getattr(row, name) for name in names}) for row in rows]

    return on_stores(act)


def replay(event_id: str | None) -> int:
    """Have an event applied again, or all that were given up."""

    async def act(stores: Stores) -> int:
        async with stores.database.transaction() as session:
            count = await inbox.replay(session, event_id)
        if event_id is not None and not count:
            fail(f"there is no event {event_id}")
        return count

    return on_stores(act)


def dismiss(event_id: str) -> None:
    """Let an event that was given up count no more."""

    async def act(stores: Stores) -> None:
        async with stores.database.transaction() as session:
            if not await inbox.dismiss(session, event_id):
                fail(f"there is no event {event_id} that was given up")

    on_stores(act)


def resume(org: str) -> int:
    """Go on with what was parked."""

    async def act(stores: Stores) -> int:
        organization_id = await _chosen(stores, org)
        assert organization_id is not None
        async with stores.database.transaction() as session:
            return await outbox.resume(session, SystemClock().now(), organization_id=organization_id)

    return on_stores(act)


def _at_stripe(act: Callable[[Stores, StripeApi], Awaitable[_T]]) -> _T:
    async def with_api(stores: Stores) -> _T:
        if stores.settings.stripe.api_key is None:
            fail("STRIPE_API_KEY is not set. `aap stripe twin` is a stand-in for those who have no account.")
        api = StripeApi(stores.settings.stripe, SystemClock())
        try:
            return await act(stores, api)
        except StripeFailed as error:
            fail(f"Stripe: {type(error).__name__}: {error}")
        finally:
            await api.close()

    return on_stores(with_api, statement_seconds_max=_STATEMENT_SECONDS_MAX)


async def _chosen(stores: Stores, org: str | None) -> OrganizationId | None:
    if org is None:
        return None
    async with stores.database.transaction() as session:
        return await require_organization(session, organization_id=OrganizationId(org))


def _plans(stores: Stores) -> Plans:
    return CatalogFile(stores.settings.config_path, os.environ).plans
