"""Billing as a worker and an API process have it, in front of a Stripe twin, on a clock that tests move."""

from __future__ import annotations

import tomllib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import text

from core.clock import ManualClock
from core.database import Database
from core.ids import OrganizationId
from core.settings import Pepper, StripeSettings
from metering.billing import catalog, prepaid
from metering.billing.agreement import ReconciliationView, reconciliation
from metering.billing.apply import Applier
from metering.billing.customers import Customers, ReturnPages
from metering.billing.export import Exported, Exporter
from metering.billing.meters import USAGE
from metering.billing.plans import EXAMPLE, Plans, build_plans
from metering.billing.prepaid import Credit
from metering.billing.reconcile import Reconciled, Reconciler
from metering.billing.stripe_api import StripeApi
from metering.billing.top_up import TopUps
from metering.billing.twin.app import Twin
from metering.billing.twin.options import TwinOptions
from metering.billing.twin.server import TwinServer, serving
from tests.harness.eventually import eventually
from tests.harness.stripe_types import check_requests
from tests.harness.tenant import new_tenant

DOLLAR = 1_000_000_000
"""In nano-USD."""
START = datetime(2027, 1, 15, 12, 20, 30, tzinfo=UTC)
PAGES = ReturnPages(success_url="https://example.com/paid", cancel_url="https://example.com/no")
TABLES = (
    *(
        "meter_cursors",
        "meter_windows",
        "meter_reports",
        "meter_checks",
        "uncollected_usage",
        "stripe_events",
        "stripe_marks",
    ),
    *("subscriptions", "billing_periods", "invoices", "emails", "top_ups", "wallet_postings", "wallet_transfers"),
    *("subscription_changes", "billing_customers", "spend_windows"),
)
_USE = """
INSERT INTO spend_windows AS w (organization_id, seconds, starts_at, project_id, key_id, model, operation, service_tier,
  requests, unpriced_requests, cost_nano_usd, charge_nano_usd, input_tokens, output_tokens)
SELECT :org, width, date_bin(make_interval(secs => width), CAST(:at AS timestamptz), timestamptz 'epoch'),
  'proj_1', 'key_1', 'm', 'chat', 'default', 1, 0, CAST(:nano AS bigint), CAST(:nano AS bigint), 10, 20
FROM (VALUES (60), (3600)) AS widths (width)
ON CONFLICT (organization_id, seconds, starts_at, project_id, key_id, model, operation, service_tier) DO UPDATE SET
  requests = w.requests + 1, cost_nano_usd = w.cost_nano_usd + excluded.cost_nano_usd,
  charge_nano_usd = w.charge_nano_usd + excluded.charge_nano_usd,
  input_tokens = w.input_tokens + 10, output_tokens = w.output_tokens + 20
"""


@dataclass
class BillingPlace:
    """One operator, with plans as `aap plans example` prints them."""

    database: Database
    pepper: Pepper
    clock: ManualClock
    twin: Twin
    server: TwinServer
    api: StripeApi
    plans: Plans
    settings: StripeSettings

    @property
    def customers(self) -> Customers:
        return Customers(self.database, self.api, self.clock, lambda: self.plans, test_clock=self.settings.test_clock)

    @property
    def applier(self) -> Applier:
        meters = catalog.meters_of(self.plans)
        return Applier(self.database, self.api, self.clock, lambda: self.plans, meters=meters)

    @property
    def exporter(self) -> Exporter:
        """Another worker each time."""
        return Exporter(self.database, self.api, self.clock, stream_above=self.settings.stream_above)

    @property
    def reconciler(self) -> Reconciler:
        return Reconciler(self.database, self.api, self.clock)

    @property
    def top_ups(self) -> TopUps:
        return TopUps(self.database, self.api, self.clock)

    async def synchronise(self) -> list[catalog.CatalogChange]:
        return await catalog.synchronise(self.database, self.api, self.plans, is_dry_run=False)

    async def organization(self) -> OrganizationId:
        return (await new_tenant(self.database, self.pepper)).organization_id

    async def subscriber(self, plan: str = "pro", token: str = "pm_card_visa") -> OrganizationId:
        """An organization that has checked out, and whose subscription we know of."""
        organization_id = await self.organization()
        checkout = await self.customers.subscribe(organization_id, plan, PAGES)
        assert self.twin.complete_checkout(checkout.id, token) == (token == "pm_card_visa")
        await self.hear()
        return organization_id

    async def second_subscription(self, organization_id: OrganizationId, prices: list[str] | None = None) -> str:
        """Another one, as an operator makes one in the dashboard; we have not heard of it yet. None: of the same prices."""
        first = self.twin.state.tables["subscription"][await self.subscription_of(organization_id)]
        same = [item["price"]["id"] for item in first["items"]["data"]]
        made = await self.api._client.v1.subscriptions.create_async(
            {
                "customer": first["customer"],
                "items": [{"price": price} for price in prices or same],
                "default_payment_method": first["default_payment_method"],
            }
        )
        return made.id

    async def subscription_of(self, organization_id: OrganizationId) -> str:
        """The only one that we know of."""
        query = "SELECT id FROM subscriptions WHERE organization_id = :org"
        ((found,),) = await self.rows(query, org=organization_id)
        return str(found)

    def usage_prices(self, subscription_id: str) -> list[str]:
        """The prices by which a subscription bills usage, at Stripe."""
        items = self.twin.state.tables["subscription"][subscription_id]["items"]["data"]
        return [item["price"]["id"] for item in items if item["price"]["recurring"]["usage_type"] == "metered"]

    def invoiced_usage(self) -> int:
        """What Stripe has on invoices that are final, in micro-USD."""
        return sum(
            line["quantity"]
            for invoice in self.twin.state.tables["invoice"].values()
            if invoice["status"] in {"paid", "open"}
            for line in invoice["lines"]["data"]
            if line["_price"]["recurring"]["usage_type"] == "metered"
        )

    async def agreement(self, only: OrganizationId | None = None) -> ReconciliationView:
        """What stands between the ledger and Stripe, as the operator is shown it."""
        async with self.database.transaction() as session:
            return await reconciliation(session, self.clock.now(), only=only)

    async def add_credit(self, organization_id: OrganizationId, cents: int, source: str) -> None:
        credit = Credit(cents=cents, source=source)
        async with self.database.transaction() as session:
            await prepaid.add_credit(session, credit, self.clock.now(), organization_id=organization_id)

    async def credit_left(self, organization_id: OrganizationId) -> int:
        """In nano-USD."""
        async with self.database.transaction() as session:
            return await prepaid.left(session, self.clock.now(), organization_id=organization_id)

    async def hear(self) -> None:
        """Learn what happened at Stripe, as a worker does after an outage."""
        await self.applier.catch_up()
        await self.applier.apply_due()

    async def use(self, organization_id: OrganizationId, nano_usd: int, at: datetime | None = None) -> None:
        """A call was settled that is charged so much and began then."""
        async with self.database.transaction() as session:
            values = {"org": organization_id, "at": at or self.clock.now(), "nano": nano_usd}
            await session.execute(text(_USE), values)

    async def export(self) -> Exported:
        return await self.exporter.round()

    async def reconcile(self, *, days: int = 40) -> Reconciled:
        """Look twice, as far apart as a difference must stand."""
        since = self.clock.now().replace(minute=0, second=0, microsecond=0) - timedelta(days=days)
        await self.reconciler.round(since=since)
        self.pass_time(minutes=11)
        return await self.reconciler.round(since=since)

    async def held_up(self, number: int = 1) -> None:
        """Wait until so many transactions wait for a lock that another one has."""
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

        async def are_waiting() -> bool:
            return len(await self.rows(query)) >= number

        await eventually(are_waiting)

    def pass_time(self, **step: float) -> None:
        self.clock.advance(timedelta(**step))
        self.twin.tick()

    async def pass_hours(self, hours: int) -> None:
        """Let a worker do each hour what it does in an hour, besides comparing."""
        for _ in range(hours):
            self.pass_time(hours=1)
            await self.hear()
            await self.export()

    async def pass_days(self, days: int) -> None:
        """Let a worker do all that it does, once a day."""
        for _ in range(days):
            self.pass_time(days=1)
            await self.hear()
            await self.export()
            await self.reconciler.round()
            await self.reconciler.round(is_doubt_only=True)

    async def customer_of(self, organization_id: OrganizationId) -> str:
        return await self.customers.customer_of(organization_id)

    async def stripe_total(self, organization_id: OrganizationId) -> int:
        """What Stripe has counted, in micro-USD."""
        self.twin.settle()
        return self.twin.meter_total(await self.customer_of(organization_id), USAGE.event_name, 0, 2**33)

    async def ledger_total(self, organization_id: OrganizationId) -> int:
        """What the ledger has, in nano-USD."""
        query = "SELECT coalesce(sum(charge_nano_usd), 0) FROM spend_windows WHERE organization_id = :org AND seconds = 3600"
        async with self.database.transaction() as session:
            return int(await session.scalar(text(query), {"org": organization_id}) or 0)

    async def rows(self, query: str, **values: object) -> list[tuple[object, ...]]:
        async with self.database.transaction() as session:
            return [tuple(row) for row in await session.execute(text(query), values)]


async def empty(database: Database) -> None:
    async with database.transaction() as session:
        await session.execute(text("TRUNCATE " + ", ".join(TABLES) + " CASCADE"))


@asynccontextmanager
async def billing_place(
    database: Database,
    pepper: Pepper,
    options: TwinOptions | None = None,
    *,
    stream_above: int = 5_000,
    timeout_seconds: float = 10,
) -> AsyncGenerator[BillingPlace]:
    """A fresh twin and nothing sold yet, for a block."""
    clock = ManualClock(START)
    twin = Twin(clock, options)
    await empty(database)
    async with serving(twin) as server:
        settings = StripeSettings(
            api_key=twin.options.api_key,
            webhook_secrets=(),
            url=server.url,
            requests_per_second=10_000,
            stream_above=stream_above,
            test_clock=None,
        )
        api = StripeApi(settings, clock, timeout_seconds=timeout_seconds)
        plans = build_plans(tomllib.loads(EXAMPLE))
        try:
            place = BillingPlace(database, pepper, clock, twin, server, api, plans, settings)
            await place.synchronise()
            yield place
            check_requests(twin)
        finally:
            await api.close()
            await empty(database)
