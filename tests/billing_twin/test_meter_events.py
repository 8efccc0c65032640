"""Meter events one by one: what is refused at once, what counts, and when it is seen."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import stripe

from metering.billing.twin.faults import FaultPlan
from metering.billing.twin.options import TwinOptions
from tests.harness.stripe_twin import Place, Shop, pro_subscriber, shop_at, twin_place, wait_for

HOUR = 3_600
DAY = 24 * HOUR


async def refused(asked: Any, error: type[stripe.StripeError] = stripe.InvalidRequestError) -> Any:
    with pytest.raises(error) as raised:
        await asked
    return raised.value


async def total(shop: Shop, **span: int) -> float:
    """What the summary of the two days around now says."""
    start = shop.place.now // HOUR * HOUR - DAY
    asked = {"customer": shop.customer, "start_time": start, "end_time": start + 2 * DAY} | span
    (one,) = (await shop.place.v1.billing.meters.event_summaries.list_async(shop.meter, asked)).data
    return one.aggregated_value


class TestDuplicates:
    async def test_a_used_identifier_is_refused_for_good(self, place: Place) -> None:
        """Guarantee: 400 that names the identifier, with `stripe-should-retry: false`, and nothing counted twice."""
        shop = await shop_at(place)
        await shop.use(5, identifier="org:usage:12:0")
        error = await refused(shop.use(5, identifier="org:usage:12:0"))
        assert (error.http_status, error.code, error.param) == (400, None, "identifier")
        assert "org:usage:12:0" in error.user_message
        assert error.headers["stripe-should-retry"] == "false"
        assert await total(shop) == 5

    async def test_the_package_posts_a_refused_duplicate_once(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.use(5, identifier="once")
        before = len(place.twin.journal.entries)
        event = {"event_name": "usage", "payload": {"stripe_customer_id": shop.customer, "value": "5"}}
        asked = place.v1.billing.meter_events.create_async({**event, "identifier": "once"}, {"max_network_retries": 3})
        await refused(asked)
        assert len(place.twin.journal.entries) == before + 1

    async def test_the_window_is_24_hours_exactly(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.use(5, identifier="again")
        place.pass_time(seconds=DAY - 1)
        await refused(shop.use(5, identifier="again"))
        place.pass_time(seconds=1)
        await shop.use(5, identifier="again")
        assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == 10

    async def test_the_window_can_be_endless(self) -> None:
        async with twin_place(TwinOptions(identifier_window_seconds=None)) as place:
            shop = await shop_at(place)
            await shop.use(5, identifier="again")
            place.pass_time(days=30)
            await refused(shop.use(5, identifier="again"))

    async def test_without_an_identifier_each_event_counts(self, place: Place) -> None:
        shop = await shop_at(place)
        first, second = await shop.use(5), await shop.use(5)
        assert first.identifier != second.identifier
        assert await total(shop) == 10


class TestTimes:
    @pytest.mark.parametrize(
        ("age", "code"), [(35 * DAY + 1, "timestamp_too_far_in_past"), (-301, "timestamp_in_future")]
    )
    async def test_outside_of_the_window_is_refused(self, place: Place, age: int, code: str) -> None:
        shop = await shop_at(place)
        error = await refused(shop.use(1, at=place.now - age))
        assert (error.http_status, error.code, error.param) == (400, code, "timestamp")

    @pytest.mark.parametrize("age", [35 * DAY, -300])
    async def test_the_window_holds_its_edges(self, place: Place, age: int) -> None:
        shop = await shop_at(place)
        await shop.use(1, at=place.now - age)
        assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == 1

    async def test_no_timestamp_is_now(self, place: Place) -> None:
        shop = await shop_at(place)
        event = {"event_name": "usage", "payload": {"stripe_customer_id": shop.customer, "value": "5"}}
        assert (await place.v1.billing.meter_events.create_async(event)).timestamp == place.now


class TestValues:
    @pytest.mark.parametrize("value", ["1.5", "1e3", "many", ""])
    async def test_only_whole_numbers_are_taken(self, place: Place, value: str) -> None:
        shop = await shop_at(place)
        payload = {"stripe_customer_id": shop.customer, "value": value}
        error = await refused(place.v1.billing.meter_events.create_async({"event_name": "usage", "payload": payload}))
        assert (error.http_status, error.code) == (400, "meter_event_invalid_value")

    async def test_sixteen_digits_are_refused_and_fifteen_are_not(self, place: Place) -> None:
        shop = await shop_at(place)
        error = await refused(shop.use(10**15))
        assert error.code == "meter_event_value_too_many_digits"
        await shop.use(10**15 - 1)
        assert await total(shop) == 10**15 - 1

    async def test_a_correction_is_negative(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.use(100)
        await shop.use(-30)
        assert await total(shop) == 70

    async def test_an_unknown_event_name_is_refused(self, place: Place) -> None:
        payload = {"stripe_customer_id": "cus_1", "value": "1"}
        error = await refused(place.v1.billing.meter_events.create_async({"event_name": "nothing", "payload": payload}))
        assert error.http_status == 400
        assert "nothing" in error.user_message

    async def test_a_closed_meter_takes_nothing(self, place: Place) -> None:
        shop = await shop_at(place)
        await place.v1.billing.meters.deactivate_async(shop.meter)
        assert (await refused(shop.use(1))).code == "archived_meter"


class TestWhatIsFoundOutLater:
    @pytest.mark.parametrize(
        ("payload", "code"),
        [
            ({"stripe_customer_id": "cus_nobody", "value": "1"}, "meter_event_customer_not_found"),
            ({"value": "1"}, "meter_event_no_customer_defined"),
        ],
    )
    async def test_a_missing_customer_is_told_by_a_thin_event(
        self, place: Place, payload: dict[str, str], code: str
    ) -> None:
        """Guarantee: the call succeeds; the report has counts and samples, never the list of what failed."""
        shop = await shop_at(place)
        for number in range(7):
            event = {"event_name": "usage", "payload": payload, "identifier": f"lost:{number}"}
            await place.v1.billing.meter_events.create_async(event)
        place.pass_time(seconds=1)
        reports = list(place.twin.state.tables["v2.core.event"].values())
        event = await place.client.v2.core.events.retrieve_async(reports[0]["id"])
        assert event.type == "v1.billing.meter.error_report_triggered"
        assert event.related_object.id == shop.meter
        assert sum(report["data"]["reason"]["error_count"] for report in reports) == 7
        kinds = [kind for report in reports for kind in report["data"]["reason"]["error_types"]]
        assert {kind["code"] for kind in kinds} == {code}
        assert event.data.validation_start < event.data.validation_end

    async def test_a_report_names_some_of_many(self) -> None:
        async with twin_place(TwinOptions(aggregation_lag_seconds=60)) as place:
            await shop_at(place)
            for number in range(7):
                payload = {"stripe_customer_id": "cus_nobody", "value": "1"}
                event = {"event_name": "usage", "payload": payload, "identifier": f"lost:{number}"}
                await place.v1.billing.meter_events.create_async(event)
            assert not place.twin.state.tables["v2.core.event"]
            place.pass_time(seconds=60)
            (report,) = place.twin.state.tables["v2.core.event"].values()
            (kind,) = report["data"]["reason"]["error_types"]
            assert kind["error_count"] == 7
            samples = [one["request"]["identifier"] for one in kind["sample_errors"]]
            assert samples == [f"lost:{number}" for number in range(5)]

    async def test_usage_is_seen_after_the_lag(self) -> None:
        async with twin_place(TwinOptions(aggregation_lag_seconds=30)) as place:
            shop = await shop_at(place)
            await shop.use(5)
            assert await total(shop) == 0
            assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == 5
            place.pass_time(seconds=30)
            assert await total(shop) == 5
            await shop.use(6)
            assert await total(shop) == 5
            place.twin.settle()
            assert await total(shop) == 11

    async def test_an_invoice_does_not_see_usage_before_the_lag(self) -> None:
        async with twin_place(TwinOptions(aggregation_lag_seconds=10**7)) as place:
            shop = await pro_subscriber(place)
            await shop.use(10**6)
            await shop.advance(days=32)
            assert [one.total for one in await shop.invoices()] == [9_900, 9_900]


class TestOneAtATime:
    async def test_a_second_event_of_the_same_customer_and_meter_waits_its_turn(self, place: Place) -> None:
        """Guarantee: 429 lock_timeout, to be retried, while another one is in flight; another customer is not held up."""
        shop = await shop_at(place)
        other = await place.v1.customers.create_async({})
        hold = place.twin.faults.add(FaultPlan(kind="hold", path="/v1/billing/meter_events"))
        first = asyncio.create_task(shop.use(1))
        await wait_for(hold.entered)
        error = await refused(shop.use(2), stripe.RateLimitError)
        assert (error.http_status, error.error.code) == (429, "lock_timeout")
        assert error.headers["stripe-should-retry"] == "true"
        payload = {"stripe_customer_id": other.id, "value": "3"}
        await place.v1.billing.meter_events.create_async({"event_name": "usage", "payload": payload})
        hold.release()
        await first
        await shop.use(4)
        assert await total(shop) == 5


class TestAdjustments:
    async def cancel(self, place: Place, identifier: str) -> Any:
        return await place.v1.billing.meter_event_adjustments.create_async(
            {"event_name": "usage", "type": "cancel", "cancel": {"identifier": identifier}}
        )

    async def test_a_cancelled_event_counts_no_more(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.use(5, identifier="wrong")
        await shop.use(7, identifier="right")
        place.pass_time(seconds=DAY)
        assert (await self.cancel(place, "wrong")).cancel.identifier == "wrong"
        assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == 7
        await refused(self.cancel(place, "wrong"))

    async def test_after_24_hours_it_is_too_late(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.use(5, identifier="wrong")
        place.pass_time(seconds=DAY + 1)
        error = await refused(self.cancel(place, "wrong"))
        assert error.http_status == 400
        assert place.twin.meter_total(shop.customer, "usage", 0, 2**40) == 5

    async def test_an_unknown_identifier_is_not_found(self, place: Place) -> None:
        await shop_at(place)
        assert (await refused(self.cancel(place, "never"))).http_status == 404


class TestFormulas:
    async def test_the_event_received_last_counts_in_a_preaggregated_hour(self, place: Place) -> None:
        """Guarantee: resends are harmless, and a late stale one overwrites: received last wins, whatever its time."""
        shop = await shop_at(place, event_time_window="hour")
        base = place.now // HOUR * HOUR
        await shop.use(10, at=base - HOUR)
        await shop.use(30, at=base - HOUR + 600)
        await shop.use(20, at=base - HOUR + 300)
        await shop.use(5, at=base)
        assert await total(shop) == 25

    async def test_a_day_is_a_window_too(self, place: Place) -> None:
        shop = await shop_at(place, event_time_window="day")
        await shop.use(10, at=place.now - HOUR)
        await shop.use(30, at=place.now)
        assert await total(shop) == 30

    @pytest.mark.parametrize(("formula", "expected"), [("sum", 6), ("count", 3), ("last", 1)])
    async def test_the_formula_decides(self, place: Place, formula: str, expected: int) -> None:
        shop = await shop_at(place, default_aggregation={"formula": formula})
        for age, value in ((30, 2), (20, 3), (10, 1)):
            await shop.use(value, at=place.now - age)
        assert await total(shop) == expected


class TestSummaries:
    @pytest.mark.parametrize(("step", "unit"), [(None, 60), ("hour", HOUR), ("day", DAY)])
    async def test_times_are_aligned(self, place: Place, step: str | None, unit: int) -> None:
        shop = await shop_at(place)
        start = place.now // DAY * DAY
        span: dict[str, Any] = {"customer": shop.customer, "start_time": start, "end_time": start + DAY}
        if step:
            span["value_grouping_window"] = step
        await place.v1.billing.meters.event_summaries.list_async(shop.meter, span)
        for name in ("start_time", "end_time"):
            wrong = span | {name: span[name] + unit // 2}
            error = await refused(place.v1.billing.meters.event_summaries.list_async(shop.meter, wrong))
            assert error.param == name

    async def test_hours_are_paged_newest_first(self, place: Place) -> None:
        shop = await shop_at(place)
        start = place.now // DAY * DAY
        for hour in range(5):
            await shop.use(hour + 1, at=start + hour * HOUR + 5)
        span = {
            "customer": shop.customer,
            "start_time": start,
            "end_time": start + DAY,
            "value_grouping_window": "hour",
        }
        first = await place.v1.billing.meters.event_summaries.list_async(shop.meter, {**span, "limit": 2})
        assert ([one.aggregated_value for one in first.data], first.has_more) == ([5, 4], True)
        values = [one.aggregated_value async for one in first.auto_paging_iter()]
        assert values == [5, 4, 3, 2, 1]
        days = await place.v1.billing.meters.event_summaries.list_async(
            shop.meter, {**span, "value_grouping_window": "day"}
        )
        assert [one.aggregated_value for one in days.data] == [15]
