"""Subscriptions: periods by the calendar, trials, ends, pauses, failing payments, and swapped prices."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import stripe

from metering.billing.twin.options import TwinOptions
from tests.harness.stripe_twin import Place, Shop, pro_subscriber, shop_at, twin_place

DAY = 86_400
DECLINES = "pm_card_chargeCustomerFail"


def at(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def last(shop: Shop, kind: str) -> dict[str, Any]:
    return shop.place.events(kind)[-1]["data"]["object"]


async def use_card(shop: Shop, card: str) -> None:
    wish = {"invoice_settings": {"default_payment_method": card}}
    await shop.place.v1.customers.update_async(shop.customer, wish)


class TestPeriods:
    async def test_the_last_of_january_is_kept(self) -> None:
        """Guarantee: periods are counted from the anchor: 31 January, 28 February, 31 March."""
        async with twin_place(start=datetime(2027, 1, 31, 10, 30, tzinfo=UTC)) as place:
            shop = await pro_subscriber(place)
            ends: list[str] = []
            for _ in range(4):
                item = (await shop.reread())["items"].data[0]
                ends.append(at(item.current_period_end).strftime("%m-%d %H:%M"))
                await shop.advance(seconds=item.current_period_end - await shop.now())
            assert ends == ["02-28 10:30", "03-31 10:30", "04-30 10:30", "05-31 10:30"]

    async def test_time_passes_for_customers_without_a_test_clock_too(self, place: Place) -> None:
        shop = await shop_at(place)
        wish = {"payment_method": "pm_card_visa", "invoice_settings": {"default_payment_method": "pm_card_visa"}}
        customer = await place.v1.customers.create_async(wish)
        wish = {"customer": customer.id, "items": [{"price": shop.plan}]}
        made = await place.v1.subscriptions.create_async(wish)
        place.pass_time(days=32)
        assert len((await place.v1.invoices.list_async({"subscription": made.id})).data) == 2

    async def test_an_anchor_ahead_prorates_the_first_period(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.subscribe(billing_cycle_anchor=place.now + 10 * DAY)
        (first,) = await shop.invoices()
        assert first.total == round(9_900 * 10 / 31)
        await shop.advance(days=11)
        assert [one.total for one in await shop.invoices()] == [9_900, first.total]

    async def test_the_customer_is_told_a_week_ahead(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await shop.use(10**6)
        await shop.advance(days=24)
        assert last(shop, "invoice.upcoming")["amount_due"] == 9_900 + 100

    async def test_a_quantity_on_a_metered_price_is_refused(self, place: Place) -> None:
        shop = await shop_at(place)
        with pytest.raises(stripe.InvalidRequestError):
            await shop.subscribe(items=[{"price": shop.metered, "quantity": 1}])


class TestTrials:
    async def test_a_trial_is_free_and_its_end_is_told_three_days_before(self, place: Place) -> None:
        shop = await shop_at(place)
        made = await shop.subscribe(trial_period_days=14)
        assert (made.status, made.trial_end) == ("trialing", place.now + 14 * DAY)
        await shop.use(10**7)
        await shop.advance(days=10, hours=23)
        assert "customer.subscription.trial_will_end" not in place.event_types()
        await shop.advance(hours=1)
        assert "customer.subscription.trial_will_end" in place.event_types()
        await shop.advance(days=4)
        assert (await shop.reread()).status == "active"
        assert [one.total for one in await shop.invoices()] == [9_900, 0]

    async def test_a_trial_is_made_longer(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.subscribe(trial_period_days=14)
        await place.v1.subscriptions.update_async(shop.subscription, {"trial_end": place.now + 20 * DAY})
        await shop.advance(days=15)
        assert (await shop.reread()).status == "trialing"
        await shop.advance(days=6)
        assert (await shop.reread()).status == "active"
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.subscriptions.update_async(shop.subscription, {"trial_end": place.now})

    async def test_a_trial_ends_when_told_to(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.subscribe(trial_period_days=14)
        await shop.advance(days=3)
        made = await place.v1.subscriptions.update_async(shop.subscription, {"trial_end": "now"})
        assert (made.status, made.billing_cycle_anchor) == ("active", await shop.now())
        assert [one.total for one in await shop.invoices()] == [9_900, 0]

    @pytest.mark.parametrize(("behaviour", "status"), [("cancel", "canceled"), ("pause", "paused")])
    async def test_without_a_card_the_trials_settings_decide(self, place: Place, behaviour: str, status: str) -> None:
        shop = await shop_at(place, card=None)
        settings = {"end_behavior": {"missing_payment_method": behaviour}}
        await shop.subscribe(trial_period_days=14, trial_settings=settings)
        await shop.advance(days=15)
        assert (await shop.reread()).status == status
        assert [one.total for one in await shop.invoices()] == [0]

    async def test_a_paused_subscription_is_resumed(self, place: Place) -> None:
        shop = await shop_at(place, card=None)
        settings = {"end_behavior": {"missing_payment_method": "pause"}}
        await shop.subscribe(trial_period_days=14, trial_settings=settings)
        await shop.advance(days=15)
        await use_card(shop, "pm_card_visa")
        made = await place.v1.subscriptions.resume_async(shop.subscription)
        assert made.status == "active"
        assert "customer.subscription.resumed" in place.event_types()


class TestEnds:
    async def test_at_the_periods_end_usage_is_billed(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        made = await place.v1.subscriptions.update_async(shop.subscription, {"cancel_at_period_end": True})
        assert made.status == "active"
        assert made.cancel_at == made["items"].data[0].current_period_end
        await shop.use(10**7)
        await shop.advance(days=32)
        made = await shop.reread()
        assert (made.status, made.cancellation_details.reason) == ("canceled", "cancellation_requested")
        assert [one.total for one in await shop.invoices()] == [1_000, 9_900]
        assert last(shop, "customer.subscription.deleted")["id"] == shop.subscription

    async def test_an_end_can_be_any_day(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await place.v1.subscriptions.update_async(shop.subscription, {"cancel_at": place.now + 10 * DAY})
        await shop.use(10**7)
        await shop.advance(days=10)
        assert (await shop.reread()).status == "canceled"
        await shop.advance(hours=2)
        assert [one.total for one in await shop.invoices()] == [1_000, 9_900]

    async def test_an_end_with_credit_for_the_rest(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await place.v1.subscriptions.cancel_async(shop.subscription, {"prorate": True, "invoice_now": True})
        await shop.advance(hours=2)
        assert [one.total for one in await shop.invoices()] == [-9_900, 9_900]
        assert (await place.v1.customers.retrieve_async(shop.customer)).balance == -9_900

    async def test_an_end_is_taken_back(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        for at_end in (True, False):
            await place.v1.subscriptions.update_async(shop.subscription, {"cancel_at_period_end": at_end})
        await shop.advance(days=32)
        assert (await shop.reread()).status == "active"

    @pytest.mark.parametrize(("invoice_now", "totals"), [(True, [1_000, 9_900]), (False, [9_900])])
    async def test_an_end_now_bills_usage_if_asked_to(self, place: Place, invoice_now: bool, totals: list[int]) -> None:
        shop = await pro_subscriber(place)
        await shop.use(10**7)
        await shop.advance(days=3)
        made = await place.v1.subscriptions.cancel_async(shop.subscription, {"invoice_now": invoice_now})
        assert made.status == "canceled"
        await shop.advance(hours=2)
        assert [one.total for one in await shop.invoices()] == totals
        assert (await place.v1.subscriptions.list_async({"customer": shop.customer})).data == []
        ended = await place.v1.subscriptions.list_async({"customer": shop.customer, "status": "canceled"})
        assert [one.id for one in ended.data] == [shop.subscription]

    async def test_an_ended_one_cannot_be_changed(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await place.v1.subscriptions.cancel_async(shop.subscription)
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.subscriptions.update_async(shop.subscription, {"cancel_at_period_end": True})

    async def test_a_deleted_customer_has_none(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await place.v1.customers.delete_async(shop.customer)
        assert (await shop.reread()).status == "canceled"
        assert (await place.v1.customers.retrieve_async(shop.customer)).deleted
        with pytest.raises(stripe.InvalidRequestError):
            await shop.subscribe()


class TestPayments:
    async def test_without_a_card_nothing_is_begun(self, place: Place) -> None:
        shop = await shop_at(place, card=None)
        with pytest.raises(stripe.InvalidRequestError) as raised:
            await shop.subscribe()
        assert raised.value.code == "resource_missing"
        assert (await place.v1.subscriptions.list_async({"customer": shop.customer})).data == []

    async def test_usage_alone_needs_no_card(self, place: Place) -> None:
        shop = await shop_at(place, card=None)
        made = await shop.subscribe(items=[{"price": shop.metered}])
        assert made.status == "active"

    async def test_a_first_payment_that_fails_leaves_it_incomplete_for_23_hours(self, place: Place) -> None:
        shop = await shop_at(place, card=DECLINES)
        assert (await shop.subscribe()).status == "incomplete"
        await shop.advance(hours=23)
        assert (await shop.reread()).status == "incomplete_expired"
        assert [one.status for one in await shop.invoices()] == ["void"]

    async def test_paying_the_first_invoice_makes_it_active(self, place: Place) -> None:
        shop = await shop_at(place, card=DECLINES)
        made = await shop.subscribe()
        await place.v1.invoices.pay_async(made.latest_invoice, {"payment_method": "pm_card_visa"})
        assert (await shop.reread()).status == "active"
        await shop.advance(hours=24)
        assert (await shop.reread()).status == "active"

    async def test_an_error_can_be_asked_for_instead(self, place: Place) -> None:
        shop = await shop_at(place, card=DECLINES)
        with pytest.raises(stripe.CardError) as raised:
            await shop.subscribe(payment_behavior="error_if_incomplete")
        assert (raised.value.http_status, raised.value.code) == (402, "card_declined")

    async def test_an_upgrade_that_is_not_paid_is_none_if_so_asked(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        wish = {"product": shop.product, "currency": "usd", "unit_amount": 49_900, "recurring": {"interval": "month"}}
        dearer = await place.v1.prices.create_async(wish)
        plan = (await shop.reread())["items"].data[0]
        await use_card(shop, DECLINES)
        before = (await shop.reread()).to_dict()
        change: dict[str, Any] = {
            "items": [{"id": plan.id, "price": dearer.id}],
            "proration_behavior": "always_invoice",
        }
        strict = change | {"payment_behavior": "error_if_incomplete"}
        with pytest.raises(stripe.CardError):
            await place.v1.subscriptions.update_async(shop.subscription, strict)
        assert (await shop.reread()).to_dict() == before
        assert len(await shop.invoices()) == 1
        made = await place.v1.subscriptions.update_async(shop.subscription, change)
        assert (made.status, (await shop.invoices())[0].status) == ("past_due", "open")
        await use_card(shop, "pm_card_visa")
        await place.v1.subscriptions.update_async(shop.subscription, strict)

    async def test_pending_updates_are_refused_openly(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        change = {"payment_behavior": "pending_if_incomplete"}
        with pytest.raises(stripe.InvalidRequestError, match="twin"):
            await place.v1.subscriptions.update_async(shop.subscription, change)

    async def test_a_default_incomplete_one_waits_for_its_payment(self, place: Place) -> None:
        shop = await shop_at(place)
        made = await shop.subscribe(payment_behavior="default_incomplete", expand=["latest_invoice"])
        assert (made.status, made.latest_invoice.status) == ("incomplete", "open")

    @pytest.mark.parametrize("outcome", ["canceled", "unpaid", "past_due"])
    async def test_retries_end_as_the_account_is_set(self, outcome: Any) -> None:
        async with twin_place(TwinOptions(payment_retry_days=(3, 5), after_last_retry=outcome)) as place:
            shop = await pro_subscriber(place)
            await use_card(shop, DECLINES)
            await shop.advance(days=31, hours=1)
            assert (await shop.reread()).status == "past_due"
            invoice = (await shop.invoices())[0]
            assert (invoice.status, invoice.attempt_count) == ("open", 1)
            assert invoice.next_payment_attempt == await shop.now() + 3 * DAY
            await shop.advance(days=3)
            assert (await shop.reread()).status == "past_due"
            await shop.advance(days=5)
            assert (await shop.reread()).status == outcome
            invoice = (await shop.invoices())[0]
            assert (invoice.attempt_count, invoice.next_payment_attempt) == (3, None)
            assert place.event_types().count("invoice.payment_failed") == 3

    async def test_a_good_card_ends_the_arrears(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await use_card(shop, DECLINES)
        await shop.advance(days=31, hours=1)
        await use_card(shop, "pm_card_visa")
        await shop.advance(days=3)
        assert (await shop.reread()).status == "active"
        assert (await shop.invoices())[0].status == "paid"

    async def test_an_unpaid_one_gets_drafts_that_are_not_charged(self) -> None:
        async with twin_place(TwinOptions(payment_retry_days=(), after_last_retry="unpaid")) as place:
            shop = await pro_subscriber(place)
            await use_card(shop, DECLINES)
            await shop.advance(days=32)
            assert (await shop.reread()).status == "unpaid"
            await shop.advance(days=31)
            newest = (await shop.invoices())[0]
            assert (newest.status, newest.auto_advance) == ("draft", False)
            await place.v1.invoices.pay_async((await shop.invoices())[1].id, {"payment_method": "pm_card_visa"})
            assert (await shop.reread()).status == "active"

    async def test_a_bill_that_is_sent_is_open_until_paid(self, place: Place) -> None:
        shop = await shop_at(place, card=None)
        made = await shop.subscribe(collection_method="send_invoice", days_until_due=7, expand=["latest_invoice"])
        invoice = made.latest_invoice
        assert (made.status, invoice.status, invoice.due_date) == ("active", "open", place.now + 7 * DAY)
        paid = await place.v1.invoices.pay_async(invoice.id, {"paid_out_of_band": True})
        assert paid.status == "paid"


class TestPauses:
    @pytest.mark.parametrize(
        ("behavior", "status"), [("void", "void"), ("mark_uncollectible", "uncollectible"), ("keep_as_draft", "draft")]
    )
    async def test_paused_collection_charges_nothing(self, place: Place, behavior: str, status: str) -> None:
        shop = await pro_subscriber(place)
        pause = {"pause_collection": {"behavior": behavior}}
        await place.v1.subscriptions.update_async(shop.subscription, pause)
        await shop.advance(days=32)
        assert (await shop.invoices())[0].status == status
        assert (await shop.reread()).status == "active"

    async def test_it_ends_by_itself(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        pause = {"behavior": "void", "resumes_at": place.now + 5 * DAY}
        await place.v1.subscriptions.update_async(shop.subscription, {"pause_collection": pause})
        await shop.advance(days=6)
        assert (await shop.reread()).pause_collection is None


class TestSwaps:
    async def swap_metered(self, place: Place, mode: str, **more: Any) -> Shop:
        shop = await shop_at(place)
        made = await shop.subscribe(billing_mode={"type": mode})
        by_meter = {"interval": "month", "usage_type": "metered", "meter": shop.meter}
        wish = {"product": shop.product, "currency": "usd", "unit_amount_decimal": "0.0002", "recurring": by_meter}
        dearer = await place.v1.prices.create_async(wish)
        await shop.use(10**7)
        await shop.advance(days=10)
        item = next(one for one in made["items"].data if one.price.id == shop.metered)
        items = [{"id": item.id, "price": dearer.id}]
        await place.v1.subscriptions.update_async(shop.subscription, {"items": items, **more})
        await shop.use(10**7)
        await shop.advance(days=22)
        return shop

    @pytest.mark.parametrize(
        ("mode", "more", "usage"),
        [
            ("classic", {}, [2_000]),
            ("flexible", {}, [2_000, 1_000]),
            ("flexible", {"proration_behavior": "none"}, [2_000]),
        ],
    )
    async def test_a_swapped_metered_price(
        self, place: Place, mode: str, more: dict[str, str], usage: list[int]
    ) -> None:
        """Guarantee: classic billing loses what was used before the swap; flexible bills it unless told not to."""
        shop = await self.swap_metered(place, mode, **more)
        invoice = (await shop.invoices())[0]
        assert [one.amount for one in invoice.lines.data if one.amount != 9_900] == usage

    async def test_an_upgrade_is_prorated_to_the_second(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        wish = {"product": shop.product, "currency": "usd", "unit_amount": 49_900, "recurring": {"interval": "month"}}
        dearer = await place.v1.prices.create_async(wish)
        await shop.advance(days=15, hours=12)
        item = next(one for one in (await shop.reread())["items"].data if one.price.id == shop.plan)
        items = [{"id": item.id, "price": dearer.id}]
        await place.v1.subscriptions.update_async(
            shop.subscription, {"items": items, "proration_behavior": "always_invoice"}
        )
        assert [one.total for one in await shop.invoices()] == [-4_950 + 24_950, 9_900]
        await shop.advance(days=16)
        assert (await shop.invoices())[0].total == 49_900

    async def test_prorations_wait_for_the_next_invoice(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await shop.advance(days=15, hours=12)
        item = next(one for one in (await shop.reread())["items"].data if one.price.id == shop.plan)
        await place.v1.subscription_items.update_async(item.id, {"quantity": 2})
        assert len(await shop.invoices()) == 1
        preview = await place.v1.invoices.create_preview_async({"subscription": shop.subscription})
        await shop.advance(days=16)
        assert (await shop.invoices())[0].total == preview.total == 2 * 9_900 - 4_950 + 9_900

    async def test_a_downgrade_leaves_credit_for_later(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        wish = {"product": shop.product, "currency": "usd", "unit_amount": 900, "recurring": {"interval": "month"}}
        cheaper = await place.v1.prices.create_async(wish)
        item = next(one for one in (await shop.reread())["items"].data if one.price.id == shop.plan)
        items = [{"id": item.id, "price": cheaper.id}]
        await place.v1.subscriptions.update_async(
            shop.subscription, {"items": items, "proration_behavior": "always_invoice"}
        )
        assert (await place.v1.customers.retrieve_async(shop.customer)).balance == -9_000
        await shop.advance(days=32)
        newest = (await shop.invoices())[0]
        assert (newest.total, newest.amount_due, newest.status) == (900, 0, "paid")
        assert (await place.v1.customers.retrieve_async(shop.customer)).balance == -8_100

    async def test_a_longer_interval_begins_at_once(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.subscribe(items=[{"price": shop.plan}])
        wish = {"product": shop.product, "currency": "usd", "unit_amount": 99_000, "recurring": {"interval": "year"}}
        yearly = await place.v1.prices.create_async(wish)
        item = (await shop.reread())["items"].data[0]
        items = [{"id": item.id, "price": yearly.id}]
        made = await place.v1.subscriptions.update_async(shop.subscription, {"items": items})
        assert at(made["items"].data[0].current_period_end).year == 2028
        assert (await shop.invoices())[0].total == 99_000 - 9_900

    async def test_a_refused_change_changes_nothing(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        before = (await shop.reread()).to_dict()
        recurring = {"interval": "year"}
        wish = {"product": shop.product, "currency": "usd", "unit_amount": 1, "recurring": recurring}
        yearly = await place.v1.prices.create_async(wish)
        for items in ([{"id": "si_nothing", "price": shop.plan}], [{"price": "price_nothing"}], [{"price": yearly.id}]):
            change = {"cancel_at_period_end": True, "items": items}
            with pytest.raises(stripe.InvalidRequestError):
                await place.v1.subscriptions.update_async(shop.subscription, change)
        assert (await shop.reread()).to_dict() == before

    async def test_items_come_and_go_in_one_change(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        plan, metered = (await shop.reread())["items"].data
        described = {"currency": "usd", "product": shop.product, "unit_amount": 700, "recurring": {"interval": "month"}}
        items = [
            {"id": plan.id, "deleted": True},
            {"price_data": described},
            {"id": metered.id, "metadata": {"a": "b"}},
        ]
        change = {"items": items, "proration_behavior": "none", "description": "smaller", "default_payment_method": ""}
        made = await place.v1.subscriptions.update_async(shop.subscription, change)
        assert [one.price.unit_amount for one in made["items"].data] == [None, 700]
        assert (made["items"].data[0].metadata["a"], made.description) == ("b", "smaller")
        listed = await place.v1.subscriptions.list_async({"price": shop.metered})
        assert [one.id for one in listed.data] == [shop.subscription]

    async def test_the_only_item_is_replaced_and_not_removed(self, place: Place) -> None:
        shop = await shop_at(place)
        made = await shop.subscribe(items=[{"price": shop.plan}])
        gone = {"id": made["items"].data[0].id, "deleted": True}
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.subscriptions.update_async(shop.subscription, {"items": [gone]})
        change = {"items": [gone, {"price": shop.metered}]}
        made = await place.v1.subscriptions.update_async(shop.subscription, change)
        assert [one.price.id for one in made["items"].data] == [shop.metered]

    async def test_items_come_and_go(self, place: Place) -> None:
        shop = await shop_at(place)
        made = await shop.subscribe(items=[{"price": shop.plan}])
        wish = {"subscription": made.id, "price": shop.metered}
        added = await place.v1.subscription_items.create_async(wish)
        listed = await place.v1.subscription_items.list_async({"subscription": made.id})
        assert [one.id for one in listed.data] == [made["items"].data[0].id, added.id]
        await place.v1.subscription_items.delete_async(added.id)
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.subscription_items.delete_async(made["items"].data[0].id)
