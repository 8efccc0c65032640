"""Products, prices, meters, customers, payments, features: what can be made, changed, found and refused."""

from __future__ import annotations

from typing import Any

import pytest
import stripe

from tests.harness.stripe_twin import Place, pro_subscriber, shop_at


class TestProducts:
    async def test_a_product_is_made_changed_and_found(self, place: Place) -> None:
        made = await place.v1.products.create_async({"name": "Pro", "metadata": {"a": "1", "b": "2"}})
        changed = await place.v1.products.update_async(made.id, {"metadata": {"a": "", "c": "3"}, "active": False})
        assert changed.metadata.to_dict() == {"b": "2", "c": "3"}
        assert (await place.v1.products.list_async({"active": True})).data == []
        assert [one.id for one in (await place.v1.products.list_async({"ids": [made.id]})).data] == [made.id]
        assert (await place.v1.products.retrieve_async(made.id)).name == "Pro"

    async def test_any_key_of_metadata_is_kept(self, place: Place) -> None:
        made = await place.v1.products.create_async({"name": "Pro", "metadata": {"_own": "1", "0": "2"}})
        assert made.metadata.to_dict() == {"_own": "1", "0": "2"}

    async def test_an_id_can_be_chosen_once(self, place: Place) -> None:
        assert (await place.v1.products.create_async({"name": "Pro", "id": "prod_mine"})).id == "prod_mine"
        with pytest.raises(stripe.InvalidRequestError) as raised:
            await place.v1.products.create_async({"name": "Pro", "id": "prod_mine"})
        assert raised.value.code == "resource_already_exists"


class TestPrices:
    async def make(self, place: Place, **more: Any) -> Any:
        wish = {"currency": "usd", "product_data": {"name": "Pro"}, "unit_amount": 900} | more
        return await place.v1.prices.create_async({name: value for name, value in wish.items() if value is not None})

    async def test_prices_are_found_by_lookup_key(self, place: Place) -> None:
        made = await self.make(place, lookup_key="pro", recurring={"interval": "month"})
        await self.make(place, lookup_key="other")
        found = await place.v1.prices.list_async({"lookup_keys": ["pro", "none"]})
        assert [one.id for one in found.data] == [made.id]
        assert len((await place.v1.prices.list_async({"product": made.product, "active": True})).data) == 1
        assert len((await place.v1.prices.list_async({"type": "recurring"})).data) == 1

    async def test_a_lookup_key_is_moved_only_when_asked_to(self, place: Place) -> None:
        first = await self.make(place, lookup_key="pro")
        with pytest.raises(stripe.InvalidRequestError):
            await self.make(place, lookup_key="pro")
        second = await self.make(place, lookup_key="pro", transfer_lookup_key=True)
        assert (await place.v1.prices.retrieve_async(first.id)).lookup_key is None
        assert second.lookup_key == "pro"

    async def test_a_metered_price_needs_a_meter(self, place: Place) -> None:
        recurring = {"interval": "month", "usage_type": "metered"}
        with pytest.raises(stripe.InvalidRequestError) as raised:
            await self.make(place, recurring=recurring)
        assert raised.value.param == "recurring[meter]"
        with pytest.raises(stripe.InvalidRequestError):
            await self.make(place, recurring=recurring | {"meter": "mtr_nothing"})

    async def test_twelve_decimals_of_a_cent_are_kept_and_thirteen_refused(self, place: Place) -> None:
        exact = "0.000000000001"
        made = await self.make(place, unit_amount=None, unit_amount_decimal=exact)
        assert (str(made.to_dict()["unit_amount_decimal"]), made.unit_amount) == (
            exact,
            None,
        ) or made.unit_amount is None
        assert place.twin.journal.entries[-1].answer["unit_amount_decimal"] == exact
        with pytest.raises(stripe.InvalidRequestError):
            await self.make(place, unit_amount=None, unit_amount_decimal=exact + "1")
        with pytest.raises(stripe.InvalidRequestError):
            await self.make(place, unit_amount=None, unit_amount_decimal="a lot")

    async def test_one_amount_is_needed_and_one_only(self, place: Place) -> None:
        for amounts in ({"unit_amount": None}, {"unit_amount_decimal": "1"}):
            with pytest.raises(stripe.InvalidRequestError):
                await self.make(place, **amounts)

    async def test_a_price_is_closed_and_renamed(self, place: Place) -> None:
        made = await self.make(place)
        changed = await place.v1.prices.update_async(made.id, {"active": False, "nickname": "old"})
        assert (changed.active, changed.nickname) == (False, "old")

    @pytest.mark.parametrize(
        "wish", [{"billing_scheme": "tiered"}, {"transform_quantity": {"divide_by": 10, "round": "up"}}]
    )
    async def test_what_would_change_amounts_is_refused_openly(self, place: Place, wish: dict[str, Any]) -> None:
        """Guarantee: nothing that an invoice depends on is taken and ignored."""
        with pytest.raises(stripe.InvalidRequestError, match="twin"):
            await self.make(place, **wish)
        with pytest.raises(stripe.InvalidRequestError, match="twin"):
            await place.v1.checkout.sessions.create_async({"mode": "subscription", "discounts": [{"coupon": "x"}]})


class TestMeters:
    async def make(self, place: Place, name: str = "usage") -> Any:
        wish = {"event_name": name, "display_name": "Usage", "default_aggregation": {"formula": "sum"}}
        return await place.v1.billing.meters.create_async(wish)

    async def test_an_event_name_has_one_active_meter(self, place: Place) -> None:
        first = await self.make(place)
        with pytest.raises(stripe.InvalidRequestError):
            await self.make(place)
        closed = await place.v1.billing.meters.deactivate_async(first.id)
        assert (closed.status, closed.status_transitions.deactivated_at) == ("inactive", place.now)
        second = await self.make(place)
        active = await place.v1.billing.meters.list_async({"status": "active"})
        assert [one.id for one in active.data] == [second.id]
        assert (await place.v1.billing.meters.reactivate_async(first.id)).status == "active"

    async def test_only_the_display_name_can_be_changed(self, place: Place) -> None:
        made = await self.make(place)
        assert (await place.v1.billing.meters.update_async(made.id, {"display_name": "X"})).display_name == "X"
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.billing.meters.update_async(made.id, {"event_name": "other"})
        assert (await place.v1.billing.meters.retrieve_async(made.id)).event_name == "usage"

    async def test_names_have_a_length(self, place: Place) -> None:
        with pytest.raises(stripe.InvalidRequestError):
            await self.make(place, "x" * 101)


class TestCustomersAndPayments:
    @pytest.mark.parametrize("card", ["pm_nothing", "pm_card_visa_chargeDeclined"])
    async def test_a_customer_whose_card_is_refused_is_not_there(self, place: Place, card: str) -> None:
        with pytest.raises(stripe.StripeError):
            await place.v1.customers.create_async({"payment_method": card})
        assert (await place.v1.customers.list_async()).data == []

    async def test_a_customer_is_changed_and_found(self, place: Place) -> None:
        made = await place.v1.customers.create_async(
            {"email": "a@example.com", "metadata": {"org": "1"}, "address": {"country": "DE"}, "balance": -500}
        )
        changed = await place.v1.customers.update_async(made.id, {"name": "A", "email": "", "metadata": ""})
        assert (changed.name, changed.email, changed.metadata.to_dict(), changed.balance) == ("A", None, {}, -500)
        other = await place.v1.customers.create_async({"email": "b@example.com"})
        found = await place.v1.customers.list_async({"email": "b@example.com"})
        assert [one.id for one in found.data] == [other.id]

    async def test_a_saved_card_is_charged_without_its_owner(self, place: Place) -> None:
        shop = await shop_at(place)
        (card,) = (await place.v1.customers.payment_methods.list_async(shop.customer)).data
        wish = {"amount": 2_000, "currency": "usd", "customer": shop.customer, "payment_method": card.id}
        made = await place.v1.payment_intents.create_async({**wish, "confirm": True, "off_session": True})
        assert (made.status, made.amount_received) == ("succeeded", 2_000)
        assert (await place.v1.payment_intents.retrieve_async(made.id)).status == "succeeded"
        assert len((await place.v1.payment_intents.list_async({"customer": shop.customer})).data) == 1

    async def test_a_card_that_fails_is_told_with_its_intent(self, place: Place) -> None:
        shop = await shop_at(place, card="pm_card_chargeCustomerFail")
        (card,) = (await place.v1.payment_methods.list_async({"customer": shop.customer})).data
        wish = {"amount": 2_000, "currency": "usd", "customer": shop.customer, "payment_method": card.id}
        with pytest.raises(stripe.CardError) as raised:
            await place.v1.payment_intents.create_async({**wish, "confirm": True, "off_session": True})
        error = raised.value.json_body["error"]
        assert (raised.value.http_status, error["code"], error["decline_code"]) == (
            402,
            "card_declined",
            "generic_decline",
        )
        assert error["payment_intent"]["status"] == "requires_payment_method"
        assert "payment_intent.payment_failed" in place.event_types()

    async def test_a_declined_charge_is_repeated_by_its_key_and_not_done_again(self, place: Place) -> None:
        shop = await shop_at(place, card="pm_card_chargeCustomerFail")
        (card,) = (await place.v1.payment_methods.list_async({"customer": shop.customer})).data
        wish = {
            "amount": 2_000,
            "currency": "usd",
            "customer": shop.customer,
            "payment_method": card.id,
            "confirm": True,
        }
        for _ in range(2):
            with pytest.raises(stripe.CardError):
                await place.v1.payment_intents.create_async(wish, {"idempotency_key": "k"})
        assert place.event_types().count("payment_intent.payment_failed") == 1

    async def test_an_intent_is_confirmed_later_or_cancelled(self, place: Place) -> None:
        wish = {"amount": 2_000, "currency": "usd"}
        made = await place.v1.payment_intents.create_async(wish)
        assert made.status == "requires_payment_method"
        paid = await place.v1.payment_intents.confirm_async(made.id, {"payment_method": "pm_card_visa"})
        assert paid.status == "succeeded"
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.payment_intents.cancel_async(made.id)
        other = await place.v1.payment_intents.create_async(wish)
        assert (await place.v1.payment_intents.cancel_async(other.id)).status == "canceled"

    async def test_cards_are_attached_and_detached(self, place: Place) -> None:
        shop = await shop_at(place, card=None)
        card = await place.v1.payment_methods.attach_async("pm_card_visa", {"customer": shop.customer})
        assert (card.customer, card.card.last4) == (shop.customer, "4242")
        assert (await place.v1.payment_methods.retrieve_async(card.id)).type == "card"
        assert (await place.v1.payment_methods.detach_async(card.id)).customer is None
        with pytest.raises(stripe.CardError):
            await place.v1.payment_methods.attach_async("pm_card_visa_chargeDeclined", {"customer": shop.customer})

    async def test_a_card_of_somebody_else_is_refused(self, place: Place) -> None:
        shop = await shop_at(place)
        (card,) = (await place.v1.customers.payment_methods.list_async(shop.customer)).data
        other = await place.v1.customers.create_async({})
        wish = {"amount": 1, "currency": "usd", "customer": other.id, "payment_method": card.id}
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.payment_intents.create_async(wish)
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.payment_methods.attach_async(card.id, {"customer": other.id})


class TestFeatures:
    async def test_a_subscription_entitles_to_its_products_features(self, place: Place) -> None:
        shop = await shop_at(place)
        feature = await place.v1.entitlements.features.create_async({"name": "Agents", "lookup_key": "agents"})
        await place.v1.products.features.create_async(shop.product, {"entitlement_feature": feature.id})
        await shop.subscribe()
        active = await place.v1.entitlements.active_entitlements.list_async({"customer": shop.customer})
        assert [one.lookup_key for one in active.data] == ["agents"]
        (event,) = place.events("entitlements.active_entitlement_summary.updated")
        assert event["data"]["object"]["customer"] == shop.customer
        await place.v1.subscriptions.cancel_async(shop.subscription)
        active = await place.v1.entitlements.active_entitlements.list_async({"customer": shop.customer})
        assert active.data == []

    async def test_a_new_feature_of_a_product_waits_for_the_next_period(self, place: Place) -> None:
        shop = await pro_subscriber(place)
        feature = await place.v1.entitlements.features.create_async({"name": "Agents", "lookup_key": "agents"})
        attached = await place.v1.products.features.create_async(shop.product, {"entitlement_feature": feature.id})
        listed = await place.v1.products.features.list_async(shop.product)
        assert [one.id for one in listed.data] == [attached.id]
        wish = {"customer": shop.customer}
        assert (await place.v1.entitlements.active_entitlements.list_async(wish)).data == []
        await shop.advance(days=32)
        (active,) = (await place.v1.entitlements.active_entitlements.list_async(wish)).data
        assert (await place.v1.entitlements.active_entitlements.retrieve_async(active.id)).feature == feature.id

    async def test_features_are_changed_and_found(self, place: Place) -> None:
        made = await place.v1.entitlements.features.create_async({"name": "A", "lookup_key": "a"})
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.entitlements.features.create_async({"name": "B", "lookup_key": "a"})
        changed = await place.v1.entitlements.features.update_async(made.id, {"name": "C", "active": False})
        assert (changed.name, changed.active) == ("C", False)
        listed = await place.v1.entitlements.features.list_async({"lookup_key": "a"})
        assert [one.id for one in listed.data] == [made.id]
        product = await place.v1.products.create_async({"name": "Pro"})
        attached = await place.v1.products.features.create_async(product.id, {"entitlement_feature": made.id})
        assert (await place.v1.products.features.delete_async(product.id, attached.id)).deleted
        assert (await place.v1.products.features.list_async(product.id)).data == []
