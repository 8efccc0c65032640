"""Prepaid credit: bought once, spent once, and never below nothing."""

from __future__ import annotations

import contextlib
from datetime import timedelta

import pytest
from sqlalchemy.exc import DBAPIError

from core.ids import OrganizationId
from metering.billing import wallet
from metering.billing.errors import StripeFailed, TopUpInvalid
from metering.billing.twin.engine.payments import attach
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import PAGES, BillingPlace

_DOLLAR = 1_000_000_000


async def _budget(place: BillingPlace, organization_id: OrganizationId) -> list[tuple[object, ...]]:
    query = "SELECT limit_nano_usd, is_hard FROM budgets WHERE organization_id = :org AND scope = 'credit'"
    return await place.rows(query, org=organization_id)


async def _topped_up(place: BillingPlace, cents: int = 1_000) -> OrganizationId:
    organization_id = await place.organization()
    checkout = await place.customers.top_up(organization_id, cents, PAGES)
    assert place.twin.complete_checkout(checkout.id)
    await place.hear()
    return organization_id


class TestATopUp:
    async def test_adds_what_was_paid_once(self, place: BillingPlace) -> None:
        organization_id = await _topped_up(place)
        for _ in range(3):
            await place.hear()
            await place.rows("UPDATE stripe_events SET state = 'new', due_at = now() RETURNING 1")
            await place.applier.apply_due()
        assert await place.credit_left(organization_id) == 10 * _DOLLAR
        assert len(await place.rows("SELECT id FROM wallet_transfers")) == 1

    async def test_lets_so_much_be_spent_and_no_more(self, place: BillingPlace) -> None:
        """Guarantee: the hard budget that calls are held to is what was spent before and what is left."""
        organization_id = await place.organization()
        await place.use(organization_id, 3 * _DOLLAR, place.clock.now() - timedelta(days=2))
        checkout = await place.customers.top_up(organization_id, 1_000, PAGES)
        place.twin.complete_checkout(checkout.id)
        await place.hear()
        assert await _budget(place, organization_id) == [(13 * _DOLLAR, True)]
        await place.use(organization_id, 4 * _DOLLAR)
        again = await place.customers.top_up(organization_id, 500, PAGES)
        place.twin.complete_checkout(again.id)
        await place.hear()
        assert await _budget(place, organization_id) == [(18 * _DOLLAR, True)]
        assert await place.credit_left(organization_id) == 11 * _DOLLAR

    @pytest.mark.parametrize("cents", [-1, 0, 499, 100_000_000])
    async def test_of_too_little_or_too_much_is_refused(self, place: BillingPlace, cents: int) -> None:
        with pytest.raises(TopUpInvalid):
            await place.customers.top_up(await place.organization(), cents, PAGES)

    async def test_that_is_not_paid_adds_nothing(self, place: BillingPlace) -> None:
        organization_id = await place.organization()
        checkout = await place.customers.top_up(organization_id, 1_000, PAGES)
        assert not place.twin.complete_checkout(checkout.id, "pm_card_chargeCustomerFail")
        await place.hear()
        assert await place.credit_left(organization_id) == 0
        assert await _budget(place, organization_id) == []


class TestUsage:
    async def test_is_drawn_from_credit_and_told_nobody(self, place: BillingPlace) -> None:
        organization_id = await _topped_up(place)
        await place.use(organization_id, 1_234_567, place.clock.now() + timedelta(minutes=2))
        place.pass_time(hours=2)
        await place.export()
        async with place.database.transaction() as session:
            balance = await wallet.balance(session, organization_id=organization_id)
        assert balance == 10 * _DOLLAR - 1_234_000
        assert await place.credit_left(organization_id) == 10 * _DOLLAR - 1_234_000
        assert await place.stripe_total(organization_id) == 0
        assert await place.rows("SELECT state, value, drawn FROM meter_reports") == [("settled", 0, 1_234)]

    async def test_of_a_subscriber_takes_credit_first_and_is_invoiced_for_the_rest(self, place: BillingPlace) -> None:
        """Guarantee: the ledger is what the wallet paid and what Stripe counts, together, to the micro-USD."""
        organization_id = await place.subscriber()
        checkout = await place.customers.top_up(organization_id, 500, PAGES)
        place.twin.complete_checkout(checkout.id)
        await place.hear()
        assert await _budget(place, organization_id) == []
        for _ in range(3):
            await place.use(organization_id, 2 * _DOLLAR + 1)
            place.pass_time(hours=1)
        place.pass_time(hours=1)
        await place.export()
        ((drawn,),) = await place.rows("SELECT sum(drawn) FROM meter_reports")
        assert drawn == 5_000_000
        assert await place.stripe_total(organization_id) == 1_000_000
        assert drawn + 1_000_000 == await place.ledger_total(organization_id) // 1_000
        assert await place.credit_left(organization_id) == 0

    async def test_of_what_is_left_after_a_subscription_is_held_to_it_again(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        checkout = await place.customers.top_up(organization_id, 500, PAGES)
        place.twin.complete_checkout(checkout.id)
        await place.hear()
        await place.use(organization_id, 2 * _DOLLAR, place.clock.now() + timedelta(minutes=1))
        place.pass_time(minutes=5)
        await place.customers.cancel(organization_id, at_once=True)
        assert await _budget(place, organization_id) == [(5 * _DOLLAR, True)]
        assert await place.credit_left(organization_id) == 3 * _DOLLAR


class TestTheBooks:
    async def test_balance(self, place: BillingPlace) -> None:
        await _topped_up(place)
        assert await place.rows("SELECT sum(nano_usd) FROM wallet_postings") == [(0,)]

    async def test_refuse_money_from_nowhere(self, place: BillingPlace) -> None:
        organization_id = await _topped_up(place)
        forged = """
        WITH made AS (
          INSERT INTO wallet_transfers (id, organization_id, kind, source) VALUES ('wtr_x', :org, 'adjustment', 'x')
        ) INSERT INTO wallet_postings VALUES ('wtr_x', 'credit', :org, 5) RETURNING 1
        """
        with pytest.raises(DBAPIError, match="do not add up"):
            await place.rows(forged, org=organization_id)

    @pytest.mark.parametrize("change", ["UPDATE wallet_postings SET nano_usd = 0", "DELETE FROM wallet_transfers"])
    async def test_are_never_changed(self, place: BillingPlace, change: str) -> None:
        await _topped_up(place)
        with pytest.raises(DBAPIError, match="append-only"):
            await place.rows(change + " RETURNING 1")


class TestAutomaticTopUps:
    async def _low(self, place: BillingPlace, card: str = "pm_card_visa") -> OrganizationId:
        organization_id = await _topped_up(place, 500)
        customer = place.twin.state.find("customer", await place.customer_of(organization_id))
        method = attach(place.twin.state, customer["id"], card)
        customer["invoice_settings"]["default_payment_method"] = method["id"]
        await place.customers.set_automatic_top_up(organization_id, below_cents=300, cents=2_000)
        await place.use(organization_id, 3 * _DOLLAR, place.clock.now() + timedelta(minutes=1))
        return organization_id

    async def test_charge_the_card_once_when_credit_is_low(self, place: BillingPlace) -> None:
        organization_id = await self._low(place)
        assert await place.top_ups.round() == 1
        assert await place.top_ups.round() == 0
        await place.hear()
        assert await place.credit_left(organization_id) == 22 * _DOLLAR

    async def test_not_while_there_is_enough(self, place: BillingPlace) -> None:
        organization_id = await _topped_up(place, 500)
        await place.customers.set_automatic_top_up(organization_id, below_cents=500, cents=2_000)
        assert await place.top_ups.round() == 0

    @pytest.mark.parametrize("kind", ["drop_after_commit", "error_after_commit", "error_before_commit", "reset"])
    async def test_happen_once_whatever_stripe_answers(self, place: BillingPlace, kind: str) -> None:
        """Guarantee: a charge of unknown outcome is found out about, and never made a second time."""
        organization_id = await self._low(place)
        plan = FaultPlan(kind=kind, method="POST", path="/v1/payment_intents", is_saved=False)
        place.twin.faults.add(plan)
        with pytest.raises(StripeFailed):
            await place.top_ups.round()
        for _ in range(3):
            with contextlib.suppress(StripeFailed):
                await place.top_ups.round()
        await place.hear()
        paid = [one for one in place.twin.state.tables["payment_intent"].values() if one["amount"] == 2_000]
        assert [one["status"] for one in paid] == ["succeeded"]
        assert await place.credit_left(organization_id) == 22 * _DOLLAR

    async def test_of_an_answer_that_never_came_is_looked_for_after_a_day(self, place: BillingPlace) -> None:
        organization_id = await self._low(place)
        place.twin.faults.add(FaultPlan(kind="error_after_commit", method="POST", path="/v1/payment_intents"))
        with pytest.raises(StripeFailed):
            await place.top_ups.round()
        place.pass_time(days=1)
        assert await place.top_ups.round() == 1
        assert await place.credit_left(organization_id) == 22 * _DOLLAR

    async def test_that_were_declined_are_not_tried_every_minute(self, place: BillingPlace) -> None:
        organization_id = await self._low(place, "pm_card_chargeCustomerFail")
        assert await place.top_ups.round() == 0
        assert await place.top_ups.round() == 0
        asked = [one for one in place.twin.journal.entries if one.path == "/v1/payment_intents"]
        assert len(asked) == 1
        assert await place.credit_left(organization_id) == 2 * _DOLLAR
        place.pass_time(days=1, minutes=1)
        assert await place.top_ups.round() == 0
        assert len(await place.rows("SELECT id FROM top_ups WHERE state = 'failed'")) == 2
