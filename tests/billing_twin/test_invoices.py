"""Invoices: the grace before they are final, rounding, corrections, credits, and moving them by hand."""

from __future__ import annotations

from typing import Any

import pytest
import stripe
from hypothesis import given
from hypothesis.strategies import integers

from metering.billing.twin.engine.lines import cents
from metering.billing.twin.engine.periods import Interval
from metering.billing.twin.options import TwinOptions
from tests.harness.stripe_twin import Place, Shop, pro_subscriber, shop_at, twin_place

HOUR = 3_600


class TestGrace:
    @pytest.mark.parametrize("grace_hours", [1, 72])
    async def test_late_usage_counts_until_the_draft_is_final(self, grace_hours: int) -> None:
        """Guarantee: what happened in the period and arrives while its invoice is a draft is on that invoice."""
        async with twin_place(TwinOptions(draft_grace_seconds=grace_hours * HOUR)) as place:
            shop = await pro_subscriber(place)
            end = (await shop.reread())["items"].data[0].current_period_end
            await shop.advance(seconds=end - place.now)
            invoice = (await shop.invoices())[0]
            assert (invoice.status, invoice.automatically_finalizes_at) == ("draft", end + grace_hours * HOUR)
            await shop.use(10**7, at=end - 1)
            await shop.use(10**7, at=end)
            assert (await shop.invoices())[0].total == 9_900 + 1_000
            await shop.advance(seconds=grace_hours * HOUR - 1)
            assert (await shop.invoices())[0].status == "draft"
            await shop.advance(seconds=1)
            await shop.use(10**7, at=end - 2)
            invoice = (await shop.invoices())[0]
            assert (invoice.status, invoice.total) == ("paid", 9_900 + 1_000)

    async def test_a_draft_is_closed_by_hand(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        end = (await shop.reread())["items"].data[0].current_period_end
        await shop.advance(seconds=end - place.now)
        draft = (await shop.invoices())[0]
        closed = await place.v1.invoices.finalize_invoice_async(draft.id)
        assert closed.status == "open"
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.invoices.finalize_invoice_async(draft.id)
        assert (await place.v1.invoices.mark_uncollectible_async(draft.id)).status == "uncollectible"
        voided = await place.v1.invoices.void_invoice_async(draft.id)
        assert voided.status == "void"
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.invoices.pay_async(draft.id)

    async def test_events_tell_of_each_step(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        before = len(place.events())
        await shop.advance(days=32)
        types = [one["type"] for one in place.events()[before:]]
        wanted = ["invoice.created", "invoice.finalized", "invoice.paid", "invoice.payment_succeeded"]
        assert [one for one in types if one in wanted] == wanted
        created = place.events("invoice.created")[-1]
        assert created["data"]["object"]["status"] == "draft"
        assert created["created"] == created["data"]["object"]["period_end"]

    async def test_usage_belongs_to_the_period_of_its_timestamp(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        item = (await shop.reread())["items"].data[0]
        await shop.use(1 * 10**7, at=item.current_period_start)
        await shop.use(2 * 10**7, at=item.current_period_start - 1)
        await shop.advance(days=32)
        assert (await shop.invoices())[0].total == 9_900 + 1_000


class TestAmounts:
    @pytest.mark.parametrize(("value", "amount"), [(4_999, 0), (5_000, 1), (14_999, 1), (15_000, 2), (0, 0)])
    async def test_half_a_cent_is_a_cent(self, place: Place, value: int, amount: int) -> None:
        shop = await pro_subscriber(place)
        if value:
            await shop.use(value)
        preview = await place.v1.invoices.create_preview_async({"subscription": shop.subscription})
        metered = next(one for one in preview.lines.data if one.amount != 9_900)
        assert (metered.quantity, metered.amount) == (value, amount)

    async def test_corrections_below_nothing_cost_nothing(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await shop.use(10**6)
        await shop.use(-3 * 10**6)
        await shop.advance(days=32)
        assert (await shop.invoices())[0].total == 9_900
        assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == -2 * 10**6

    @given(quantity=integers(-(10**15), 10**15))
    def test_rounding_is_off_by_half_a_cent_at_most(self, quantity: int) -> None:
        assert abs(cents(quantity, "0.0001") * 10_000 - max(quantity, 0)) <= 5_000

    @given(anchor=integers(0, 2**32), months=integers(1, 24), offset=integers(0, 10**9))
    def test_a_time_is_in_one_period(self, anchor: int, months: int, offset: int) -> None:
        interval = Interval("month", months)
        start, end = interval.around(anchor, anchor + offset)
        assert start <= anchor + offset < end
        assert interval.around(anchor, end)[0] == end


class TestPreviews:
    async def preview(self, shop: Shop, *items: dict[str, Any]) -> Any:
        wish: dict[str, Any] = {"subscription": shop.subscription}
        if items:
            wish["subscription_details"] = {"items": list(items)}
        return await shop.place.v1.invoices.create_preview_async(wish)

    async def test_changes_are_tried_on_a_copy(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        plan, metered = (await shop.reread())["items"].data
        month = {"interval": "month"}
        wish = {"product": shop.product, "currency": "usd", "unit_amount": 500, "recurring": month}
        cheaper = await place.v1.prices.create_async(wish)
        for items, total in (
            ([], 9_900),
            ([{"id": plan.id, "price": cheaper.id}], 500),
            ([{"id": plan.id, "quantity": 3}], 29_700),
            ([{"id": plan.id, "deleted": True}], 0),
            ([{"id": metered.id, "price": cheaper.id}], 10_400),
            ([{"price": cheaper.id, "quantity": 2}], 10_900),
        ):
            assert (await self.preview(shop, *items)).total == total
        assert len((await shop.reread())["items"].data) == 2

    async def test_it_is_not_kept(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        preview = await self.preview(shop)
        assert preview.billing_reason == "upcoming"
        assert len(await shop.invoices()) == 1


class TestPaying:
    async def test_a_declined_card_leaves_it_open(self, place: Place) -> None:
        shop = await shop_at(place)
        made = await shop.subscribe(payment_behavior="default_incomplete")
        with pytest.raises(stripe.CardError) as raised:
            await place.v1.invoices.pay_async(made.latest_invoice, {"payment_method": "pm_card_chargeCustomerFail"})
        assert raised.value.json_body["error"]["payment_intent"]["last_payment_error"]["code"] == "card_declined"
        assert (await place.v1.invoices.retrieve_async(made.latest_invoice)).status == "open"

    async def test_it_is_paid_once(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        with pytest.raises(stripe.InvalidRequestError) as raised:
            await place.v1.invoices.pay_async((await shop.invoices())[0].id)
        assert raised.value.code == "invoice_already_paid"

    async def test_lines_are_listed(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        (invoice,) = await shop.invoices()
        lines = await place.v1.invoices.line_items.list_async(invoice.id, {"limit": 1})
        assert ([one.amount for one in lines.data], lines.has_more) == ([9_900], True)

    async def test_a_draft_is_closed_and_paid_at_once(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await shop.advance(days=31)
        (draft, _) = await shop.invoices()
        assert (await place.v1.invoices.finalize_invoice_async(draft.id, {"auto_advance": True})).status == "paid"

    async def test_a_held_draft_goes_on_when_told_to(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await shop.advance(days=31)
        (draft, _) = await shop.invoices()
        await place.v1.invoices.update_async(draft.id, {"auto_advance": False, "description": "wait"})
        await shop.advance(hours=5)
        assert (await place.v1.invoices.retrieve_async(draft.id)).status == "draft"
        await place.v1.invoices.update_async(draft.id, {"auto_advance": True})
        await shop.advance(hours=1)
        assert (await place.v1.invoices.retrieve_async(draft.id)).status == "paid"

    async def test_metadata_can_be_changed(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        (invoice,) = await shop.invoices()
        made = await place.v1.invoices.update_async(invoice.id, {"metadata": {"note": "x"}})
        assert made.metadata["note"] == "x"


class TestCredits:
    async def grant(self, shop: Any, value: int, **more: Any) -> Any:
        wish = {
            "customer": shop.customer,
            "amount": {"type": "monetary", "monetary": {"currency": "usd", "value": value}},
            "applicability_config": {"scope": {"price_type": "metered"}},
            **more,
        }
        return await shop.place.v1.billing.credit_grants.create_async(wish)

    async def left(self, shop: Any) -> int:
        wish = {"customer": shop.customer, "filter": {"type": "applicability_scope"}}
        wish["filter"]["applicability_scope"] = {"price_type": "metered"}
        summary = await shop.place.v1.billing.credit_balance_summary.retrieve_async(wish)
        return summary.balances[0].available_balance.monetary.value

    async def test_they_pay_usage_only_and_after_the_invoice_is_final(self, place: Place) -> None:
        """Guarantee: a draft shows the full amount; the plan's price is never paid with credits."""
        shop = await pro_subscriber(place)
        await self.grant(shop, 1_500)
        await shop.use(10**7)
        await shop.advance(days=31)
        assert (await shop.invoices())[0].amount_due == 9_900 + 1_000
        await shop.advance(hours=2)
        invoice = (await shop.invoices())[0]
        assert (invoice.subtotal, invoice.total, invoice.amount_paid) == (10_900, 9_900, 9_900)
        assert [one.amount for one in invoice.total_pretax_credit_amounts] == [1_000]
        assert await self.left(shop) == 500

    async def test_the_first_to_pay_is_by_priority_then_expiry(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        plain = await self.grant(shop, 400)
        ending = await self.grant(shop, 400, expires_at=place.now + 90 * 86_400)
        urgent = await self.grant(shop, 400, priority=1)
        await shop.use(6 * 10**6)
        await shop.advance(days=32)
        held = place.twin.state.tables["billing.credit_grant"]
        assert [held[one.id]["_used"] for one in (urgent, ending, plain)] == [400, 200, 0]

    async def test_one_for_another_price_pays_nothing(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        await self.grant(shop, 400, applicability_config={"scope": {"prices": [{"id": shop.plan}]}})
        fitting = await self.grant(shop, 400, applicability_config={"scope": {"prices": [{"id": shop.metered}]}})
        await shop.use(6 * 10**6)
        await shop.advance(days=32)
        held = place.twin.state.tables["billing.credit_grant"]
        assert {one["id"] for one in held.values() if one["_used"]} == {fitting.id}

    async def test_void_and_expired_ones_pay_nothing(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        voided, expired = await self.grant(shop, 400), await self.grant(shop, 400)
        assert (await place.v1.billing.credit_grants.void_grant_async(voided.id)).voided_at
        assert (await place.v1.billing.credit_grants.expire_async(expired.id)).expires_at
        assert await self.left(shop) == 0
        assert len((await place.v1.billing.credit_grants.list_async({"customer": shop.customer})).data) == 2
        kept = await place.v1.billing.credit_grants.update_async(expired.id, {"metadata": {"a": "b"}})
        assert (await place.v1.billing.credit_grants.retrieve_async(kept.id)).metadata["a"] == "b"
