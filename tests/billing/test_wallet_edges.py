"""Credit that is lost, or spent twice."""

from __future__ import annotations

import asyncio
import contextlib
import tomllib
from datetime import timedelta

import pytest

from core.ids import OrganizationId
from core.money import NanoUsd
from metering import budgets
from metering.billing import prepaid, wallet
from metering.billing.errors import StripeFailed, TopUpInvalid
from metering.billing.plans import EXAMPLE, build_plans
from metering.billing.prepaid import Credit
from metering.billing.twin.engine.payments import attach
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import PAGES, BillingPlace

_DOLLAR = 1_000_000_000


async def _balance(place: BillingPlace, organization_id: OrganizationId) -> int:
    async with place.database.transaction() as session:
        return await wallet.balance(session, organization_id=organization_id)


async def _budget(place: BillingPlace, organization_id: OrganizationId) -> list[tuple[object, ...]]:
    query = "SELECT limit_nano_usd, is_hard FROM budgets WHERE organization_id = :org AND scope = 'credit'"
    return await place.rows(query, org=organization_id)


async def _own_budget(place: BillingPlace, organization_id: OrganizationId) -> list[tuple[object, ...]]:
    query = "SELECT limit_nano_usd, is_hard FROM budgets WHERE organization_id = :org AND scope = 'organization'"
    return await place.rows(query, org=organization_id)


async def test_usage_of_the_hour_before_the_first_top_up_takes_nothing_of_it(place: BillingPlace) -> None:
    org = await place.organization()
    await place.use(org, 3 * _DOLLAR, place.clock.now() - timedelta(minutes=10))
    await place.add_credit(org, 1_000, "a")
    assert await _budget(place, org) == [(13 * _DOLLAR, True)]


async def test_two_top_ups_at_once_can_both_be_spent(place: BillingPlace) -> None:
    org = await place.organization()
    await place.add_credit(org, 500, "first")
    async with place.database.transaction() as one:
        await prepaid.add_credit(one, Credit(cents=1_000, source="a"), place.clock.now(), organization_id=org)
        other = asyncio.create_task(place.add_credit(org, 2_000, "b"))
        await place.held_up()
    await other
    assert await place.credit_left(org) == 35 * _DOLLAR
    assert await _budget(place, org) == [(35 * _DOLLAR, True)]


async def test_a_top_up_while_usage_is_planned_lets_no_more_be_spent_than_there_is(place: BillingPlace) -> None:
    org = await place.organization()
    await place.add_credit(org, 1_000, "a")
    for number in range(8):
        await place.use(org, _DOLLAR, place.clock.now() + timedelta(minutes=2))
        place.pass_time(hours=2)
        await asyncio.gather(place.export(), place.add_credit(org, 500, f"b{number}"), place.export())
        left = await place.credit_left(org)
        assert left == (10 + 5 * (number + 1) - (number + 1)) * _DOLLAR
        assert await _budget(place, org) == [((10 + 5 * (number + 1)) * _DOLLAR, True)]


async def _low(place: BillingPlace, below: int = 300, cents: int = 2_000) -> OrganizationId:
    org = await place.organization()
    checkout = await place.customers.top_up(org, 500, PAGES)
    assert place.twin.complete_checkout(checkout.id)
    await place.hear()
    customer = place.twin.state.find("customer", await place.customer_of(org))
    method = attach(place.twin.state, customer["id"], "pm_card_visa")
    customer["invoice_settings"]["default_payment_method"] = method["id"]
    await place.customers.set_automatic_top_up(org, below_cents=below, cents=cents)
    await place.use(org, 3 * _DOLLAR, place.clock.now() + timedelta(minutes=1))
    return org


async def test_one_low_balance_charges_once_while_the_event_of_an_unknown_charge_is_applied(
    place: BillingPlace,
) -> None:
    for _ in range(4):
        org = await _low(place)
        place.twin.faults.add(FaultPlan(kind="drop_after_commit", method="POST", path="/v1/payment_intents"))
        with contextlib.suppress(StripeFailed):
            await place.top_ups.round()
        await asyncio.gather(place.hear(), place.top_ups.round(), place.top_ups.round(), return_exceptions=True)
        await place.hear()
        customer = await place.customer_of(org)
        intents = place.twin.state.tables["payment_intent"].values()
        paid = [one for one in intents if one["amount"] == 2_000 and one["customer"] == customer]
        assert len(paid) == 1
        await place.rows("UPDATE billing_customers SET top_up_below_cents = NULL RETURNING 1")


async def test_the_card_is_not_charged_every_minute(place: BillingPlace) -> None:
    """Guarantee: one charge is always enough, so that a low balance is charged once."""
    with pytest.raises(TopUpInvalid):
        await _low(place, below=2_001, cents=2_000)


async def test_credit_that_paid_for_usage_comes_back_when_that_is_corrected(place: BillingPlace) -> None:
    org = await place.subscriber()
    await place.add_credit(org, 500, "a")
    at = place.clock.now() + timedelta(minutes=1)
    await place.use(org, 4 * _DOLLAR, at)
    place.pass_time(hours=2)
    await place.export()
    assert await _balance(place, org) == 1 * _DOLLAR
    await place.use(org, -4 * _DOLLAR, at)  # a correction takes the charge back
    place.pass_time(hours=1)
    await place.export()
    assert await place.stripe_total(org) >= 0
    assert await _balance(place, org) == 5 * _DOLLAR


async def test_a_free_trial_takes_no_credit(place: BillingPlace) -> None:
    place.plans = build_plans(
        tomllib.loads(
            EXAMPLE + '\n[plans.try]\ntitle = "Try"\nprice_usd_per_month = 20\nbills_usage = true\ntrial_days = 7\n'
        )
    )
    await place.synchronise()
    org = await place.subscriber("try")
    await place.add_credit(org, 500, "a")
    await place.use(org, 4 * _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    await place.export()
    assert await _balance(place, org) == 5 * _DOLLAR


async def test_an_operators_total_budget_stays_when_credit_is_bought(place: BillingPlace) -> None:
    org = await place.organization()
    async with place.database.transaction() as session:
        await budgets.set_budget(
            session, ("organization", org), "total", limit=NanoUsd(2 * _DOLLAR), is_hard=True, organization_id=org
        )
    await place.add_credit(org, 100_000, "a")
    assert await _budget(place, org) == [(1_000 * _DOLLAR, True)]
    assert await _own_budget(place, org) == [(2 * _DOLLAR, True)]


async def test_an_operators_total_budget_stays_when_a_subscriber_buys_credit(place: BillingPlace) -> None:
    org = await place.subscriber()
    async with place.database.transaction() as session:
        await budgets.set_budget(
            session, ("organization", org), "total", limit=NanoUsd(2 * _DOLLAR), is_hard=True, organization_id=org
        )
    await place.add_credit(org, 1_000, "a")
    assert await _own_budget(place, org) == [(2 * _DOLLAR, True)]


async def test_included_usage_takes_no_credit(place: BillingPlace) -> None:
    """docs/billing.md: without bills_usage, usage is included, up to the plan's limits."""
    place.plans = build_plans(tomllib.loads(EXAMPLE + '\n[plans.flat]\ntitle = "Flat"\nprice_usd_per_month = 20\n'))
    await place.synchronise()
    org = await place.organization()
    await place.add_credit(org, 500, "a")
    checkout = await place.customers.subscribe(org, "flat", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    await place.use(org, 4 * _DOLLAR, place.clock.now() + timedelta(minutes=1))
    place.pass_time(hours=2)
    await place.export()
    assert await _balance(place, org) == 5 * _DOLLAR
