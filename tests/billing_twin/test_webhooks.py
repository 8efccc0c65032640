"""Webhooks: signed, retried, doubled, delayed, reordered, lost; snapshots and thin events."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import stripe

from metering.billing.twin.options import Mischief, TwinOptions
from tests.harness.stripe_twin import Place, client_of, twin_place
from tests.harness.webhook_receiver import Receiver, receiver


@pytest.fixture
async def inbox() -> AsyncGenerator[Receiver]:
    async with receiver() as made:
        yield made


async def listen(place: Place, inbox: Receiver, *types: str) -> str:
    """Register the inbox. Returns its secret."""
    wish = {"url": inbox.url, "enabled_events": list(types) or ["*"]}
    return (await place.v1.webhook_endpoints.create_async(wish)).secret


async def add_customers(place: Place, count: int) -> list[str]:
    return [(await place.v1.customers.create_async({"name": str(number)})).id for number in range(count)]


def names(inbox: Receiver) -> list[str]:
    return [one.event["data"]["object"]["name"] for one in inbox.received]


class TestSignatures:
    async def test_the_package_accepts_the_signature(self, place: Place, inbox: Receiver) -> None:
        secret = await listen(place, inbox)
        await add_customers(place, 1)
        await place.server.deliver_due()
        (got,) = inbox.received
        # The twin's clock is not the machine's: the tolerance is checked elsewhere.
        event = stripe.Webhook.construct_event(got.body, got.headers["stripe-signature"], secret, tolerance=None)
        assert event.type == "customer.created"
        assert event.id == place.events("customer.created")[0]["id"]
        assert got.headers["stripe-signature"].startswith(f"t={place.now},v1=")

    async def test_another_body_or_secret_is_noticed(self, place: Place, inbox: Receiver) -> None:
        secret = await listen(place, inbox)
        await add_customers(place, 1)
        await place.server.deliver_due()
        (got,) = inbox.received
        for body, key in ((got.body + b" ", secret), (got.body, "whsec_other")):
            with pytest.raises(stripe.SignatureVerificationError):
                stripe.Webhook.construct_event(body, got.headers["stripe-signature"], key, tolerance=None)

    async def test_a_retry_is_signed_anew(self, place: Place, inbox: Receiver) -> None:
        await listen(place, inbox)
        inbox.answers = [500]
        await add_customers(place, 1)
        await place.server.deliver_due()
        place.pass_time(seconds=60)
        await place.server.deliver_due()
        first, second = (one.headers["stripe-signature"] for one in inbox.received)
        assert first.split(",")[0] != second.split(",")[0]


class TestDelivery:
    async def test_only_what_was_asked_for_arrives(self, place: Place, inbox: Receiver) -> None:
        await listen(place, inbox, "product.created")
        await add_customers(place, 1)
        await place.v1.products.create_async({"name": "Pro"})
        await place.server.deliver_due()
        assert inbox.types == ["product.created"]

    async def test_it_tries_again_by_the_schedule_and_gives_up(self, inbox: Receiver) -> None:
        async with twin_place(TwinOptions(webhook_retry_seconds=(60, 600))) as place:
            await listen(place, inbox)
            inbox.answers = [500, 404, 302]
            await add_customers(place, 1)
            await place.server.deliver_due()
            for wait, count in ((59, 1), (1, 2), (599, 2), (1, 3), (10**6, 3)):
                place.pass_time(seconds=wait)
                await place.server.deliver_due()
                assert len(inbox.received) == count
            assert [one.outcomes for one in place.twin.webhooks.done] == [[500, 404, 302]]

    async def test_nobody_listening_is_tried_again_too(self, place: Place) -> None:
        await place.v1.webhook_endpoints.create_async({"url": "http://127.0.0.1:9/x", "enabled_events": ["*"]})
        await add_customers(place, 1)
        await place.server.deliver_due()
        (waiting,) = place.twin.webhooks.waiting
        assert waiting.outcomes == [None]

    async def test_a_deleted_or_disabled_endpoint_gets_nothing(self, place: Place, inbox: Receiver) -> None:
        await listen(place, inbox)
        (endpoint,) = (await place.v1.webhook_endpoints.list_async()).data
        await place.v1.webhook_endpoints.update_async(endpoint.id, {"disabled": True})
        await add_customers(place, 1)
        await place.v1.webhook_endpoints.delete_async(endpoint.id)
        await add_customers(place, 1)
        await place.server.deliver_due()
        assert inbox.received == []
        assert (await place.v1.webhook_endpoints.list_async()).data == []

    async def test_only_the_first_answer_tells_the_secret(self, place: Place, inbox: Receiver) -> None:
        secret = await listen(place, inbox)
        (endpoint,) = (await place.v1.webhook_endpoints.list_async()).data
        assert secret.startswith("whsec_")
        assert "secret" not in endpoint

    async def test_the_secret_can_be_set(self, inbox: Receiver) -> None:
        async with twin_place(TwinOptions(webhook_secret="whsec_known")) as place:
            assert await listen(place, inbox) == "whsec_known"

    async def test_paused_webhooks_wait(self, place: Place, inbox: Receiver) -> None:
        await listen(place, inbox)
        place.twin.webhooks.is_paused = True
        await add_customers(place, 3)
        await place.server.deliver_due()
        assert inbox.received == []
        place.twin.webhooks.is_paused = False
        await place.server.deliver_due()
        assert names(inbox) == ["0", "1", "2"]


class TestMischief:
    async def run(self, inbox: Receiver, count: int = 100, **mischief: float) -> Place:
        async with twin_place(TwinOptions(mischief=Mischief(**mischief), seed=7)) as place:
            await listen(place, inbox)
            place.twin.webhooks.is_paused = True
            await add_customers(place, count)
            place.twin.webhooks.is_paused = False
            await place.server.deliver_due()
            return place

    async def test_some_are_lost(self, inbox: Receiver) -> None:
        place = await self.run(inbox, drop_share=0.3)
        assert 50 < len(inbox.received) < 90
        assert len(inbox.received) + len(place.twin.webhooks.dropped) == 100

    async def test_some_come_twice(self, inbox: Receiver) -> None:
        await self.run(inbox, duplicate_share=0.3)
        assert 110 < len(inbox.received) < 150
        assert len(set(names(inbox))) == 100

    async def test_some_overtake_others(self, inbox: Receiver) -> None:
        await self.run(inbox, reorder_share=0.3)
        order = [int(name) for name in names(inbox)]
        assert order != sorted(order)
        assert sorted(order) == list(range(100))

    async def test_some_are_late(self, inbox: Receiver) -> None:
        async with twin_place(TwinOptions(mischief=Mischief(delay_seconds_max=100), seed=7)) as place:
            await listen(place, inbox)
            await add_customers(place, 20)
            place.pass_time(seconds=20)
            await place.server.deliver_due()
            early = len(inbox.received)
            place.pass_time(seconds=80)
            await place.server.deliver_due()
            assert 0 < early < 20 == len(inbox.received)

    async def test_the_same_seed_makes_the_same_mischief(self) -> None:
        orders: list[list[str]] = []
        for _ in range(2):
            async with receiver() as inbox:
                await self.run(inbox, 40, drop_share=0.2, duplicate_share=0.2, reorder_share=0.5)
                orders.append(names(inbox))
        assert orders[0] == orders[1]


class TestThinEvents:
    async def test_a_thin_event_is_a_reference_that_is_fetched(self, place: Place, inbox: Receiver) -> None:
        destination = await place.client.v2.core.event_destinations.create_async(
            {
                "name": "reports",
                "type": "webhook_endpoint",
                "event_payload": "thin",
                "enabled_events": ["v1.billing.meter.error_report_triggered"],
                "webhook_endpoint": {"url": inbox.url},
                "include": ["webhook_endpoint.signing_secret", "webhook_endpoint.url"],
            }
        )
        secret = destination.webhook_endpoint.signing_secret
        wanted = {"event_name": "usage", "display_name": "Usage", "default_aggregation": {"formula": "sum"}}
        meter = await place.v1.billing.meters.create_async(wanted)
        payload = {"stripe_customer_id": "cus_nobody", "value": "1"}
        await place.v1.billing.meter_events.create_async({"event_name": "usage", "payload": payload, "identifier": "x"})
        await place.server.deliver_due()
        (got,) = inbox.received
        assert "data" not in got.event
        # The twin's clock is not the machine's.
        stripe.WebhookSignature.verify_header(got.body.decode(), got.headers["stripe-signature"], secret, None)
        event = await place.client.v2.core.events.retrieve_async(got.event["id"])
        assert event.data.reason.error_types[0].sample_errors[0].request.identifier == "x"
        assert event.related_object.url == f"/v1/billing/meters/{meter.id}"
        assert (await place.client.v2.core.events.list_async({"object_id": meter.id})).data[0].id == event.id

    async def test_destinations_are_listed_without_secrets(self, place: Place, inbox: Receiver) -> None:
        wish = {"name": "r", "type": "webhook_endpoint", "event_payload": "thin", "enabled_events": ["a"]}
        wish["webhook_endpoint"] = {"url": inbox.url}
        made = await place.client.v2.core.event_destinations.create_async(wish)
        (listed,) = (await place.client.v2.core.event_destinations.list_async()).data
        assert (listed.id, listed.webhook_endpoint.signing_secret) == (made.id, None)


class TestEvents:
    async def test_events_are_kept_for_30_days(self, place: Place) -> None:
        await add_customers(place, 1)
        (event,) = (await place.v1.events.list_async()).data
        place.pass_time(days=30)
        assert (await place.v1.events.retrieve_async(event.id)).type == "customer.created"
        place.pass_time(seconds=1)
        assert (await place.v1.events.list_async()).data == []
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.events.retrieve_async(event.id)

    async def test_catching_up_by_time_type_and_cursor(self, place: Place) -> None:
        """Guarantee: what an inbox missed is found again: `created`, `types`, both cursors."""
        await add_customers(place, 2)
        place.pass_time(seconds=100)
        await place.v1.products.create_async({"name": "Pro"})
        await add_customers(place, 2)
        events = place.v1.events
        since = (await events.list_async({"created": {"gte": place.now}})).data
        assert [one.type for one in since] == ["customer.created", "customer.created", "product.created"]
        kinds = (await events.list_async({"types": ["product.created", "price.created"]})).data
        assert [one.type for one in kinds] == ["product.created"]
        everything = (await events.list_async({})).data
        newer = (await events.list_async({"ending_before": everything[3].id})).data
        assert [one.id for one in newer] == [one.id for one in everything[:3]]
        older = (await events.list_async({"starting_after": everything[3].id})).data
        assert [one.id for one in older] == [everything[4].id]

    async def test_an_event_names_its_request(self, place: Place) -> None:
        made = await place.v1.customers.create_async({}, {"idempotency_key": "k"})
        (event,) = place.events("customer.created")
        assert event["request"] == {"id": made.last_response.headers["request-id"], "idempotency_key": "k"}

    async def test_a_snapshot_does_not_change_with_its_object(self, place: Place) -> None:
        (identity,) = await add_customers(place, 1)
        await place.v1.customers.update_async(identity, {"name": "other"})
        before, after = place.events("customer.created", "customer.updated")
        assert (before["data"]["object"]["name"], after["data"]["object"]["name"]) == ("0", "other")


async def test_a_second_client_is_answered_while_a_webhook_is_on_its_way(place: Place, inbox: Receiver) -> None:
    await listen(place, inbox)
    await add_customers(place, 3)
    client = client_of(place.server.url)
    assert len((await client.v1.customers.list_async()).data) == 3
    await client._requestor._client.close_async()
