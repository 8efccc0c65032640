"""Sequences of everything that can happen between the ledger and Stripe. 500 of them with AAP_TEST_SCALE=full."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from core.database import Database
from core.ids import OrganizationId
from metering.billing.errors import StripeFailed
from metering.billing.export import Exporter
from metering.billing.outbox import claim
from metering.billing.stripe_objects import MeterEvent
from metering.billing.twin.faults import FaultPlan
from metering.billing.twin.options import TwinOptions
from tests.harness.billing import BillingPlace, billing_place
from tests.harness.stores import TestStores

_IS_FULL = os.environ.get("AAP_TEST_SCALE") == "full"
_METER_EVENTS = "/v1/billing/meter_events"
# Stripe's sums are behind its answers, by less than a difference must stand for.
_OPTIONS = TwinOptions(aggregation_lag_seconds=120, journal_max=10)

_usage = st.tuples(
    st.just("use"),
    st.one_of(st.integers(1, 3_000), st.integers(1, 10**12), st.integers(-(10**6), -1)),
    st.integers(0, 40 * 60),
)
_fault = st.tuples(
    st.just("fault"),
    st.sampled_from(["drop_after_commit", "error_before_commit", "error_after_commit", "reset", "slow"]),
    st.integers(1, 3),
)
_step = st.tuples(st.just("pass"), st.sampled_from([1, 20, 61, 185, 25 * 60]), st.just(0))
_act = st.tuples(
    st.sampled_from(["send", "send", "crash before", "crash after", "duplicate", "two at once", "reconcile", "hear"]),
    st.just(0),
    st.just(0),
)
_actions = st.lists(st.one_of(_usage, _usage, _fault, _step, _act, _act), min_size=3, max_size=14)


@pytest.fixture(scope="session")
async def states(books: Database, stores: TestStores) -> AsyncGenerator[BillingPlace]:
    async with billing_place(books, stores.pepper, _OPTIONS, timeout_seconds=0.25) as made:
        yield made


@given(actions=_actions)
@settings(
    max_examples=600 if _IS_FULL else 25,
    deadline=None,
    # A smaller sequence is not worth the minutes that it takes to find one.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_whatever_happens_stripe_counts_the_ledger_once(
    actions: list[tuple[str, object, int]], states: BillingPlace
) -> None:
    """Guarantee: never twice, never lost: in the end Stripe's sum is the ledger's, to the micro-USD.

    Unless a report was open for longer than Stripe knows identifiers, that needs no repair.
    """
    place = states
    async with place.database.transaction() as session:
        await session.execute(text("DELETE FROM meter_cursors"))
    organization_id = await place.subscriber()
    started_at = place.clock.now()
    for name, argument, more in actions:
        # What begins before the subscription is nobody's to pay.
        late = min(timedelta(minutes=more), place.clock.now() - started_at) if name == "use" else timedelta(0)
        await _do(place, organization_id, (name, argument, more), late)
    place.twin.faults.planned.clear()
    await _let_settle(place, organization_id)
    total = await place.ledger_total(organization_id)
    assert await place.stripe_total(organization_id) == total // 1_000
    if not any(name == "pass" and argument == 25 * 60 for name, argument, _ in actions):
        query = "SELECT count(*) FROM meter_reports WHERE organization_id = :org AND kind = 'repair'"
        assert await place.rows(query, org=organization_id) == [(0,)]


async def _do(
    place: BillingPlace, organization_id: OrganizationId, act: tuple[str, object, int], late: timedelta
) -> None:
    name, argument, nth = act
    match name:
        case "use":
            assert isinstance(argument, int)
            await place.use(organization_id, argument, place.clock.now() - late)
        case "fault":
            plan = FaultPlan(kind=argument, method="POST", path=_METER_EVENTS, nth=nth, seconds=0.5)
            place.twin.faults.add(plan)
        case "pass":
            assert isinstance(argument, int)
            place.pass_time(minutes=argument)
        case "send":
            await place.export()
        case "two at once":
            await asyncio.gather(place.export(), place.export())
        case "crash before" | "crash after":
            await _crash(place, place.exporter, has_sent=name == "crash after")
        case "duplicate":
            await _send_again(place, organization_id)
        case "reconcile":
            await place.reconcile()
        case _:
            await place.hear()


async def _crash(place: BillingPlace, exporter: Exporter, *, has_sent: bool) -> None:
    """A worker dies with its lease: before it has sent anything, or after and before it could write that down."""
    async with place.database.transaction() as session:
        claimed = await claim(session, exporter._worker, place.clock.now(), limit=10)
    batches = await exporter._prepared(claimed)
    if has_sent:
        await exporter._sent(batches)


async def _send_again(place: BillingPlace, organization_id: OrganizationId) -> None:
    """Somebody sends once more what was answered less than a day ago."""
    query = """
    SELECT meter, identifier, value, event_at FROM meter_reports
    WHERE organization_id = :org AND acked_at > :since ORDER BY acked_at DESC LIMIT 1
    """
    since = place.clock.now() - timedelta(hours=22)
    for meter, identifier, value, event_at in await place.rows(query, org=organization_id, since=since):
        event = MeterEvent(
            event_name=meter,
            customer_id=await place.customer_of(organization_id),
            identifier=identifier,
            value=value,
            occurred_at=event_at,
        )
        with contextlib.suppress(StripeFailed):
            await place.api.send_meter_event(event)


async def _let_settle(place: BillingPlace, organization_id: OrganizationId) -> None:
    """Time passes, and everything works."""
    query = """
    SELECT (SELECT count(*) FROM meter_reports WHERE organization_id = :org AND state IN ('new', 'sent', 'unknown'))
      + (SELECT count(*) FROM meter_checks WHERE organization_id = :org AND state <> 'agrees')
    """
    for turn in range(12):
        place.pass_time(hours=1, minutes=7)
        await place.hear()
        await place.export()
        await place.reconcile()
        await place.export()
        if await place.rows(query, org=organization_id) == [(0,)] and turn:
            break
    assert await place.rows(query, org=organization_id) == [(0,)]
