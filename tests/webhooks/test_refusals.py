"""What webhooks' routes refuse, in words; and that nobody reaches what is another organization's."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import pytest

from gateway.routes.webhooks import ROUTES
from keys.scopes import ADMIN_SCOPES, INFERENCE_SCOPES
from tests.harness.stores import TestStores
from tests.harness.webhook_place import SEED
from tests.webhooks.office import DELIVERIES, ENDPOINTS, ENVIRON, Office, Place, Refusal, office_at, webhook_place
from webhooks.endpoints import ENDPOINTS_MAX
from webhooks.fan_out import FanOut
from webhooks.signing import PlatformKeys

URL = "http://127.0.0.1:9/hook"
DAY_SECONDS = 86_400
NOT_FOUND = Refusal(404, "webhook_not_found", None)


class Places(NamedTuple):
    """Gateways of one database each: one that may reach this machine, one of the public internet, one without keys."""

    usual: Place
    strict: Place
    bare: Place


@pytest.fixture(scope="module")
async def places(stores: TestStores, template: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Places]:
    async with AsyncExitStack() as stack:

        async def place(name: str, **more: Any) -> Place:
            directory = tmp_path_factory.mktemp(name)
            return await stack.enter_async_context(webhook_place(stores, template, directory, **more))

        without = {name: value for name, value in ENVIRON.items() if name != "AAP_SEALING_KEYS"}
        yield Places(await place("usual"), await place("strict", config=""), await place("bare", environ=without))


@pytest.fixture
async def office(places: Places) -> AsyncIterator[Office]:
    async with office_at(places.usual) as made:
        yield made


@pytest.fixture
async def stranger(places: Places) -> AsyncIterator[Office]:
    async with office_at(places.usual) as made:
        yield made


class TestAddresses:
    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("https://127.0.0.1/hook", "127.0.0.1 is not a public address"),
            ("https://10.1.2.3/hook", "10.1.2.3 is not a public address"),
            ("https://192.168.0.1/hook", "192.168.0.1 is not a public address"),
            ("https://169.254.169.254/latest/meta-data", "169.254.169.254 is not a public address"),
            ("https://[::1]/hook", "::1 is not a public address"),
            ("https://[::ffff:10.0.0.1]/hook", "is not a public address"),
            ("https://2130706433/hook", "oddly spelled"),
            ("https://0x7f000001/hook", "oddly spelled"),
            ("https://127.1/hook", "oddly spelled"),
            ("https://localhost/hook", "localhost is not a name on the public internet"),
            ("https://db.internal/hook", "db.internal is not a name on the public internet"),
            ("https://intranet/hook", "intranet is not a name on the public internet"),
            ("http://example.com/hook", "must begin with https://"),
            ("ftp://example.com/hook", "must begin with https://"),
            ("example.com/hook", "must begin with https://"),
            ("", "must begin with https://"),
            ("https:///hook", "host or port is not valid"),
            ("https://example.com:0/hook", "host or port is not valid"),
            ("https://example.com:99999/hook", "host or port is not valid"),
            ("https://example.com:8080/hook", "Port 8080 is not allowed"),
            ("https://example.com:22/hook", "Port 22 is not allowed"),
            ("https://user:hunter2@example.com/hook", "holds a user name or password"),
            ("https://hunter2@example.com/hook", "holds a user name or password"),
            ("https://example.com/hook#part", "holds a fragment"),
            ("https://exa mple.com/hook", "holds a space"),
            ("https://example.com\\@10.0.0.1/", "backslash"),
            ("https://example.com/a\r\nx: y", "control character"),
            ("https://example.com./hook", "ends with a dot"),
            ("https://-example.com/hook", "host name is not valid"),
        ],
    )
    async def test_that_nothing_is_sent_to(self, places: Places, url: str, reason: str) -> None:
        async with office_at(places.strict) as office:
            made = await office.endpoint("https://example.com/hook")
            for path in (ENDPOINTS, f"{ENDPOINTS}/{made['id']}"):
                answer = await office.call("POST", path, {"url": url})
                error = answer.json()["error"]
                assert (answer.status_code, error["code"], error["param"]) == (400, "webhook_url_invalid", "url")
                assert error["message"].startswith("Invalid 'url': ")
                assert reason in error["message"]
                assert "hunter2" not in answer.text
            listed = (await office.get(ENDPOINTS))["data"]
            assert [one["url"] for one in listed] == ["https://example.com/hook"]

    @pytest.mark.parametrize(
        "url",
        [
            "https://example.com",
            "https://example.com:8443/hook?tenant=1",
            "https://1.1.1.1/hook",
            "https://bücher.example/hook",
            "HTTPS://EXAMPLE.COM/Hook",
        ],
    )
    async def test_that_are_well(self, places: Places, url: str) -> None:
        async with office_at(places.strict) as office:
            assert (await office.endpoint(url))["url"] == url


FAULTS: list[tuple[dict[str, Any], Refusal]] = [
    ({"event_types": ["key.made_up"]}, Refusal(400, "event_type_unknown", "event_types")),
    ({"event_types": ["key.*"]}, Refusal(400, "event_type_unknown", "event_types")),
    ({"event_types": ["ping"]}, Refusal(400, "event_type_unknown", "event_types")),
    ({"event_types": []}, Refusal(400, "event_type_unknown", "event_types")),
    ({"event_types": "*"}, Refusal(400, None, "event_types")),
    ({"event_types": None}, Refusal(400, None, "event_types")),
    ({"filter": "name =="}, Refusal(400, "filter_invalid", "filter")),
    ({"filter": ""}, Refusal(400, "filter_invalid", "filter")),
    ({"filter": "x" * 1_001}, Refusal(400, None, "filter")),
    ({"headers": {"webhook-id": "x"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"Webhook-Anything": "x"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"HOST": "x"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"content-length": "0"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"transfer-encoding": "chunked"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"connection": "close"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"content-type": "text/plain"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"user-agent": "x"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"x-a": "hunter2\r\nx-b: c"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"x-a": "hunter2\n"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"x-a": " hunter2"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"x-a": "hunter2 \u00e9"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"x-a": "hunter2\u0000"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"x a": "hunter2"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"x\r\na": "hunter2"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"": "hunter2"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"x-a": "1", "X-A": "hunter2"}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {"x-a": "hunter2" * 600}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": {f"x-{number}": "hunter2" for number in range(21)}}, Refusal(400, "header_invalid", "headers")),
    ({"headers": ["x-a"]}, Refusal(400, None, "headers")),
    ({"requests_per_second": 0}, Refusal(400, None, "requests_per_second")),
    ({"requests_per_second": 1_001}, Refusal(400, None, "requests_per_second")),
    ({"requests_per_second": 1.5}, Refusal(400, None, "requests_per_second")),
    ({"description": "x" * 501}, Refusal(400, None, "description")),
    ({"url": "https://example.com/" + "x" * 2_000}, Refusal(400, None, "url")),
    ({"urll": URL}, Refusal(400, None, "urll")),
    ({"status": "disabled"}, Refusal(400, None, "status")),
    ({"organization_id": "org_1"}, Refusal(400, None, "organization_id")),
]


class TestBodies:
    @pytest.mark.parametrize(("body", "expected"), FAULTS, ids=lambda one: str(one)[:60])
    async def test_that_are_wrong_change_nothing(self, office: Office, body: dict[str, Any], expected: Refusal) -> None:
        made = await office.endpoint(URL, headers={"x-old": "1"}, filter="name", event_types=["key.created"])
        before = await office.place.dump()
        for path, sent in ((ENDPOINTS, {"url": URL, **body}), (f"{ENDPOINTS}/{made['id']}", body)):
            answer = await office.call("POST", path, sent)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == expected, answer.text
            assert "hunter2" not in answer.text
        assert await office.place.dump() == before
        assert "hunter2" not in office.place.gateway.log

    @pytest.mark.parametrize(
        "secret",
        [
            "hunter2hunter2hunter2hunter2hunter2",
            "whsec_hunter2",
            "whsec_aHVudGVyMmh1bnRlcjI=",
            "whsec_" + "aHVudGVyMmh1bnRlcjJodW50ZXIyaHVudGVyMg" + "!!",
            "whsec_" + "hunter2h" * 15,
            "whpk_" + "hunter2h" * 4,
            "hunter2" * 50,
            "",
        ],
    )
    async def test_with_a_malformed_secret_do_not_have_it_repeated(self, office: Office, secret: str) -> None:
        made = await office.endpoint(URL)
        before = await office.place.dump()
        for path, body in ((ENDPOINTS, {"url": URL}), (f"{ENDPOINTS}/{made['id']}/rotate_secret", {})):
            answer = await office.call("POST", path, {**body, "secret": secret})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, None, "secret")
            assert "hunter2" not in answer.text
            assert "aHVudGVy" not in answer.text
        assert await office.place.dump() == before

    async def test_that_would_show_a_secret_again_by_changing_it_are_unknown(self, office: Office) -> None:
        made = await office.endpoint(URL)
        path = f"{ENDPOINTS}/{made['id']}"
        assert await office.refused("POST", path, {"secret": made["secret"]}) == Refusal(400, None, "secret")

    async def test_without_what_must_be_there(self, office: Office) -> None:
        made = await office.endpoint(URL)
        assert await office.refused("POST", ENDPOINTS, {}) == Refusal(400, None, "url")
        for act in ("recover", "replay"):
            path = f"{ENDPOINTS}/{made['id']}/{act}"
            assert await office.refused("POST", path, {}) == Refusal(400, None, "since")
            assert await office.refused("POST", path, {"since": -1}) == Refusal(400, None, "since")
            assert await office.refused("POST", path, {"since": "yesterday"}) == Refusal(400, None, "since")

    @pytest.mark.parametrize("act", ["recover", "replay"])
    async def test_that_reach_back_too_far(self, office: Office, act: str) -> None:
        made = await office.endpoint(URL)
        path, now = f"{ENDPOINTS}/{made['id']}/{act}", int(time.time())
        expected = Refusal(400, None, "since")
        assert await office.refused("POST", path, {"since": now - 14 * DAY_SECONDS - 60}) == expected
        assert await office.refused("POST", path, {"since": 0, "dry_run": True}) == expected
        assert (await office.post(path, {"since": now - 14 * DAY_SECONDS + 60}))["count"] == 0

    async def test_of_replays_of_a_state_that_is_none(self, office: Office) -> None:
        made = await office.endpoint(URL)
        body = {"since": int(time.time()), "state": "lost"}
        assert await office.refused("POST", f"{ENDPOINTS}/{made['id']}/replay", body) == Refusal(400, None, "state")


@pytest.mark.parametrize(
    ("path", "query", "expected"),
    [
        (ENDPOINTS, {"limit": 0}, Refusal(400, None, "limit")),
        (ENDPOINTS, {"limit": 101}, Refusal(400, None, "limit")),
        (ENDPOINTS, {"status": "enabled"}, Refusal(400, "unknown_parameter", "status")),
        (DELIVERIES, {"limit": "many"}, Refusal(400, None, "limit")),
        (DELIVERIES, {"state": "lost"}, Refusal(400, None, "state")),
        (DELIVERIES, {"endpoint": "whe_1"}, Refusal(400, "unknown_parameter", "endpoint")),
    ],
)
async def test_queries_that_are_wrong(office: Office, path: str, query: dict[str, Any], expected: Refusal) -> None:
    assert await office.refused("GET", path, **query) == expected


async def test_an_organization_has_fifty_endpoints_at_most(office: Office, stranger: Office) -> None:
    made = [await office.endpoint(URL) for _ in range(ENDPOINTS_MAX)]
    assert len(made) == 50
    assert await office.refused("POST", ENDPOINTS, {"url": URL}) == Refusal(409, "too_many_endpoints", None)
    await office.post(f"{ENDPOINTS}/{made[0]['id']}/disable")
    assert await office.refused("POST", ENDPOINTS, {"url": URL}) == Refusal(409, "too_many_endpoints", None)
    await stranger.endpoint(URL)
    assert (await office.call("DELETE", f"{ENDPOINTS}/{made[0]['id']}")).status_code == 200
    await office.endpoint(URL)
    assert await office.refused("POST", ENDPOINTS, {"url": URL}) == Refusal(409, "too_many_endpoints", None)


class Route(NamedTuple):
    """A route of webhooks."""

    method: str
    path: str

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    def at(self, endpoint_id: str, delivery_id: str) -> str:
        return self.path.replace("{endpoint_id:str}", endpoint_id).replace("{delivery_id:str}", delivery_id)

    @property
    def body(self) -> dict[str, Any] | None:
        """One that the route takes. A route that is not known here gets none, and has to be added if it needs one."""
        bodies: dict[str, dict[str, Any]] = {
            f"POST {ENDPOINTS}": {"url": URL},
            f"POST {ENDPOINTS}/{{endpoint_id:str}}": {"description": "changed", "url": URL + "/changed"},
            f"POST {ENDPOINTS}/{{endpoint_id:str}}/recover": {"since": int(time.time()) - 600},
            f"POST {ENDPOINTS}/{{endpoint_id:str}}/replay": {"since": int(time.time()) - 600},
        }
        return bodies.get(str(self))


EVERY_ROUTE = [
    Route(method, path) for route in ROUTES for path in sorted(route.paths) for method in sorted(route.http_methods)
]
OPEN = [route for route in EVERY_ROUTE if route.path == "/.well-known/webhook-keys.json"]
CLOSED = [route for route in EVERY_ROUTE if route not in OPEN]
WITH_AN_ID = [route for route in EVERY_ROUTE if "{" in route.path]


def test_every_route_is_walked() -> None:
    assert (len(EVERY_ROUTE), len(OPEN)) == (len(ROUTES), 1)
    assert {str(route) for route in CLOSED if route not in WITH_AN_ID} == {
        f"GET {ENDPOINTS}",
        f"POST {ENDPOINTS}",
        f"GET {DELIVERIES}",
        "GET /v1/webhook_event_types",
    }


async def ids_of(office: Office) -> tuple[str, str]:
    """An endpoint of *office*'s, and a delivery that it is due."""
    made = await office.endpoint(URL)
    await office.publish("a")
    await FanOut(office.place.database).once()
    (delivery,) = await office.deliveries()
    return made["id"], delivery["id"]


class TestNobodyElse:
    @pytest.mark.parametrize("route", WITH_AN_ID, ids=str)
    async def test_reaches_what_is_another_organizations(self, office: Office, stranger: Office, route: Route) -> None:
        """Guarantee: what is not yours answers as what does not exist, byte for byte, and is not changed."""
        endpoint_id, delivery_id = await ids_of(office)
        before = await office.place.dump()
        foreign = await stranger.call(route.method, route.at(endpoint_id, delivery_id), route.body)
        unknown = await stranger.call(route.method, route.at(f"whe_{'0' * 26}", f"dlv_{'0' * 26}"), route.body)
        error = foreign.json()["error"]
        assert (foreign.status_code, error["code"], error["param"]) == NOT_FOUND
        assert (foreign.status_code, foreign.content) == (unknown.status_code, unknown.content)
        assert await office.place.dump() == before
        # To its owner it is there.
        own = await office.call(route.method, route.at(endpoint_id, delivery_id), route.body)
        assert own.status_code == 200

    async def test_sees_it_in_a_list(self, office: Office, stranger: Office) -> None:
        endpoint_id, delivery_id = await ids_of(office)
        for path in (ENDPOINTS, DELIVERIES):
            assert (await stranger.get(path))["data"] == []
        assert await stranger.deliveries(endpoint_id=endpoint_id) == []
        assert (await stranger.get(ENDPOINTS, after=f"whe_{'z' * 26}"))["data"] == []
        assert (await stranger.get(DELIVERIES, after=f"dlv_{'z' * 26}"))["data"] == []
        assert [one["id"] for one in await office.deliveries(endpoint_id=endpoint_id)] == [delivery_id]

    @pytest.mark.parametrize("route", CLOSED, ids=str)
    async def test_acts_with_a_key_for_something_else(self, office: Office, places: Places, route: Route) -> None:
        path = route.at(*await ids_of(office))
        other_scopes = tuple(scope for scope in ADMIN_SCOPES if scope != "webhooks:manage")
        before = await office.place.dump()
        for scopes in (INFERENCE_SCOPES, other_scopes):
            async with office_at(places.usual, scopes) as clerk:
                expected = Refusal(403, "insufficient_permissions", None)
                assert await clerk.refused(route.method, path, route.body) == expected
        assert await office.place.dump() == before

    @pytest.mark.parametrize("route", CLOSED, ids=str)
    async def test_acts_without_a_key(self, office: Office, route: Route) -> None:
        path = route.at(*await ids_of(office))
        before = await office.place.dump()
        del office.client.headers["authorization"]
        assert (await office.call(route.method, path, route.body)).status_code == 401
        assert await office.place.dump() == before


class TestWithoutASealingKey:
    async def test_no_endpoint_is_made_or_read(self, places: Places) -> None:
        async with office_at(places.bare) as office:
            expected = Refusal(503, "webhooks_not_configured", None)
            assert await office.refused("POST", ENDPOINTS, {"url": URL}) == expected
            assert await office.refused("GET", ENDPOINTS) == expected
            unknown = f"{ENDPOINTS}/whe_{'0' * 26}"
            assert await office.refused("GET", unknown) == expected
            assert await office.refused("POST", unknown, {"description": "x"}) == expected
            assert await office.refused("GET", f"{unknown}/secret") == expected
            for act in ("rotate_secret", "disable", "enable"):
                assert await office.refused("POST", f"{unknown}/{act}") == expected
        assert all(rows == [] for rows in (await places.bare.dump()).values())

    async def test_types_and_public_keys_are_read_as_ever(self, places: Places) -> None:
        async with office_at(places.bare) as office:
            assert len((await office.get("/v1/webhook_event_types"))["data"]) == 14
            published = await office.get("/.well-known/webhook-keys.json")
            assert published == {"keys": PlatformKeys((SEED,)).published()}
