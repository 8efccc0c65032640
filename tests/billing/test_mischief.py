"""Webhooks that are lost, doubled and late: whatever arrives, one look at Stripe puts everybody right."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from core.database import Database
from core.ids import OrganizationId
from metering.billing.errors import BillingUnavailable, NotSubscribed, PaymentRefused
from metering.billing.twin.engine.payments import attach
from metering.billing.twin.options import Mischief, TwinOptions
from metering.billing.twin.resources.events import add_endpoint
from tests.harness.billing import PAGES, BillingPlace, billing_place
from tests.harness.gateway import Gateway, config_for
from tests.harness.stores import TestStores

_SECRET = "whsec_of_the_mischief_tests"
_SEEDS = range(10 if os.environ.get("AAP_TEST_SCALE") == "full" else 2)
_ORGANIZATIONS = 12


@pytest.fixture
async def gateway(books_url: str, stores: TestStores, workdir: Path) -> AsyncGenerator[Gateway]:
    own = stores._replace(database_url=books_url)
    made = Gateway(own, workdir, config_for("http://127.0.0.1:9"), STRIPE_WEBHOOK_SECRET=_SECRET)
    await made.start()
    yield made
    await made.stop()


@pytest.mark.parametrize("seed", _SEEDS)
async def test_one_reconciliation_puts_every_organization_right(
    books: Database, stores: TestStores, gateway: Gateway, seed: int
) -> None:
    """Guarantee: delivered twice, out of order, 30 % dropped: plan and status are what Stripe's objects say."""
    mischief = Mischief(drop_share=0.3, duplicate_share=0.3, reorder_share=0.5, delay_seconds_max=600)
    options = TwinOptions(
        webhook_secret=_SECRET, seed=seed, mischief=mischief, payment_retry_days=(1, 2), after_last_retry="unpaid"
    )
    chance = random.Random(seed)
    async with billing_place(books, stores.pepper, options) as place:
        add_endpoint(place.twin.state, f"{gateway.url}/v1/stripe/webhook", ["*"])
        organizations = [await _checked_out(place, chance) for _ in range(_ORGANIZATIONS)]
        for _ in range(40):
            await _live_on(place, chance.choice(organizations), chance)
            await place.server.deliver_due()
            await place.applier.apply_due()
        arrived = await place.rows("SELECT id FROM stripe_events WHERE source = 'webhook'")
        assert len(arrived) > _ORGANIZATIONS
        await place.applier.catch_up()
        await place.applier.apply_due()
        await place.applier.look_at_customers()
        await place.applier.look_at_overdue()
        for organization_id in organizations:
            assert await _ours(place, organization_id) == await _theirs(place, organization_id)
        (dead,) = await place.rows("SELECT count(*) FROM stripe_events WHERE state = 'dead'")
        assert dead == (0,)


async def _checked_out(place: BillingPlace, chance: random.Random) -> OrganizationId:
    organization_id = await place.organization()
    checkout = await place.customers.subscribe(organization_id, chance.choice(["pro", "enterprise"]), PAGES)
    place.twin.complete_checkout(checkout.id)
    return organization_id


async def _live_on(place: BillingPlace, organization_id: OrganizationId, chance: random.Random) -> None:
    """Something happens to an organization, by our routes or on Stripe's own pages."""
    customer = place.twin.state.find("customer", await place.customer_of(organization_id))
    try:
        match chance.randrange(6):
            case 0:
                await place.customers.cancel(organization_id, at_once=chance.random() < 0.5)
            case 1:
                await place.customers.change_plan(organization_id, chance.choice(["pro", "enterprise"]))
            case 2:
                _change_card(place, customer, "pm_card_chargeCustomerFail")
            case 3:
                _change_card(place, customer, "pm_card_visa")
            case _:
                place.pass_time(days=chance.choice([1, 5, 20]))
    except (NotSubscribed, PaymentRefused, BillingUnavailable):
        place.pass_time(hours=1)


def _change_card(place: BillingPlace, customer: dict[str, Any], token: str) -> None:
    method = attach(place.twin.state, str(customer["id"]), token)
    customer["invoice_settings"]["default_payment_method"] = method["id"]
    for subscription in place.twin.state.tables["subscription"].values():
        if subscription["customer"] == customer["id"]:
            subscription["default_payment_method"] = method["id"]


async def _ours(place: BillingPlace, organization_id: OrganizationId) -> tuple[object, ...]:
    (row,) = await place.rows(
        "SELECT plan, status, status_reason FROM organizations WHERE id = :org", org=organization_id
    )
    return row


async def _theirs(place: BillingPlace, organization_id: OrganizationId) -> tuple[object, ...]:
    """What Stripe's own objects come to, worked out apart from our code."""
    customer = await place.customer_of(organization_id)
    held = [one for one in place.twin.state.tables["subscription"].values() if one["customer"] == customer]
    live = [one for one in held if one["status"] not in {"canceled", "incomplete", "incomplete_expired"}]
    if not live:
        return ("free", "active", None) if held else (None, "active", None)
    (one,) = live
    licensed = next(item for item in one["items"]["data"] if item["price"]["recurring"]["usage_type"] == "licensed")
    plan = licensed["price"]["metadata"]["aap_plan"]
    if one["status"] == "unpaid":
        return (plan, "suspended", "billing:payment_failed")
    if one["status"] == "past_due":
        since = await place.rows("SELECT past_due_since FROM subscriptions WHERE id = :id", id=one["id"])
        if (place.clock.now() - since[0][0]).days >= place.plans.billing.grace_days:
            return (plan, "suspended", "billing:payment_failed")
    return (plan, "active", None)
