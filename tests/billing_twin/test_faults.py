"""Faults on purpose, in process and over HTTP, and the journal that tells what was asked."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import stripe

from metering.billing.twin.faults import FaultPlan
from metering.billing.twin.options import TwinOptions
from tests.harness.stripe_twin import Place, client_of, shop_at, twin_place, wait_for


def customers(place: Place) -> int:
    return len(place.twin.state.tables["customer"])


class TestFaults:
    async def test_a_dropped_answer_leaves_the_work_done(self, place: Place) -> None:
        place.twin.faults.add(FaultPlan(kind="drop_after_commit"))
        with pytest.raises(stripe.APIConnectionError):
            await place.v1.customers.create_async({})
        assert customers(place) == 1
        assert [entry.fault for entry in place.twin.journal.entries] == ["drop_after_commit"]

    async def test_a_500_before_the_work_leaves_it_undone(self, place: Place) -> None:
        place.twin.faults.add(FaultPlan(kind="error_before_commit"))
        with pytest.raises(stripe.APIError):
            await place.v1.customers.create_async({})
        assert customers(place) == 0

    async def test_a_500_after_the_work_leaves_it_done(self, place: Place) -> None:
        place.twin.faults.add(FaultPlan(kind="error_after_commit"))
        with pytest.raises(stripe.APIError):
            await place.v1.customers.create_async({})
        assert customers(place) == 1

    async def test_an_unsaved_500_is_gone_when_the_client_tries_again(self, place: Place) -> None:
        place.twin.faults.add(FaultPlan(kind="error_before_commit", is_saved=False))
        client = client_of(place.server.url, retries=2)
        await client.v1.customers.create_async({})
        await client._requestor._client.close_async()
        assert [entry.status for entry in place.twin.journal.entries] == [500, 200]

    async def test_a_reset_connection_does_nothing(self, place: Place) -> None:
        place.twin.faults.add(FaultPlan(kind="reset"))
        with pytest.raises(stripe.APIConnectionError):
            await place.v1.customers.create_async({}, {"idempotency_key": "k"})
        assert customers(place) == 0
        assert place.twin.journal.entries[0].status == 0
        await place.v1.customers.create_async({}, {"idempotency_key": "k"})
        assert customers(place) == 1

    async def test_slow_work_is_done_also_when_the_client_gives_up(self, place: Place) -> None:
        """Guarantee: a timeout leaves the outcome unknown to the client, and the work done."""
        hold = place.twin.faults.add(FaultPlan(kind="hold"))
        asked = asyncio.create_task(place.v1.customers.create_async({}))
        await wait_for(hold.entered)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        hold.release()
        await place.v1.customers.list_async()
        assert customers(place) == 1

    async def test_slow_answers_come_late(self, place: Place) -> None:
        place.twin.faults.add(FaultPlan(kind="slow", seconds=0.05))
        begun = asyncio.get_running_loop().time()
        await place.v1.customers.create_async({})
        assert asyncio.get_running_loop().time() - begun >= 0.05

    async def test_a_plan_names_method_path_first_and_count(self, place: Place) -> None:
        plan = FaultPlan(kind="error_before_commit", method="POST", path="/v1/cust*", nth=2, times=2)
        fault = place.twin.faults.add(plan)
        await place.v1.customers.list_async()
        await place.v1.products.create_async({"name": "Pro"})
        outcomes: list[bool] = []
        for _ in range(4):
            try:
                await place.v1.customers.create_async({})
            except stripe.APIError:
                outcomes.append(False)
            else:
                outcomes.append(True)
        assert outcomes == [True, False, False, True]
        assert (fault.seen, fault.met) == (4, 2)


class TestJournal:
    async def test_it_keeps_what_was_asked_and_answered(self, place: Place) -> None:
        shop = await shop_at(place)
        await shop.use(5, identifier="a")
        (entry,) = place.twin.journal.of("POST", "/v1/billing/meter_events")
        assert entry.params["payload"] == {"stripe_customer_id": shop.customer, "value": "5"}
        assert entry.answer["identifier"] == "a"
        assert entry.idempotency_key
        assert entry.status == 200

    async def test_it_is_bounded(self) -> None:
        async with twin_place(TwinOptions(journal_max=3)) as place:
            for _ in range(5):
                await place.v1.customers.create_async({})
            assert len(place.twin.journal.entries) == 3


class TestOverHttp:
    @pytest.fixture
    async def http(self, place: Place) -> Any:
        async with httpx.AsyncClient(base_url=f"{place.server.url}/_twin/") as made:
            yield made

    async def test_faults_are_planned_and_taken_back(self, place: Place, http: httpx.AsyncClient) -> None:
        planned = await http.post("faults", json={"kind": "error_before_commit", "path": "/v1/customers"})
        assert planned.json()["plan"]["times"] == 1
        with pytest.raises(stripe.APIError):
            await place.v1.customers.create_async({})
        assert (await http.get("faults")).json()["data"][0]["met"] == 1
        await http.delete("faults")
        assert (await http.get("faults")).json()["data"] == []

    async def test_the_journal_is_read_and_cleared(self, place: Place, http: httpx.AsyncClient) -> None:
        await place.v1.customers.create_async({"email": "a@example.com"})
        (entry,) = (await http.get("journal")).json()["data"]
        assert (entry["route"], entry["params"]) == ("/v1/customers", {"email": "a@example.com"})
        await http.delete("journal")
        assert not place.twin.journal.entries

    async def test_the_clock_moves_forward_only(self, place: Place, http: httpx.AsyncClient) -> None:
        before = (await http.get("clock")).json()["now"]
        assert (await http.post("clock", json={"advance_seconds": 90})).json()["now"] == before + 90
        assert (await http.post("clock", json={"advance_seconds": -1})).status_code == 400

    async def test_usage_is_settled_and_summed(self, place: Place, http: httpx.AsyncClient) -> None:
        shop = await shop_at(place)
        await shop.use(5)
        assert (await http.post("settle")).json() == {"settled": True}
        asked = {"customer": shop.customer, "event_name": "usage", "start": 0, "end": 2**40}
        assert (await http.get("meter_total", params=asked)).json() == {"total": 5}

    async def test_a_session_is_paid(self, place: Place, http: httpx.AsyncClient) -> None:
        price = {"currency": "usd", "unit_amount": 5, "product_data": {"name": "Credit"}}
        wish = {"mode": "payment", "line_items": [{"price_data": price, "quantity": 1}]}
        session = await place.v1.checkout.sessions.create_async(wish)
        declining = {"session": session.id, "token": "pm_card_chargeCustomerFail"}
        assert (await http.post("pay", json=declining)).json() == {"paid": False}
        assert (await http.post("pay", json={"session": session.id})).json() == {"paid": True}
        assert (await http.post("pay", json={"session": session.id})).status_code == 400

    async def test_webhooks_are_shown_paused_and_maltreated(self, place: Place, http: httpx.AsyncClient) -> None:
        await http.post("webhooks/pause")
        assert (await http.get("webhooks")).json()["is_paused"]
        await http.post("webhooks/resume")
        await http.post("webhooks/mischief", json={"drop_share": 1.0})
        assert place.twin.webhooks.mischief.drop_share == 1.0

    async def test_what_cannot_be_read_is_refused(self, http: httpx.AsyncClient) -> None:
        assert (await http.post("faults", json={"kind": "explode"})).status_code == 400
        assert (await http.post("faults", content=b"{")).status_code == 400
        assert (await http.get("planets")).status_code == 404
