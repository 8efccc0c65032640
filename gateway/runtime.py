"""The parts of one API process, put together and taken apart in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import structlog

from core.clock import Clock, SystemClock
from core.database import DOWN, Database
from core.http1.client import Http1Client
from core.http1.connections import ConnectionLimits
from core.http1.proxies import ProxySettings
from core.ids import GatewayId, new_id
from core.log_writer import LogWriter
from core.redis import Scripts, scripts_for
from core.settings import Settings
from gateway.admission import Admission
from gateway.catalog_file import CatalogFile
from gateway.edge import HotRoutes
from gateway.http1.listener import Listener
from gateway.idempotency import Idempotency
from gateway.idempotency_claims import Claims
from gateway.live import LiveRuns
from gateway.metrics import CallMetrics
from gateway.request_log import RequestLog
from gateway.routes.reading import CONNECTIONS_MAX, Reading
from gateway.webhook_parts import WebhookParts
from inference.call import Inference
from inference.exchange import Exchange
from inference.metered import CallMeter
from inference.routing import Router
from inference.upstreams.demo import Demo
from inference.upstreams.openai_http import OpenAIHttp
from inference.upstreams.via_litellm import ViaLitellm
from keys import usage_marks
from keys.authenticate import Authenticator
from keys.limits import QUOTA_SCRIPTS
from keys.local_quota import LocalQuota
from keys.plans import PlanLimits
from keys.quota import Quota
from keys.revocation import KeyFeed
from metering.billing.plans import Plans
from metering.caps import SpentCaps
from metering.ledger import Ledger
from metering.prices import PriceBook

if TYPE_CHECKING:
    # Imported where Stripe is configured, and nowhere else: see `_billing`.
    from gateway.billing_parts import BillingParts

# Two looks make a change, so that it is taken over within a second.
_RELOAD_SECONDS: Final = 0.5
# What piles up for a caller who reads slowly, before reading from the provider stops.
_BUFFERED_BYTES_MAX: Final = 64 * 1024
# Each statement of a gateway touches a few rows; a connection that takes longer is broken, and is dropped.
_STATEMENT_SECONDS_MAX: Final = 5.0
_SNAPSHOT_SECONDS: Final = 2.0
# A new price holds on every gateway this long after it was set, at the latest.
_PRICES_SECONDS: Final = 5.0
_log = structlog.get_logger(__name__)


class Runtime:
    """Everything one API process works with. Made by `running`, and nowhere else."""

    def __init__(
        self, settings: Settings, log: LogWriter, *, database: Database, scripts: Scripts, feed: KeyFeed
    ) -> None:
        assert settings.database_url is not None
        self.settings = settings
        self._logs_requests = settings.log.requests
        self.database = database
        self.scripts = scripts
        self.feed = feed
        self.catalog_file = CatalogFile(settings.config_path, os.environ)
        self.router = Router()
        self.client = _client(settings)
        self.clock = SystemClock()
        self.reading = _reading(settings.database_url, self.clock)
        self.quota = Quota(scripts, LocalQuota(self.clock, lambda: feed.live_gateways), SpentCaps(database))
        self.authenticator = Authenticator(
            database,
            settings.peppers,
            defaults=lambda: self.catalog_file.limits,
            is_feed_live=feed.is_live,
            plan_limits=self._plan_limits,
        )
        self.admission = Admission(settings.edge)
        self.live = LiveRuns(settings.edge, self.quota)
        self.prices = PriceBook(self.clock)
        self.ledger = Ledger(settings.database_url, feed.gateway_id, self.clock, observed=self.live.observed)
        self.is_stopping = False
        self.listener: Listener | None = None
        self.log = log
        self.request_log = RequestLog(log)
        self.metrics = CallMetrics(settings.data_dir / "metrics", self._sample)
        self.upstreams = {"openai": OpenAIHttp(self.client), "litellm": ViaLitellm(), "demo": Demo()}
        self.inference = Inference(
            catalog=lambda: self.catalog_file.catalog,
            quota=self.quota,
            router=self.router,
            upstreams=self.upstreams,
            meter=CallMeter(self.ledger, self.prices),
            on_settled=self._report,
        )
        self.idempotency = _idempotency(settings, database, feed)
        self.webhooks = WebhookParts(settings)
        self.billing = _billing(settings, database, self.clock, lambda: self.catalog_file.plans)
        self.hot = self._hot_routes()

    def _hot_routes(self) -> HotRoutes:
        return HotRoutes(
            settings=self.settings.edge,
            authenticator=self.authenticator,
            inference=self.inference,
            admission=self.admission,
            live=self.live,
            idempotency=self.idempotency,
        )

    def _plan_limits(self, name: str) -> PlanLimits | None:
        """Return what a plan includes. One that aap.toml does not have limits nothing, which is told."""
        limits = self.catalog_file.plans.limits_of(name)
        if limits is None:
            _log.warning("plan.unknown", plan=name)
        return limits

    def _report(self, exchange: Exchange, tokens: tuple[int, int]) -> None:
        """Say that a call has ended, and how many tokens went in and out."""
        duration_seconds = time.perf_counter() - exchange.started_at
        self.metrics.count(exchange, tokens, duration_seconds)
        if self._logs_requests:
            self.request_log.write(exchange, tokens, duration_seconds)

    def _sample(self) -> tuple[dict[str, float], dict[str, float]]:
        server = self.listener.state if self.listener is not None else None
        counters = {
            "aap_quota_local_decisions": float(self.quota.local_decisions),
            "aap_admission_refused": float(self.admission.refused),
            "aap_ledger_failed_writes": float(self.ledger.failures),
            "aap_ledger_refused_rows": float(self.ledger.refused_rows),
            "aap_log_dropped_writes": float(self.log.dropped),
            "aap_upstream_requests_on_reused_connections": float(self.client.requests_reused),
            "aap_upstream_stale_retries": float(self.client.requests_retried_stale),
            "aap_http_refused": float(server.refused if server else 0),
        }
        gauges = {
            "aap_requests_in_flight": float(self.admission.running),
            "aap_requests_queued": float(self.admission.queued),
            "aap_streams_open": float(self.live.streams),
            "aap_connections_open": float(len(server.connections) if server else 0),
            "aap_request_bodies_bytes": float(server.bodies_bytes if server else 0),
            "aap_event_loop_lag_seconds": self.live.lag_seconds,
            "aap_key_feed_live": float(self.feed.is_live()),
            "aap_quota_undelivered_settlements": float(len(self.scripts.undelivered)),
            "aap_ledger_intents_waiting": float(self.ledger.intents_waiting),
            "aap_ledger_entries_waiting": float(self.ledger.entries_waiting),
            "aap_ledger_undurable_seconds": self.ledger.undurable_seconds,
            "aap_redis_up": float(self.scripts.is_up),
            "aap_deployments_resting": float(
                sum(
                    self.router.state_of(deployment) != "closed"
                    for model in self.catalog_file.catalog
                    for deployment in model.deployments
                )
            ),
            "aap_upstream_connections_open": float(self.client.connections_open),
            "aap_upstream_connections_idle": float(self.client.connections_idle),
        }
        return counters, gauges

    async def keep_house(self) -> None:
        """Reload aap.toml when it changes, write down when keys were used, leave the metrics for a scrape."""
        flushed_at = saved_at = priced_at = time.monotonic()
        while True:
            await asyncio.sleep(_RELOAD_SECONDS)
            if self.catalog_file.reload_if_changed():
                self.authenticator.forget_all()
            now = time.monotonic()
            if now - priced_at >= _PRICES_SECONDS or not self.prices.is_loaded:
                priced_at = now
                await self.refresh_prices()
            if now - saved_at >= _SNAPSHOT_SECONDS:
                saved_at = now
                self.metrics.save()
            if now - flushed_at >= usage_marks.FLUSH_SECONDS:
                flushed_at = now
                await self.flush_marks()

    async def refresh_prices(self) -> None:
        """Read the prices of the catalog's models, if any have changed. PostgreSQL down: next time."""
        names = {model.name for model in self.catalog_file.catalog}
        for model in self.catalog_file.catalog:
            names.update(name for deployment in model.deployments for name in deployment.price_names)
        try:
            await self.prices.refresh(self.database, names)
        except DOWN as error:
            _log.warning("prices.not_read", error=type(error).__name__)

    async def flush_marks(self) -> None:
        """Write down when keys were used. PostgreSQL down: next time."""
        try:
            await usage_marks.flush(self.database, self.authenticator.last_used)
        except Exception as error:  # noqa: BLE001 - a mark that is late must not end the housekeeping
            _log.warning("usage_marks.kept", error=type(error).__name__)


@asynccontextmanager
async def running(settings: Settings, log: LogWriter) -> AsyncGenerator[Runtime]:
    """Start the parts of an API process; at the end, stop them in reverse."""
    assert settings.database_url is not None
    assert settings.redis_url is not None
    database = Database(settings.database_url, statement_seconds_max=_STATEMENT_SECONDS_MAX)
    scripts = scripts_for(settings.redis_url, QUOTA_SCRIPTS)
    feed = KeyFeed(GatewayId(new_id("gw")), database, settings.redis_url)
    await scripts.start()
    runtime = Runtime(settings, log, database=database, scripts=scripts, feed=feed)
    await feed.start(runtime.authenticator.forget)
    await runtime.refresh_prices()
    await runtime.ledger.start()
    runtime.live.start()
    housekeeping = asyncio.create_task(runtime.keep_house())
    try:
        yield runtime
    finally:
        housekeeping.cancel()
        await asyncio.gather(housekeeping, return_exceptions=True)
        await runtime.live.close()
        await runtime.flush_marks()
        runtime.quota.flush()
        await asyncio.gather(runtime.ledger.close(), runtime.idempotency.stop())
        runtime.quota.flush()
        runtime.request_log.flush()
        runtime.metrics.save()
        await _close_all(runtime)


def _reading(database_url: str, clock: Clock) -> Reading:
    """Return what reading routes read by. Its connections are made when somebody reads: an idle process has none."""
    database = Database(
        database_url,
        connections_max=CONNECTIONS_MAX,
        statement_seconds_max=_STATEMENT_SECONDS_MAX,
        is_read_only=True,
    )
    return Reading(database, clock)


def _client(settings: Settings) -> Http1Client:
    limits = ConnectionLimits(
        connections_per_origin_max=settings.edge.in_flight_max, buffered_bytes_max=_BUFFERED_BYTES_MAX
    )
    return Http1Client(limits=limits, proxies=ProxySettings.from_environ(os.environ))


def _billing(settings: Settings, database: Database, clock: Clock, plans: Callable[[], Plans]) -> BillingParts | None:
    """Return what billing needs. Stripe's package is loaded where it is used: it takes 40 MB and 0.15 s."""
    if settings.stripe.api_key is None and not settings.stripe.webhook_secrets:
        return None
    parts: type[BillingParts] = import_module("gateway.billing_parts").BillingParts
    return parts(settings.stripe, database, clock, plans)


def _idempotency(settings: Settings, database: Database, feed: KeyFeed) -> Idempotency:
    claims = Claims(
        database,
        feed.gateway_id,
        kept_seconds=settings.idempotency.retention_seconds,
        lease_seconds=settings.ledger.lease_seconds,
    )
    return Idempotency(claims, settings.idempotency)


async def _close_all(runtime: Runtime) -> None:
    closers: list[Any] = [upstream.close for upstream in runtime.upstreams.values()]
    if runtime.billing is not None:
        closers.append(runtime.billing.close)
    # Last: settlements may still be on their way to Redis.
    closers += [
        runtime.webhooks.close,
        runtime.feed.close,
        runtime.scripts.close,
        runtime.reading.close,
        runtime.database.close,
    ]
    for close in closers:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(5):
                await close()
