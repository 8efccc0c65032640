"""Keys, errors, headers, limits, pages: what is the same on every route."""

from __future__ import annotations

import httpx
import pytest
import stripe

from metering.billing.twin.options import API_VERSION, TwinOptions
from tests.harness.stripe_twin import Place, client_of, twin_place


class TestKeys:
    async def test_an_unknown_key_is_refused(self, place: Place) -> None:
        client = client_of(place.server.url, "sk_test_other")
        with pytest.raises(stripe.AuthenticationError) as raised:
            await client.v1.customers.list_async()
        await client._requestor._client.close_async()
        assert raised.value.http_status == 401
        assert "sk_test_other" not in str(raised.value)

    async def test_no_key_is_refused_and_a_basic_user_is_a_key(self, place: Place) -> None:
        async with httpx.AsyncClient(base_url=place.server.url) as http:
            assert (await http.get("/v1/customers")).status_code == 401
            assert (await http.get("/v1/customers", auth=("sk_test_twin", ""))).status_code == 200
            bad = await http.get("/v1/customers", headers={"authorization": "Basic !!"})
            assert bad.status_code == 401


class TestErrors:
    async def test_an_error_has_stripes_form(self, place: Place) -> None:
        with pytest.raises(stripe.InvalidRequestError) as raised:
            await place.v1.customers.retrieve_async("cus_nobody")
        error = raised.value
        assert (error.http_status, error.code, error.param) == (404, "resource_missing", "id")
        assert error.user_message == "No such customer: 'cus_nobody'"
        assert error.json_body["error"]["type"] == "invalid_request_error"
        async with httpx.AsyncClient() as http:
            logged = (await http.get(error.json_body["error"]["request_log_url"])).json()
        assert (logged["request_id"], logged["status"]) == (error.request_id, 404)

    async def test_an_object_that_a_parameter_names_is_missing_with_400(self, place: Place) -> None:
        with pytest.raises(stripe.InvalidRequestError) as raised:
            await place.v1.subscriptions.create_async({"customer": "cus_nobody", "items": [{"price": "price_1"}]})
        assert (raised.value.http_status, raised.value.code, raised.value.param) == (
            400,
            "resource_missing",
            "customer",
        )

    async def test_an_unknown_parameter_is_refused(self, place: Place) -> None:
        with pytest.raises(stripe.InvalidRequestError) as raised:
            await place.v1.customers.create_async({"colour": "red"})
        assert (raised.value.code, raised.value.param) == ("parameter_unknown", "colour")
        with pytest.raises(stripe.InvalidRequestError) as raised:
            await place.v1.subscriptions.create_async({"customer": "cus_1", "items": [{"prize": "price_1"}]})
        assert (raised.value.code, raised.value.param) == ("parameter_unknown", "items[0][prize]")

    async def test_a_missing_parameter_is_named(self, place: Place) -> None:
        with pytest.raises(stripe.InvalidRequestError) as raised:
            await place.v1.prices.create_async({"currency": "usd", "unit_amount": 5, "product_data": {}})
        assert raised.value.code == "parameter_missing"

    async def test_an_unknown_route_says_so(self, place: Place) -> None:
        async with httpx.AsyncClient(base_url=place.server.url) as http:
            answer = await http.get("/v1/planets", auth=("sk_test_twin", ""))
        assert answer.status_code == 404
        assert "/v1/planets" in answer.json()["error"]["message"]

    async def test_every_answer_has_a_request_id_and_a_version(self, place: Place) -> None:
        made = await place.v1.customers.create_async({})
        assert made.last_response.headers["stripe-version"] == API_VERSION == stripe.api_version
        ids = [entry.request_id for entry in place.twin.journal.entries]
        assert made.last_response.headers["request-id"] == ids[0]

    async def test_bodies_that_cannot_be_read_are_refused(self, place: Place) -> None:
        headers = {"authorization": "Bearer sk_test_twin"}
        async with httpx.AsyncClient(base_url=place.server.url, headers=headers) as http:
            assert (await http.post("/v1/customers", content=b"\xff\xfe")).status_code == 400
            assert (await http.post("/v2/core/event_destinations", content=b"{")).status_code == 400
            assert (await http.post("/v2/core/event_destinations", content=b"[]")).status_code == 400
            assert (await http.post("/v1/customers", content=b"x" * 5_000_000)).status_code == 413


class TestRequestRate:
    async def test_the_26th_request_of_a_second_is_refused_and_may_be_retried(self) -> None:
        async with twin_place(TwinOptions(requests_per_second=25)) as place:
            for _ in range(25):
                await place.v1.customers.list_async()
            with pytest.raises(stripe.RateLimitError) as raised:
                await place.v1.customers.list_async()
            assert (raised.value.http_status, raised.value.error.code) == (429, "rate_limit")
            assert raised.value.headers["stripe-should-retry"] == "true"
            place.pass_time(seconds=0.2)
            for _ in range(5):
                await place.v1.customers.list_async()
            with pytest.raises(stripe.RateLimitError):
                await place.v1.customers.list_async()

    async def test_there_is_no_limit_unless_set(self, place: Place) -> None:
        for _ in range(60):
            await place.v1.customers.list_async()


class TestLists:
    async def test_pages_go_from_new_to_old_by_cursor(self, place: Place) -> None:
        ids = [(await place.v1.customers.create_async({"name": str(number)})).id for number in range(25)]
        page = await place.v1.customers.list_async({"limit": 10})
        assert [one.id for one in page.data] == ids[:14:-1]
        assert page.has_more
        assert [one.id async for one in page.auto_paging_iter()] == ids[::-1]
        back = await place.v1.customers.list_async({"limit": 3, "ending_before": ids[10]})
        assert [one.id for one in back.data] == [ids[13], ids[12], ids[11]]

    @pytest.mark.parametrize(
        "wrong", [{"limit": 0}, {"limit": 101}, {"limit": "ten"}, {"starting_after": "cus_nobody"}]
    )
    async def test_wrong_pages_are_refused(self, place: Place, wrong: dict[str, object]) -> None:
        with pytest.raises(stripe.InvalidRequestError):
            await place.v1.customers.list_async(wrong)

    async def test_created_filters(self, place: Place) -> None:
        start = place.now
        for _ in range(3):
            await place.v1.customers.create_async({})
            place.pass_time(seconds=10)
        later = await place.v1.customers.list_async({"created": {"gt": start}})
        assert len(later.data) == 2
        assert len((await place.v1.customers.list_async({"created": {"gte": start, "lt": start + 10}})).data) == 1
        assert len((await place.v1.customers.list_async({"created": start + 20})).data) == 1
