"""Checkout and portal: the API's half, and the pages on which a person clicks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import stripe

from tests.harness.stripe_twin import Place, Shop, pro_subscriber, shop_at


@pytest.fixture
async def browser() -> AsyncGenerator[httpx.AsyncClient]:
    async with httpx.AsyncClient() as made:
        yield made


async def checkout(shop: Shop, mode: str = "subscription", **more: Any) -> Any:
    wish: dict[str, Any] = {
        "mode": mode,
        "customer": shop.customer,
        "success_url": "http://127.0.0.1/done?session={CHECKOUT_SESSION_ID}",
        "cancel_url": "http://127.0.0.1/back",
        "client_reference_id": "org_1",
    }
    if mode == "subscription":
        wish["line_items"] = [{"price": shop.plan, "quantity": 1}, {"price": shop.metered}]
        wish["subscription_data"] = {"metadata": {"org": "org_1"}}
    return await shop.place.v1.checkout.sessions.create_async(wish | more)


class TestCheckout:
    async def test_paying_subscribes_the_customer(self, place: Place, browser: httpx.AsyncClient) -> None:
        shop = await shop_at(place, card=None)
        session = await checkout(shop)
        assert (session.status, session.payment_status, session.url.split("/")[3]) == ("open", "unpaid", "pay")
        page = await browser.get(session.url)
        assert "99.00 USD" in page.text
        done = await browser.post(session.url, data={"act": "pay"})
        assert (done.status_code, done.headers["location"]) == (303, f"http://127.0.0.1/done?session={session.id}")
        session = await place.v1.checkout.sessions.retrieve_async(
            session.id, {"expand": ["line_items", "subscription"]}
        )
        assert (session.status, session.payment_status, session.url) == ("complete", "paid", None)
        assert (session.client_reference_id, len(session.line_items.data)) == ("org_1", 2)
        assert (session.subscription.status, session.subscription.metadata["org"]) == ("active", "org_1")
        customer = await place.v1.customers.retrieve_async(shop.customer)
        assert customer.invoice_settings.default_payment_method is None
        assert session.subscription.default_payment_method is not None
        types = place.event_types()
        assert types.index("customer.subscription.created") < types.index("checkout.session.completed")

    async def test_a_card_that_declines_leaves_it_open(self, place: Place, browser: httpx.AsyncClient) -> None:
        shop = await shop_at(place, card=None)
        session = await checkout(shop)
        page = await browser.post(session.url, data={"act": "decline"})
        assert page.status_code == 402
        assert "declined" in page.text
        assert (await place.v1.checkout.sessions.retrieve_async(session.id)).status == "open"
        assert (await place.v1.subscriptions.list_async({"customer": shop.customer})).data == []
        assert (await browser.post(session.url, data={"act": "pay"})).status_code == 303

    async def test_a_second_click_subscribes_nobody_twice(self, place: Place, browser: httpx.AsyncClient) -> None:
        shop = await shop_at(place, card=None)
        session = await checkout(shop)
        await browser.post(session.url, data={"act": "pay"})
        again = await browser.post(session.url, data={"act": "pay"})
        assert again.status_code == 400
        assert len((await place.v1.subscriptions.list_async({"customer": shop.customer})).data) == 1

    async def test_a_trial_is_paid_nothing_for_today(self, place: Place) -> None:
        shop = await shop_at(place, card=None)
        session = await checkout(shop, subscription_data={"trial_period_days": 14})
        assert place.twin.complete_checkout(session.id)
        session = await place.v1.checkout.sessions.retrieve_async(session.id)
        assert (session.payment_status, session.amount_total) == ("no_payment_required", 0)
        assert (await place.v1.subscriptions.retrieve_async(session.subscription)).status == "trialing"

    async def test_without_a_customer_one_is_made(self, place: Place) -> None:
        shop = await shop_at(place)
        session = await checkout(shop, customer=None, customer_email="new@example.com")
        assert place.twin.complete_checkout(session.id)
        session = await place.v1.checkout.sessions.retrieve_async(session.id, {"expand": ["customer"]})
        assert session.customer.email == session.customer_details.email == "new@example.com"

    async def test_a_top_up_is_a_payment(self, place: Place) -> None:
        shop = await shop_at(place, card=None)
        price = {"currency": "usd", "unit_amount": 5_000, "product_data": {"name": "Credit"}}
        items = [{"price_data": price, "quantity": 2}]
        intent_data = {"metadata": {"wallet": "w"}, "setup_future_usage": "off_session"}
        session = await checkout(shop, "payment", line_items=items, payment_intent_data=intent_data)
        assert session.amount_total == 10_000
        assert place.twin.complete_checkout(session.id)
        session = await place.v1.checkout.sessions.retrieve_async(session.id, {"expand": ["payment_intent"]})
        intent = session.payment_intent
        assert (intent.status, intent.amount_received, intent.metadata["wallet"]) == ("succeeded", 10_000, "w")
        (listed,) = (await place.v1.checkout.sessions.list_async({"payment_intent": intent.id})).data
        assert listed.id == session.id

    async def test_setting_up_a_card_charges_nothing(self, place: Place) -> None:
        shop = await shop_at(place, card=None)
        session = await checkout(shop, "setup", currency="usd")
        assert place.twin.complete_checkout(session.id)
        session = await place.v1.checkout.sessions.retrieve_async(session.id)
        intent = await place.v1.setup_intents.retrieve_async(session.setup_intent)
        assert (intent.status, session.payment_status) == ("succeeded", "no_payment_required")
        methods = await place.v1.customers.payment_methods.list_async(shop.customer)
        assert [one.id for one in methods.data] == [intent.payment_method]

    async def test_it_expires_after_a_day_or_when_told_to(self, place: Place, browser: httpx.AsyncClient) -> None:
        shop = await shop_at(place)
        first, second = await checkout(shop), await checkout(shop)
        await place.v1.checkout.sessions.expire_async(first.id)
        await shop.advance(hours=24)
        for session in (first, second):
            assert (await place.v1.checkout.sessions.retrieve_async(session.id)).status == "expired"
        assert "expired" in (await browser.get(second.url)).text
        assert place.event_types().count("checkout.session.expired") == 2
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.checkout.sessions.expire_async(first.id)

    async def test_what_cannot_be_bought_is_refused(self, place: Place) -> None:
        shop = await shop_at(place)
        metered_with_quantity = [{"price": shop.metered, "quantity": 1}]
        plan_without_quantity = [{"price": shop.plan}]
        for mode, items in (
            ("subscription", metered_with_quantity),
            ("subscription", plan_without_quantity),
            ("subscription", []),
            ("payment", [{"price": shop.plan, "quantity": 1}]),
        ):
            with pytest.raises(stripe.InvalidRequestError):
                await checkout(shop, mode, line_items=items)

    async def test_names_are_escaped(self, place: Place, browser: httpx.AsyncClient) -> None:
        shop = await shop_at(place)
        price = {"currency": "usd", "unit_amount": 1, "product_data": {"name": "<script>x</script>"}}
        session = await checkout(shop, "payment", line_items=[{"price_data": price, "quantity": 1}])
        assert "<script>" not in (await browser.get(session.url)).text

    async def test_an_unknown_page_is_not_found(self, place: Place, browser: httpx.AsyncClient) -> None:
        for path in ("pay/cs_test_nothing", "portal/bps_nothing", "invoice/in_nothing"):
            assert (await browser.get(f"{place.server.url}/{path}")).status_code == 404


class TestPortal:
    async def open(self, shop: Shop) -> Any:
        wish = {"customer": shop.customer, "return_url": "http://127.0.0.1/account"}
        return await shop.place.v1.billing_portal.sessions.create_async(wish)

    async def test_a_customer_cancels_and_comes_back(self, place: Place, browser: httpx.AsyncClient) -> None:
        shop = await pro_subscriber(place)
        session = await self.open(shop)
        assert "http://127.0.0.1/account" in (await browser.get(session.url)).text
        page = await browser.post(session.url, data={"act": "cancel"})
        assert "It ends with the period" in page.text
        assert (await shop.reread()).cancel_at_period_end
        await browser.post(session.url, data={"act": "resume"})
        assert not (await shop.reread()).cancel_at_period_end

    async def test_a_customer_switches_plans(self, place: Place, browser: httpx.AsyncClient) -> None:
        shop = await pro_subscriber(place)
        product = await place.v1.products.create_async({"name": "Enterprise"})
        wish = {"product": product.id, "currency": "usd", "unit_amount": 49_900, "recurring": {"interval": "month"}}
        dearer = await place.v1.prices.create_async(wish)
        session = await self.open(shop)
        assert "Switch to Enterprise" in (await browser.get(session.url)).text
        await browser.post(session.url, data={"act": "switch", "price": dearer.id})
        assert {one.price.id for one in (await shop.reread())["items"].data} == {dearer.id, shop.metered}

    async def test_a_customer_without_subscription_sees_none(self, place: Place, browser: httpx.AsyncClient) -> None:
        shop = await shop_at(place)
        assert "no subscription" in (await browser.get((await self.open(shop)).url)).text

    async def test_configurations_are_kept(self, place: Place) -> None:
        shop = await shop_at(place)
        features = {"subscription_cancel": {"enabled": True, "mode": "at_period_end"}}
        made = await place.v1.billing_portal.configurations.create_async({"features": features})
        wish = {"customer": shop.customer, "configuration": made.id}
        assert (await place.v1.billing_portal.sessions.create_async(wish)).configuration == made.id
        listed = await place.v1.billing_portal.configurations.list_async({"is_default": False})
        assert [one.id for one in listed.data] == [made.id]
        got = await place.v1.billing_portal.configurations.retrieve_async(made.id)
        assert got.features.subscription_cancel.enabled

    async def test_an_invoice_has_a_page(self, place: Place, browser: httpx.AsyncClient) -> None:
        shop = await pro_subscriber(place)
        (invoice,) = await shop.invoices()
        assert "99.00 USD" in (await browser.get(invoice.hosted_invoice_url)).text
