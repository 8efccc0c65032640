from __future__ import annotations

from datetime import timedelta

import msgspec

from metering.billing import agreement
from metering.billing.export import Exporter
from metering.billing.stripe_api import StripeApi
from metering.billing.twin.engine.payments import attach
from tests.harness.billing import PAGES, BillingPlace


async def test_what_was_used_is_at_stripe_and_on_the_invoice(place: BillingPlace) -> None:
    """Guarantee: the ledger's sum, rounded down once, is what the meter counts and the invoice bills."""
    organization_id = await place.subscriber()
    for step in range(5):
        await place.use(organization_id, 1_234_567 + step)
        place.pass_time(minutes=50)
    place.pass_time(hours=1)
    exported = await place.export()
    assert exported.problem is None
    total = await place.ledger_total(organization_id)
    assert await place.stripe_total(organization_id) == total // 1_000
    place.pass_time(days=32)
    await place.hear()
    rows = await place.rows("SELECT status, usage_micro_usd FROM invoices ORDER BY issued_at")
    assert rows == [("paid", None), ("paid", total // 1_000)]


async def test_usage_before_the_subscription_is_nobodys_to_pay(place: BillingPlace) -> None:
    organization_id = await place.organization()
    await place.use(organization_id, 5_000_000, place.clock.now() - timedelta(minutes=3))
    checkout = await place.customers.subscribe(organization_id, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    await place.use(organization_id, 2_000_000, place.clock.now() + timedelta(minutes=3))
    place.pass_time(hours=2)
    await place.export()
    assert await place.stripe_total(organization_id) == 2_000


async def test_what_could_not_be_sent_before_the_invoice_was_final_is_on_the_next(place: BillingPlace) -> None:
    """Guarantee: Stripe being out of reach while an invoice is drawn up loses nothing."""
    organization_id = await place.subscriber()
    place.pass_time(days=31, minutes=-10)
    await place.use(organization_id, 7_000_000)
    place.pass_time(minutes=20)
    nowhere = StripeApi(msgspec.structs.replace(place.settings, url="http://127.0.0.1:1"), place.clock)
    exported = await Exporter(place.database, nowhere, place.clock).round()
    assert exported.problem is not None
    await nowhere.close()
    place.pass_time(hours=3)
    await place.hear()
    assert await place.rows("SELECT usage_micro_usd FROM invoices WHERE usage_micro_usd IS NOT NULL") == [(0,)]
    await place.export()
    await place.export()
    kinds = await place.rows("SELECT kind, state FROM meter_reports ORDER BY revision")
    assert kinds == [("usage", "refused"), ("carried", "acked")]
    place.pass_time(days=31)
    await place.hear()
    assert await place.rows("SELECT sum(usage_micro_usd) FROM invoices") == [(7_000,)]


async def test_usage_that_no_invoice_takes_is_shown_to_the_operator(place: BillingPlace) -> None:
    organization_id = await place.subscriber()
    used_at = place.clock.now() + timedelta(minutes=2)
    place.pass_time(minutes=5)
    await place.customers.cancel(organization_id, at_once=True)
    place.pass_time(hours=2)
    await place.hear()
    await place.use(organization_id, 7_000_000, used_at)  # settled after the last invoice was final
    place.pass_time(days=1, hours=1)
    await place.export()
    async with place.database.transaction() as session:
        seen = await agreement.reconciliation(session, place.clock.now())
    assert (seen.agrees, [one.amount for one in seen.uncollected]) == (False, [7_000_000])
    checkout = await place.customers.subscribe(organization_id, "pro", PAGES)
    place.twin.complete_checkout(checkout.id)
    await place.hear()
    place.pass_time(days=1, hours=1)
    await place.export()
    assert await place.stripe_total(organization_id) == 7_000
    async with place.database.transaction() as session:
        assert (await agreement.reconciliation(session, place.clock.now())).uncollected == []


async def test_an_agreement_made_by_hand_is_billed_and_keeps_the_plan(place: BillingPlace) -> None:
    """Guarantee: a price that names no plan of ours still bills usage, and its subscription's status still counts."""
    organization_id = await place.organization()
    customer = await place.customer_of(organization_id)
    await place.rows("UPDATE organizations SET plan = 'enterprise' WHERE id = :org RETURNING 1", org=organization_id)
    v1 = place.api._client.v1
    (meter,) = place.twin.state.tables["billing.meter"].values()
    product = await v1.products.create_async({"name": "By hand"})
    price = await v1.prices.create_async(
        {
            "product": product.id,
            "currency": "usd",
            "unit_amount_decimal": "0.00008",
            "recurring": {"interval": "month", "usage_type": "metered", "meter": meter["id"]},
        }
    )
    method = attach(place.twin.state, customer, "pm_card_visa")
    await v1.subscriptions.create_async(
        {"customer": customer, "items": [{"price": price.id}], "default_payment_method": method["id"]}
    )
    await place.hear()
    await place.use(organization_id, 3_000_000, place.clock.now() + timedelta(minutes=2))
    place.pass_time(hours=2)
    await place.export()
    assert await place.stripe_total(organization_id) == 3_000
    assert await place.rows("SELECT plan, status FROM organizations WHERE id = :org", org=organization_id) == [
        ("enterprise", "active")
    ]
