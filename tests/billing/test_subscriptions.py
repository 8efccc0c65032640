"""What an organization does about its subscription, and what follows from it for its plan and its calls."""

from __future__ import annotations

from datetime import timedelta

import pytest

from core.ids import OrganizationId
from metering.billing.errors import (
    AlreadySubscribed,
    BillingUnavailable,
    NotSubscribed,
    PaymentRefused,
    PlanNotForSale,
    PlanUnknown,
    ReturnAddressInvalid,
)
from metering.billing.returning import ReturnPages
from metering.billing.twin.engine.payments import attach
from metering.billing.twin.faults import FaultPlan
from tests.harness.billing import PAGES, BillingPlace


async def _standing(place: BillingPlace, organization_id: OrganizationId) -> tuple[object, ...]:
    (row,) = await place.rows("SELECT plan, status, status_reason FROM organizations WHERE id = :o", o=organization_id)
    return row


async def _use_card(place: BillingPlace, organization_id: OrganizationId, token: str) -> str:
    customer = place.twin.state.find("customer", await place.customer_of(organization_id))
    method = attach(place.twin.state, customer["id"], token)["id"]
    customer["invoice_settings"]["default_payment_method"] = method
    for subscription in place.twin.state.tables["subscription"].values():
        if subscription["customer"] == customer["id"]:
            subscription["default_payment_method"] = method
    return method


class TestSubscribing:
    async def test_changes_nothing_before_it_is_paid(self, place: BillingPlace) -> None:
        organization_id = await place.organization()
        checkout = await place.customers.subscribe(organization_id, "pro", PAGES)
        assert checkout.url is not None
        await place.hear()
        assert await _standing(place, organization_id) == (None, "active", None)
        place.twin.complete_checkout(checkout.id)
        await place.hear()
        assert await _standing(place, organization_id) == ("pro", "active", None)

    async def test_with_a_declined_card_gives_nothing(self, place: BillingPlace) -> None:
        organization_id = await place.organization()
        checkout = await place.customers.subscribe(organization_id, "pro", PAGES)
        assert not place.twin.complete_checkout(checkout.id, "pm_card_chargeCustomerFail")
        await place.hear()
        assert await _standing(place, organization_id) == (None, "active", None)

    async def test_again_before_it_is_paid_closes_the_page_from_before(self, place: BillingPlace) -> None:
        organization_id = await place.organization()
        first = await place.customers.subscribe(organization_id, "pro", PAGES)
        again = await place.customers.subscribe(organization_id, "enterprise", PAGES)
        states = {one["id"]: one["status"] for one in place.twin.state.tables["checkout.session"].values()}
        assert states == {first.id: "expired", again.id: "open"}
        assert len(place.twin.state.tables["customer"]) == 1

    async def test_again_is_refused(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        with pytest.raises(AlreadySubscribed):
            await place.customers.subscribe(organization_id, "enterprise", PAGES)

    async def test_again_after_the_end_is_another_checkout(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        await place.customers.cancel(organization_id, at_once=True)
        checkout = await place.customers.subscribe(organization_id, "pro", PAGES)
        assert place.twin.complete_checkout(checkout.id)
        await place.hear()
        assert await _standing(place, organization_id) == ("pro", "active", None)

    @pytest.mark.parametrize(("plan", "error"), [("free", PlanNotForSale), ("platinum", PlanUnknown)])
    async def test_to_what_is_not_sold_is_refused(self, place: BillingPlace, plan: str, error: type[Exception]) -> None:
        with pytest.raises(error):
            await place.customers.subscribe(await place.organization(), plan, PAGES)

    @pytest.mark.parametrize(
        "url", ["javascript:alert(1)", "ftp://a.example", "https://", "//a.example", "http://[", ""]
    )
    async def test_needs_addresses_to_come_back_to(self, place: BillingPlace, url: str) -> None:
        with pytest.raises(ReturnAddressInvalid):
            await place.customers.subscribe(
                await place.organization(), "pro", ReturnPages(success_url=url, cancel_url="https://a.example")
            )

    async def test_while_stripe_is_down_says_so_and_works_later(self, place: BillingPlace) -> None:
        organization_id = await place.organization()
        place.twin.faults.add(FaultPlan(kind="reset", path="/v1/*", times=1))
        with pytest.raises(BillingUnavailable):
            await place.customers.subscribe(organization_id, "pro", PAGES)
        assert (await place.customers.subscribe(organization_id, "pro", PAGES)).url


class TestAnotherPlan:
    async def test_holds_at_once_and_what_was_used_is_invoiced(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber("enterprise")
        await place.use(organization_id, 3_000_000)
        place.pass_time(days=10)
        await place.export()
        await place.customers.change_plan(organization_id, "pro")
        assert await _standing(place, organization_id) == ("pro", "active", None)
        await place.use(organization_id, 4_000_000)
        place.pass_time(hours=2)
        await place.export()
        place.pass_time(days=23)
        await place.hear()
        rows = await place.rows("SELECT sum(usage_micro_usd) FROM invoices")
        assert rows == [(7_000,)]

    async def test_without_a_subscription_is_refused(self, place: BillingPlace) -> None:
        with pytest.raises(NotSubscribed):
            await place.customers.change_plan(await place.organization(), "pro")

    async def test_that_cannot_be_paid_is_none(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber("enterprise")
        await _use_card(place, organization_id, "pm_card_chargeCustomerFail")
        with pytest.raises(PaymentRefused):
            await place.customers.change_plan(organization_id, "pro")
        await place.hear()
        assert await _standing(place, organization_id) == ("enterprise", "active", None)


class TestCancelling:
    async def test_with_the_period_leaves_the_plan_until_then(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        await place.customers.cancel(organization_id)
        assert await _standing(place, organization_id) == ("pro", "active", None)
        place.pass_time(days=32)
        await place.hear()
        assert await _standing(place, organization_id) == ("free", "active", None)

    async def test_can_be_taken_back(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        await place.customers.cancel(organization_id)
        await place.customers.resume(organization_id)
        place.pass_time(days=32)
        await place.hear()
        assert await _standing(place, organization_id) == ("pro", "active", None)

    async def test_at_once_invoices_what_was_used_until_then(self, place: BillingPlace) -> None:
        """Guarantee: cancelling is no way around the present hour's usage."""
        organization_id = await place.subscriber()
        place.pass_time(minutes=5)
        await place.use(organization_id, 7_000_000)
        await place.customers.cancel(organization_id, at_once=True)
        assert await _standing(place, organization_id) == ("free", "active", None)
        place.pass_time(hours=2)
        await place.hear()
        rows = await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL")
        assert rows == [(7_000,)]


class TestAFailedPayment:
    async def test_is_forgiven_for_some_days_and_then_suspends(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        await _use_card(place, organization_id, "pm_card_chargeCustomerFail")
        place.pass_time(days=31, hours=2)
        await place.hear()
        (status,) = await place.rows("SELECT status FROM subscriptions")
        assert status == ("past_due",)
        assert await _standing(place, organization_id) == ("pro", "active", None)
        place.clock.advance(timedelta(days=7))
        await place.applier.look_at_overdue()
        assert await _standing(place, organization_id) == ("pro", "suspended", "billing:payment_failed")

    async def test_that_is_made_good_lets_everything_go_on(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        await _use_card(place, organization_id, "pm_card_chargeCustomerFail")
        place.pass_time(days=31, hours=2)
        await place.hear()
        place.clock.advance(timedelta(days=7))
        await place.applier.look_at_overdue()
        assert (await _standing(place, organization_id))[1] == "suspended"
        method = await _use_card(place, organization_id, "pm_card_visa")
        ((invoice_id,),) = await place.rows("SELECT id FROM invoices WHERE status = 'open'")
        await place.api._client.v1.invoices.pay_async(invoice_id, {"payment_method": method})
        await place.hear()
        assert await _standing(place, organization_id) == ("pro", "active", None)
        kinds = await place.rows("SELECT kind FROM emails ORDER BY id")
        assert kinds == [("payment_failed",), ("payment_recovered",)]

    async def test_never_undoes_what_an_operator_did(self, place: BillingPlace) -> None:
        organization_id = await place.subscriber()
        await place.rows("UPDATE organizations SET status = 'suspended', status_reason = 'fraud' RETURNING 1")
        place.pass_time(days=32)
        await place.hear()
        assert await _standing(place, organization_id) == ("pro", "suspended", "fraud")


async def test_an_event_of_somebody_elses_customer_changes_nothing(place: BillingPlace) -> None:
    """Guarantee: what an object says of itself gives nobody a plan (QuantumNous/new-api#4353)."""
    organization_id = await place.organization()
    stranger = await place.api.create_customer("x", "Stranger", email=None, test_clock=None)
    method = attach(place.twin.state, stranger, "pm_card_visa")
    sold = [one for one in place.twin.state.tables["price"].values() if one["metadata"].get("aap_plan") == "pro"]
    made = await place.api._client.v1.subscriptions.create_async(
        {
            "customer": stranger,
            "items": [{"price": sold[0]["id"]}],
            "metadata": {"aap_organization": organization_id},
            "default_payment_method": method["id"],
        }
    )
    assert await place.applier.look_at_subscription(made.id) is None
    assert await _standing(place, organization_id) == (None, "active", None)
