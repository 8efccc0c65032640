"""From nothing to a paid invoice: what a newcomer does with the twin, through the real client."""

from __future__ import annotations

from tests.harness.stripe_twin import Place, pro_subscriber


async def test_usage_is_on_the_invoice_that_the_period_ends_with(place: Place) -> None:
    shop = await pro_subscriber(place)
    await shop.use(12_345_678, identifier="a:1")
    await shop.advance(days=32)
    invoices = (await place.v1.invoices.list_async({"customer": shop.customer})).data
    assert [(one.status, one.total, one.billing_reason) for one in invoices] == [
        ("paid", 9_900 + 1_235, "subscription_cycle"),
        ("paid", 9_900, "subscription_create"),
    ]
    licensed, metered = invoices[0].lines.data
    assert (metered.quantity, metered.amount) == (12_345_678, 1_235)
    assert licensed.period.start == metered.period.end
    assert place.twin.meter_total(shop.customer, "usage", 0, place.now + 1) == 12_345_678


async def test_the_summary_says_what_was_sent(place: Place) -> None:
    shop = await pro_subscriber(place)
    for number in range(3):
        await shop.use(100 + number, identifier=f"a:{number}")
    start = place.now // 3_600 * 3_600
    span = {"customer": shop.customer, "start_time": start, "end_time": start + 7_200}
    grouped = await place.v1.billing.meters.event_summaries.list_async(
        shop.meter, {**span, "value_grouping_window": "hour"}
    )
    assert [(one.start_time, one.aggregated_value) for one in grouped.data] == [(start, 303)]
    (whole,) = (await place.v1.billing.meters.event_summaries.list_async(shop.meter, span)).data
    assert whole.aggregated_value == 303
