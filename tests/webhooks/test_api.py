"""Webhooks as an administrator manages them over HTTP, with a worker that delivers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from jsonschema import Draft202012Validator

from tests.harness.eventually import eventually
from tests.harness.stores import TestStores
from tests.harness.webhook_place import SEED, worker
from tests.harness.webhook_sink import Arrival, Sink, status
from tests.webhooks.office import (
    DELIVERIES,
    ENDPOINTS,
    Office,
    Place,
    Refusal,
    is_signed_by,
    office_at,
    v1_signatures,
    webhook_place,
)
from webhooks.signing import PlatformKeys, secret_text

DAY_SECONDS = 86_400
FIELDS = {
    *("id", "object", "url", "description", "event_types", "filter", "header_names", "requests_per_second"),
    *("is_secret_revealable", "status", "disabled_at", "disabled_reason", "failing_since", "last_success_at"),
    *("last_problem", "created_at"),
}
DISABLED = Refusal(409, "endpoint_disabled", None)
NOT_FOUND = Refusal(404, "webhook_not_found", None)


@pytest.fixture(scope="module")
async def place(stores: TestStores, template: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    async with (
        webhook_place(stores, template, tmp_path_factory.mktemp("api")) as made,
        worker(made.stores.database_url),
    ):
        yield made


@pytest.fixture
async def office(place: Place) -> AsyncIterator[Office]:
    async with office_at(place) as made:
        yield made


def path_of(endpoint: dict[str, Any], act: str = "") -> str:
    return f"{ENDPOINTS}/{endpoint['id']}{act}"


def ids_at(receiver: Sink, path: str = "/hook") -> list[str]:
    return [one.headers["webhook-id"] for one in receiver.arrivals[path]]


async def arrival(receiver: Sink, event_id: str, path: str = "/hook") -> Arrival:
    """The first arrival of an event at *path*."""
    found = await eventually(lambda: [one for one in receiver.arrivals[path] if one.headers["webhook-id"] == event_id])
    return found[0]


class TestAnEndpoint:
    async def test_is_made_with_a_secret_that_signs_what_it_is_sent(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url(), description="orders", headers={"X-Token": "t-1"})
        assert made.keys() == FIELDS | {"secret"}
        assert (made["object"], made["status"], made["description"]) == ("webhook_endpoint", "enabled", "orders")
        assert (made["event_types"], made["header_names"], made["url"]) == (["*"], ["x-token"], receiver.url())
        assert abs(made["created_at"] - time.time()) < 60
        (event_id,) = await office.publish("a")
        came = await arrival(receiver, event_id)
        assert is_signed_by(came, made["secret"])
        assert not is_signed_by(came, secret_text(bytes(32)))
        assert came.headers["x-token"] == "t-1"
        assert msgspec.json.decode(came.body)["data"]["name"] == "a"

    async def test_may_bring_a_secret_of_its_own(self, office: Office, receiver: Sink) -> None:
        brought = secret_text(b"k" * 24)
        made = await office.endpoint(receiver.url(), secret=brought)
        assert made["secret"] == brought
        (event_id,) = await office.publish("a")
        assert is_signed_by(await arrival(receiver, event_id), brought)

    async def test_is_read_as_it_was_made_without_its_secret(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url(), event_types=["key.created", "chat.completed"], filter="name")
        shown = await office.get(path_of(made))
        assert shown == {name: value for name, value in made.items() if name != "secret"}
        assert (shown["event_types"], shown["filter"]) == (["key.created", "chat.completed"], "name")

    async def test_are_listed_in_pages_newest_first(self, office: Office, receiver: Sink) -> None:
        empty = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        assert await office.get(ENDPOINTS) == empty
        made = [(await office.endpoint(receiver.url(f"/{number}")))["id"] for number in range(5)]
        pages: list[list[str]] = []
        query: dict[str, Any] = {"limit": 2}
        while True:
            page = await office.get(ENDPOINTS, **query)
            pages.append([one["id"] for one in page["data"]])
            assert (page["first_id"], page["last_id"]) == (pages[-1][0], pages[-1][-1])
            if not page["has_more"]:
                break
            query["after"] = page["last_id"]
        assert pages == [[made[4], made[3]], [made[2], made[1]], [made[0]]]
        assert [one["id"] for one in (await office.get(ENDPOINTS))["data"]] == made[::-1]
        assert await office.get(ENDPOINTS, after=made[0]) == empty

    async def test_takes_over_what_is_changed_of_it(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url("/old"), headers={"x-one": "1"}, description="before")
        (event_id,) = await office.publish("a")
        assert (await arrival(receiver, event_id, "/old")).headers["x-one"] == "1"
        change = {
            "url": receiver.url("/new"),
            "description": "after",
            "filter": "name == 'wanted'",
            "headers": {"X-Two": "2", "authorization": "Bearer t"},
            "requests_per_second": 50,
            "event_types": ["key.created"],
        }
        changed = await office.post(path_of(made), change)
        names = ["authorization", "x-two"]
        assert changed == {**await office.get(path_of(made))}
        assert changed == {**_shown(made), **_without(change, "headers"), "header_names": names} | _doing(changed)
        unwanted, wanted = await office.publish("unwanted", "wanted")
        came = await arrival(receiver, wanted, "/new")
        assert (came.headers["x-two"], came.headers["authorization"]) == ("2", "Bearer t")
        assert "x-one" not in came.headers
        assert (ids_at(receiver, "/old"), ids_at(receiver, "/new")) == ([event_id], [wanted])
        assert unwanted not in receiver.counts

    async def test_keeps_what_is_not_changed_and_loses_what_is_taken_away(self, office: Office, receiver: Sink) -> None:
        more = {"filter": "name == 'x'", "requests_per_second": 5, "description": "d", "event_types": ["key.created"]}
        made = await office.endpoint(receiver.url(), headers={"x-one": "1"}, **more)
        assert await office.post(path_of(made), {}) == _shown(made)
        without_filter = await office.post(path_of(made), {"filter": None})
        assert without_filter == {**_shown(made), "filter": None}
        bare = await office.post(path_of(made), {"requests_per_second": None, "headers": {}})
        assert bare == {**without_filter, "requests_per_second": None, "header_names": []}
        (event_id,) = await office.publish("y")
        assert "x-one" not in (await arrival(receiver, event_id)).headers

    async def test_is_sent_nothing_once_it_is_deleted(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url("/gone"))
        kept = await office.endpoint(receiver.url("/kept"))
        (before,) = await office.publish("a")
        await arrival(receiver, before, "/gone")
        (delivered,) = await office.settled(1, endpoint_id=made["id"])
        deleted = (await office.call("DELETE", path_of(made))).json()
        assert deleted == {"id": made["id"], "deleted": True, "object": "webhook_endpoint.deleted"}
        (after,) = await office.publish("b")
        await arrival(receiver, after, "/kept")
        await office.settled(2, endpoint_id=kept["id"])
        assert ids_at(receiver, "/gone") == [before]
        assert [one["id"] for one in (await office.get(ENDPOINTS))["data"]] == [kept["id"]]
        assert await office.refused("GET", path_of(made)) == NOT_FOUND
        assert await office.refused("DELETE", path_of(made)) == NOT_FOUND
        assert await office.refused("POST", path_of(made, "/enable")) == NOT_FOUND
        assert await office.deliveries(endpoint_id=made["id"]) == []
        assert await office.refused("GET", f"{DELIVERIES}/{delivered['id']}") == NOT_FOUND

    async def test_is_sent_a_test_alone_and_past_its_filter(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url("/one"), filter="name == 'never'", event_types=["key.created"])
        other = await office.endpoint(receiver.url("/two"))
        sent = await office.post(path_of(made, "/test"))
        assert sent == {"event_id": sent["event_id"], "object": "webhook_endpoint.test"}
        came = await arrival(receiver, sent["event_id"], "/one")
        assert is_signed_by(came, made["secret"])
        body = msgspec.json.decode(came.body)
        assert (body["type"], body["data"]) == ("ping", {"message": "Hello from your gateway."})
        assert [one["event_type"] for one in await office.settled(1)] == ["ping"]
        assert await office.deliveries(endpoint_id=other["id"]) == []


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _shown(made: dict[str, Any]) -> dict[str, Any]:
    return _without(made, "secret")


def _doing(endpoint: dict[str, Any]) -> dict[str, Any]:
    """How it is doing, which a worker may have written meanwhile."""
    return {"last_success_at": endpoint["last_success_at"]}


class TestASecret:
    async def test_is_rotated_with_an_overlap(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url())
        (one,) = await office.publish("one")
        assert len(v1_signatures(await arrival(receiver, one))) == 1
        rotated = await office.post(path_of(made, "/rotate_secret"))
        assert rotated["object"] == "webhook_endpoint.secret"
        assert abs(rotated["older_secret_ends_at"] - time.time() - DAY_SECONDS) < 60
        assert rotated["secret"] != made["secret"]
        (two,) = await office.publish("two")
        came = await arrival(receiver, two)
        assert len(v1_signatures(came)) == 2
        assert is_signed_by(came, made["secret"])
        assert is_signed_by(came, rotated["secret"])
        refused = await office.call("POST", path_of(made, "/rotate_secret"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "rotation_underway")
        assert rotated["secret"] not in refused.text
        ended = {"ended": True, "object": "webhook_endpoint.overlap"}
        assert await office.post(path_of(made, "/end_overlap")) == ended
        (three,) = await office.publish("three")
        came = await arrival(receiver, three)
        assert len(v1_signatures(came)) == 1
        assert is_signed_by(came, rotated["secret"])
        assert not is_signed_by(came, made["secret"])
        assert await office.post(path_of(made, "/end_overlap")) == {**ended, "ended": False}
        again = await office.post(path_of(made, "/rotate_secret"), {"secret": secret_text(b"b" * 64)})
        assert again["secret"] == secret_text(b"b" * 64)
        assert (await office.get(path_of(made, "/secret")))["secret"] == again["secret"]

    async def test_that_has_ended_signs_nothing_and_holds_up_no_rotation(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url())
        rotated = await office.post(path_of(made, "/rotate_secret"))
        query = (
            "UPDATE webhook_secrets SET not_after = now() - interval '1 second' "
            "WHERE endpoint_id = $1 AND not_after IS NOT NULL RETURNING id"
        )
        assert len(await office.place.sql(query, made["id"])) == 1
        (event_id,) = await office.publish("a")
        came = await arrival(receiver, event_id)
        assert len(v1_signatures(came)) == 1
        assert is_signed_by(came, rotated["secret"])
        third = await office.post(path_of(made, "/rotate_secret"))
        (event_id,) = await office.publish("b")
        came = await arrival(receiver, event_id)
        assert len(v1_signatures(came)) == 2
        assert is_signed_by(came, rotated["secret"])
        assert is_signed_by(came, third["secret"])

    async def test_is_shown_again(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url())
        shown = await office.get(path_of(made, "/secret"))
        expected = {"secret": made["secret"], "older_secret_ends_at": None, "object": "webhook_endpoint.secret"}
        assert shown == expected

    async def test_is_not_where_its_owner_said_so_for_good(self, office: Office, receiver: Sink) -> None:
        refusal = Refusal(403, "secret_not_revealable", None)
        never = await office.endpoint(receiver.url(), is_secret_revealable=False)
        assert never["is_secret_revealable"] is False
        assert never["secret"].startswith("whsec_")
        later = await office.endpoint(receiver.url())
        assert (await office.post(path_of(later), {"is_secret_revealable": False}))["is_secret_revealable"] is False
        for made in (never, later):
            assert await office.refused("GET", path_of(made, "/secret")) == refusal
            back = await office.post(path_of(made), {"is_secret_revealable": True})
            assert back["is_secret_revealable"] is False
            rotated = await office.post(path_of(made, "/rotate_secret"))
            assert rotated["secret"] != made["secret"]
            answer = await office.call("GET", path_of(made, "/secret"))
            assert answer.status_code == 403
            assert rotated["secret"] not in answer.text


class TestDisabled:
    async def test_events_pass_it_by_and_are_recovered_when_it_is_enabled(self, office: Office, receiver: Sink) -> None:
        since = int(time.time())
        made = await office.endpoint(receiver.url(), event_types=["key.created"], filter="starts_with(name, 'a')")
        disabled = await office.post(path_of(made, "/disable"))
        assert (disabled["status"], disabled["disabled_reason"]) == ("disabled", "owner")
        assert abs(disabled["disabled_at"] - time.time()) < 60
        missed_one, _, missed_two = await office.pass_by("a1", "b1", "a2")
        await _publish_other(office)
        assert await office.deliveries() == []
        enabled = await office.post(path_of(made, "/enable"))
        assert (enabled["status"], enabled["disabled_at"], enabled["disabled_reason"]) == ("enabled", None, None)
        recover = path_of(made, "/recover")
        counted = {"count": 2, "dry_run": True, "object": "webhook_delivery.count"}
        assert await office.post(recover, {"since": since, "dry_run": True}) == counted
        assert await office.deliveries() == []
        assert await office.post(recover, {"since": since}) == {**counted, "dry_run": False}
        await office.settled(2)
        assert sorted(ids_at(receiver)) == [missed_one, missed_two]
        assert (await office.post(recover, {"since": since}))["count"] == 0

    async def test_what_happened_before_the_moment_or_the_endpoint_is_not_recovered(
        self, office: Office, receiver: Sink
    ) -> None:
        await office.pass_by("before the endpoint")
        made = await office.endpoint(receiver.url(), event_types=["key.created"])
        await office.post(path_of(made, "/disable"))
        await office.pass_by("missed")
        await office.post(path_of(made, "/enable"))
        now = int(time.time())
        recover = path_of(made, "/recover")
        assert (await office.post(recover, {"since": now + 60, "dry_run": True}))["count"] == 0
        assert (await office.post(recover, {"since": now - 13 * DAY_SECONDS, "dry_run": True}))["count"] == 1

    async def test_nothing_can_be_sent_to_it(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url())
        await office.publish("a")
        (delivery,) = await office.settled(1)
        await office.post(path_of(made, "/disable"))
        since = {"since": int(time.time()) - 60}
        assert await office.refused("POST", path_of(made, "/test")) == DISABLED
        assert await office.refused("POST", path_of(made, "/recover"), since) == DISABLED
        assert await office.refused("POST", path_of(made, "/recover"), {**since, "dry_run": True}) == DISABLED
        assert await office.refused("POST", path_of(made, "/replay"), since) == DISABLED
        assert await office.refused("POST", f"{DELIVERIES}/{delivery['id']}/resend") == DISABLED
        assert [one["state"] for one in await office.deliveries()] == ["succeeded"]
        assert len(receiver.arrivals["/hook"]) == 1

    async def test_disabling_twice_is_as_disabling_once(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url())
        await office.endpoint(receiver.url("/other"))
        first = await office.post(path_of(made, "/disable"))
        assert await office.post(path_of(made, "/disable")) == first
        (told,) = await office.settled(1)
        assert told["event_type"] == "webhook.endpoint.disabled"


async def _publish_other(office: Office) -> None:
    """An event of another type, which every endpoint that wants it has."""
    bystander = await office.endpoint("http://127.0.0.1:9/", event_types=["webhook.endpoint.disabled"])
    await office.post(path_of(bystander, "/disable"))
    query = "SELECT id FROM webhook_events WHERE organization_id = $1 AND NOT is_fanned_out"

    async def is_fanned_out() -> bool:
        return await office.place.sql(query, office.organization_id) == []

    await eventually(is_fanned_out)


class TestSendingAgain:
    async def test_what_failed_is_recovered(self, office: Office, receiver: Sink) -> None:
        since = int(time.time())
        receiver.answers["/hook"] = lambda _: status(500)
        made = await office.endpoint(receiver.url(), event_types=["key.created"])
        (lost,) = await office.publish("lost")
        await arrival(receiver, lost)
        await _fail(office, lost)
        receiver.answers.clear()
        (taken,) = await office.publish("taken")
        await arrival(receiver, taken)
        await office.settled(2)
        assert (await office.post(path_of(made, "/recover"), {"since": since, "dry_run": True}))["count"] == 1
        assert (await office.post(path_of(made, "/recover"), {"since": since}))["count"] == 1
        await eventually(lambda: receiver.counts == {lost: 1, taken: 1})
        assert [one["state"] for one in await office.settled(2)] == ["succeeded", "succeeded"]
        assert ids_at(receiver) == [lost, taken, lost]

    async def test_one_is_sent_again_under_the_same_id_with_the_same_body(self, office: Office, receiver: Sink) -> None:
        await office.endpoint(receiver.url())
        (event_id,) = await office.publish("a")
        (delivery,) = await office.settled(1)
        again = await office.post(f"{DELIVERIES}/{delivery['id']}/resend")
        assert (again["id"], again["state"], again["attempt_count"]) == (delivery["id"], "pending", 1)
        assert again["finished_at"] is None
        await eventually(lambda: receiver.counts == {event_id: 2})
        (settled,) = await office.settled(1)
        assert (settled["state"], settled["attempt_count"]) == ("succeeded", 2)
        first, second = receiver.arrivals["/hook"]
        assert first.body == second.body

    async def test_what_a_filter_describes_is_replayed_after_a_count(self, office: Office, receiver: Sink) -> None:
        since = int(time.time())
        made = await office.endpoint(receiver.url())
        one, two = await office.publish("one", "two")
        ping = (await office.post(path_of(made, "/test")))["event_id"]
        await office.settled(3)
        await _fail(office, two)
        replay = path_of(made, "/replay")

        async def count(**more: Any) -> int:
            counted = await office.post(replay, {"since": since, "dry_run": True, **more})
            assert counted == {"count": counted["count"], "dry_run": True, "object": "webhook_delivery.count"}
            return counted["count"]

        assert await count() == 3
        assert await count(event_types=["ping"]) == 1
        assert await count(event_types=["ping", "key.created"]) == 3
        assert await count(event_types=["key.revoked"]) == 0
        assert await count(state="failed") == 1
        assert await count(state="succeeded", event_types=["key.created"]) == 1
        assert await count(until=since) == 0
        assert await count(until=since + 60) == 3
        assert await count(since=since + 60) == 0
        assert receiver.counts == {one: 1, two: 1, ping: 1}
        done = await office.post(replay, {"since": since, "event_types": ["key.created"], "state": "succeeded"})
        assert done == {"count": 1, "dry_run": False, "object": "webhook_delivery.count"}
        await eventually(lambda: receiver.counts == {one: 2, two: 1, ping: 1})
        assert {found["state"] for found in await office.settled(3)} == {"succeeded", "failed"}

    async def test_of_one_endpoint_is_not_sent_to_another(self, office: Office, receiver: Sink) -> None:
        made = await office.endpoint(receiver.url("/one"))
        await office.endpoint(receiver.url("/two"))
        (event_id,) = await office.publish("a")
        await office.settled(2)
        assert (await office.post(path_of(made, "/replay"), {"since": int(time.time()) - 60}))["count"] == 1
        await eventually(lambda: receiver.counts == {event_id: 3})
        assert (len(receiver.arrivals["/one"]), len(receiver.arrivals["/two"])) == (2, 1)


async def _fail(office: Office, event_id: str) -> None:
    """Let the deliveries of an event, once they were tried, have been given up."""
    query = (
        "UPDATE webhook_deliveries SET state = 'failed', finished_at = now() "
        "WHERE event_id = $1 AND attempts > 0 RETURNING id"
    )

    async def failed() -> bool:
        return await office.place.sql(query, event_id) != []

    await eventually(failed)


class TestDeliveries:
    async def test_are_listed_by_filters_in_pages(self, office: Office, receiver: Sink) -> None:
        receiver.answers["/two"] = lambda _: status(503)
        one = await office.endpoint(receiver.url("/one"))
        two = await office.endpoint(receiver.url("/two"), event_types=["key.created"])
        published = await office.publish("a", "b", "c")
        await office.post(path_of(one, "/test"))
        await office.settled(4, endpoint_id=one["id"])
        await eventually(lambda: len(receiver.arrivals["/two"]) == 3)
        assert len(await office.deliveries()) == 7
        assert len(await office.deliveries(endpoint_id=two["id"])) == 3
        assert len(await office.deliveries(event_type="ping")) == 1
        assert len(await office.deliveries(event_type="key.created", endpoint_id=one["id"])) == 3
        assert len(await office.deliveries(state="succeeded")) == 4
        assert {found["endpoint_id"] for found in await office.deliveries(state="pending")} == {two["id"]}
        assert await office.deliveries(state="failed") == []
        page = await office.get(DELIVERIES, endpoint_id=two["id"], limit=2)
        rest = await office.get(DELIVERIES, endpoint_id=two["id"], limit=2, after=page["last_id"])
        assert (page["has_more"], rest["has_more"]) == (True, False)
        assert (page["first_id"], rest["first_id"]) == (page["data"][0]["id"], rest["data"][0]["id"])
        assert [found["event_id"] for found in page["data"] + rest["data"]] == published[::-1]

    async def test_show_their_event_and_every_attempt(self, office: Office, receiver: Sink) -> None:
        answers = [status(500, b"broken"), status(200, b"thanks")]
        receiver.answers["/hook"] = lambda _: answers.pop(0)
        made = await office.endpoint(receiver.url())
        (event_id,) = await office.publish("a")
        came = await arrival(receiver, event_id)
        (delivery,) = await eventually(lambda: _tried(office))
        assert (delivery["state"], delivery["last_status"], delivery["last_problem"]) == (
            "pending",
            500,
            "answered 500",
        )
        assert 3 <= delivery["next_attempt_at"] - came.at <= 7
        await office.post(f"{DELIVERIES}/{delivery['id']}/resend")
        await office.settled(1)
        shown = await office.get(f"{DELIVERIES}/{delivery['id']}")
        assert (shown["endpoint_id"], shown["event_id"], shown["event_type"]) == (made["id"], event_id, "key.created")
        assert (shown["state"], shown["attempt_count"], shown["last_status"]) == ("succeeded", 2, 200)
        assert (shown["next_attempt_at"], shown["last_problem"]) == (None, None)
        assert shown["event"] == msgspec.json.decode(came.body)
        assert [(one["status"], one["problem"], one["response_body"]) for one in shown["attempts"]] == [
            (500, "answered 500", "broken"),
            (200, None, "thanks"),
        ]
        for one in shown["attempts"]:
            assert one.keys() >= {"id", "duration_ms", "started_at"}
            assert one["object"] == "webhook_delivery.attempt"

    async def test_say_why_nothing_was_answered(self, office: Office) -> None:
        await office.endpoint("http://127.0.0.1:9/")
        await office.publish("a")
        (delivery,) = await eventually(lambda: _tried(office))
        assert delivery["last_status"] is None
        assert delivery["last_problem"] == "the connection was refused, or the host not reached"


async def _tried(office: Office) -> list[dict[str, Any]]:
    return [one for one in await office.deliveries() if one["attempt_count"] > 0]


async def test_every_type_of_event_has_a_schema_and_an_example_that_fits(office: Office) -> None:
    listed = await office.get("/v1/webhook_event_types")
    assert listed["object"] == "list"
    kinds = {one["name"]: one for one in listed["data"]}
    assert len(kinds) == len(listed["data"]) == 14
    assert [name for name, one in kinds.items() if one["must_be_named"]] == ["chat.completed"]
    for name, one in kinds.items():
        Draft202012Validator.check_schema(one["schema"])
        Draft202012Validator(one["schema"]).validate(one["example"]["data"])
        assert (one["object"], one["example"]["type"]) == ("webhook_event_type", name)


async def test_every_type_that_is_listed_can_be_asked_for(office: Office, receiver: Sink) -> None:
    names = [one["name"] for one in (await office.get("/v1/webhook_event_types"))["data"] if one["name"] != "ping"]
    made = await office.endpoint(receiver.url(), event_types=["*", *names])
    assert made["event_types"] == ["*", *names]


async def test_anybody_may_read_the_public_keys(place: Place) -> None:
    async with httpx.AsyncClient(base_url=place.gateway.url) as client:
        answer = await client.get("/.well-known/webhook-keys.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {"keys": PlatformKeys((SEED,)).published()}
    assert "d" not in answer.json()["keys"][0]
