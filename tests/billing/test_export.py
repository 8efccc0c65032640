from __future__ import annotations

from datetime import timedelta

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
