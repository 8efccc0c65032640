"""`aap webhooks` as an operator runs it, with a worker that delivers."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.plain_sql import fetch
from tests.gateway.test_cli import Cli, Ran
from tests.harness.eventually import eventually
from tests.harness.webhook_place import EGRESS, SEALING_KEYS, WorkerProcess, publish_many, worker
from tests.harness.webhook_sink import Arrival, Sink
from tests.webhooks.conftest import Own
from tests.webhooks.office import SEALING, is_signed_by, v1_signatures
from webhooks.signing import secret_text

NEW_SEALING = f"new:{bytes(range(100, 132)).hex()}"
NOBODY = "whe_" + "0" * 26


class Webhooks:
    """`aap webhooks …`."""

    def __init__(self, aap: Cli, own: Own) -> None:
        self.aap, self.own = aap, own

    async def __call__(self, *arguments: str, **environ: str) -> Ran:
        return await self.aap("webhooks", *arguments, **environ)

    async def json(self, *arguments: str, **environ: str) -> Any:
        ran = await self(*arguments, "--json", **environ)
        assert ran.err == ""
        return ran.json()

    async def error(self, *arguments: str, **environ: str) -> tuple[int, str]:
        """The exit code and the message of what fails with --json; nothing is on standard output."""
        ran = await self(*arguments, "--json", **environ)
        assert ran.out == ""
        return ran.code, ran.json_error()

    async def settled(self, count: int) -> list[dict[str, Any]]:
        async def found() -> list[dict[str, Any]] | None:
            seen = await self.json("deliveries")
            return seen if len(seen) == count and all(one["state"] != "pending" for one in seen) else None

        return await eventually(found, 30)

    async def publish(self) -> str:
        """Tell of a key that was made."""
        (event_id,) = await publish_many(self.own.database, [self.own.organization_id])
        return event_id


@pytest.fixture
def webhooks(own: Own, tmp_path: Path) -> Webhooks:
    (tmp_path / "aap.toml").write_text(EGRESS)
    return Webhooks(Cli(tmp_path, {**own.stores.environ(), "AAP_SEALING_KEYS": SEALING}), own)


async def arrival(receiver: Sink, event_id: str, path: str = "/hook", timeout_seconds: float = 5) -> Arrival:
    def came() -> list[Arrival]:
        return [one for one in receiver.arrivals[path] if one.headers["webhook-id"] == event_id]

    return (await eventually(came, timeout_seconds))[-1]


def moment(ago: timedelta = timedelta()) -> str:
    return f"{datetime.now(UTC) - ago:%Y-%m-%dT%H:%M:%S}"


class TestAnEndpoint:
    async def test_through_its_life_in_json(self, webhooks: Webhooks, receiver: Sink) -> None:
        assert await webhooks.json("list") == []
        options = ("--event", "key.created", "--event", "key.revoked", "--filter", "name", "--rate", "50")
        headers = ("--header", "X-One: 1", "--header", "authorization: Bearer a:b")
        made = await webhooks.json("create", receiver.url(), *options, *headers, "--description", "orders")
        assert made.keys() == {"endpoint", "secret"}
        endpoint = made["endpoint"]
        assert (endpoint["url"], endpoint["filter"], endpoint["description"]) == (receiver.url(), "name", "orders")
        assert endpoint["event_types"] == ["key.created", "key.revoked"]
        assert (endpoint["requests_per_second"], endpoint["header_names"]) == (50, ["authorization", "x-one"])
        assert await webhooks.json("list") == [endpoint]
        assert await webhooks.json("show", endpoint["id"]) == endpoint
        async with worker(webhooks.own.url):
            came = await arrival(receiver, await webhooks.publish())
            assert is_signed_by(came, made["secret"])
            assert (came.headers["x-one"], came.headers["authorization"]) == ("1", "Bearer a:b")
            changes = ("--url", receiver.url("/new"), "--event", "*", "--filter", "", "--rate", "0")
            changed = await webhooks.json("update", endpoint["id"], *changes, "--header", "x-two: 2")
            assert (changed["url"], changed["event_types"]) == (receiver.url("/new"), ["*"])
            assert (changed["filter"], changed["requests_per_second"]) == (None, None)
            assert (changed["header_names"], changed["description"]) == (["x-two"], "orders")
            came = await arrival(receiver, await webhooks.publish(), "/new")
            assert came.headers["x-two"] == "2"
            assert "x-one" not in came.headers
            await webhooks.settled(2)
        assert await webhooks.json("delete", endpoint["id"]) == {"id": endpoint["id"], "deleted": True}
        assert await webhooks.json("list") == []
        assert await webhooks.error("show", endpoint["id"]) == (1, "No such webhook endpoint or delivery.")

    async def test_in_words(self, webhooks: Webhooks, receiver: Sink) -> None:
        assert (await webhooks("list")).out.strip() == "There is no endpoint."
        made = (await webhooks("create", receiver.url(), "--secret", secret_text(b"s" * 32))).out
        found = re.search(r"(whe_\w+) is made", made)
        assert found
        endpoint_id = found[1]
        assert secret_text(b"s" * 32) in made
        for arguments in (
            ("list",),
            ("show", endpoint_id),
            ("update", endpoint_id, "--description", "d"),
            ("disable", endpoint_id),
            ("enable", endpoint_id),
        ):
            ran = await webhooks(*arguments)
            assert (ran.code, ran.err) == (0, "")
            assert endpoint_id in ran.out
            assert receiver.url() in ran.out
            assert ("disabled" if arguments[0] == "disable" else "enabled") in ran.out
        assert (await webhooks("delete", endpoint_id)).out == f"{endpoint_id} is deleted.\n"

    async def test_disabled_by_the_operator_and_enabled(self, webhooks: Webhooks, receiver: Sink) -> None:
        endpoint_id = (await webhooks.json("create", receiver.url(), "--event", "key.created"))["endpoint"]["id"]
        disabled = await webhooks.json("disable", endpoint_id)
        assert disabled["disabled_reason"] == "operator"
        assert disabled["disabled_at"] is not None
        told = "This endpoint is disabled. Enable it first."
        for arguments in (
            ("test", endpoint_id),
            ("recover", endpoint_id, "--since", moment()),
            ("replay", endpoint_id, "--since", moment()),
        ):
            assert await webhooks.error(*arguments) == (1, told)
        since = moment(timedelta(minutes=1))
        missed = await webhooks.publish()
        async with worker(webhooks.own.url):
            query = "SELECT id FROM webhook_events WHERE id = $1 AND is_fanned_out"
            await eventually(lambda: _sql(webhooks.own, query, missed))
            enabled = await webhooks.json("enable", endpoint_id)
            assert (enabled["disabled_at"], enabled["disabled_reason"]) == (None, None)
            recover = ("recover", endpoint_id, "--since", since)
            assert await webhooks.json(*recover, "--dry-run") == {"count": 1, "dry_run": True}
            assert (await webhooks(*recover, "--dry-run")).out == "1 deliveries would be sent.\n"
            assert receiver.arrivals == {}
            assert (await webhooks(*recover)).out == "1 deliveries are sent.\n"
            await arrival(receiver, missed)
            await webhooks.settled(1)
            assert await webhooks.json(*recover) == {"count": 0, "dry_run": False}
        assert receiver.counts == {missed: 1}


async def _sql(own: Own, statement: str, *arguments: object) -> list[Any]:
    async with own.database.transaction() as session:
        return await fetch(session, statement, *arguments)


class TestASecret:
    async def test_is_rotated_and_revealed(self, webhooks: Webhooks, receiver: Sink) -> None:
        made = await webhooks.json("create", receiver.url())
        endpoint_id, first = made["endpoint"]["id"], made["secret"]
        assert await webhooks.json("reveal", endpoint_id) == {"secret": first, "older_secret_ends_at": None}
        rotated = await webhooks.json("rotate", endpoint_id)
        ends_in = datetime.fromisoformat(rotated["older_secret_ends_at"]) - datetime.now(UTC)
        assert timedelta(hours=23, minutes=59) < ends_in <= timedelta(hours=24)
        second = rotated["secret"]
        assert second != first
        assert (await webhooks("reveal", endpoint_id)).out == f"{second}\n"
        async with worker(webhooks.own.url):
            came = await arrival(receiver, await webhooks.publish())
            assert len(v1_signatures(came)) == 2
            assert is_signed_by(came, first)
            assert is_signed_by(came, second)
            code, told = await webhooks.error("rotate", endpoint_id)
            assert (code, told.startswith("This endpoint's secret was rotated")) == (1, True)
            assert await webhooks.json("end-overlap", endpoint_id) == {"ended": True}
            assert (await webhooks("end-overlap", endpoint_id)).out == "There was no older secret.\n"
            came = await arrival(receiver, await webhooks.publish())
            assert len(v1_signatures(came)) == 1
            assert is_signed_by(came, second)
        third = secret_text(b"t" * 32)
        words = (await webhooks("rotate", endpoint_id, "--secret", third)).out
        assert words.startswith(f"{third}\nThe older one signs, too, until ")
        assert (await webhooks("end-overlap", endpoint_id)).out == "The older secret is ended.\n"

    async def test_is_not_shown_where_its_owner_said_so(self, webhooks: Webhooks, receiver: Sink) -> None:
        made = await webhooks.json("create", receiver.url())
        await _sql(webhooks.own, "UPDATE webhook_endpoints SET is_secret_revealable = false")
        told = "This endpoint's secret is not shown again. Rotate it to get one that you can see."
        assert await webhooks.error("reveal", made["endpoint"]["id"]) == (1, told)

    async def test_is_sealed_anew_so_that_an_older_key_can_be_taken_away(
        self, webhooks: Webhooks, receiver: Sink, workdir: Path
    ) -> None:
        one = await webhooks.json("create", receiver.url("/one"), "--header", "x-token: t-1")
        two = await webhooks.json("create", receiver.url("/two"))
        older = two["secret"]
        newer = (await webhooks.json("rotate", two["endpoint"]["id"]))["secret"]
        both = {"AAP_SEALING_KEYS": f"{NEW_SEALING},{SEALING}"}
        only_new = {"AAP_SEALING_KEYS": NEW_SEALING}
        code, told = await webhooks.error("reveal", one["endpoint"]["id"], **only_new)
        assert code == 1
        assert told == "a secret cannot be read: the sealing key 'test' is not among AAP_SEALING_KEYS"
        listed = await webhooks("list", "--json", **only_new)
        assert [found["header_names"] for found in msgspec.json.decode(listed.out)] == [[], None]
        assert "the sealing key 'test' is not among AAP_SEALING_KEYS" in listed.err
        assert await webhooks.error("reseal", **only_new) == (1, told)
        assert await webhooks.json("reseal", **both) == {"secrets": 3, "headers": 1}
        said = "0 secrets and the headers of 0 endpoints are sealed anew.\n"
        assert (await webhooks("reseal", **both)).out == said
        shown = await webhooks.json("reveal", two["endpoint"]["id"], **only_new)
        assert shown["secret"] == newer
        assert [found["header_names"] for found in await webhooks.json("list", **only_new)] == [[], ["x-token"]]
        process = WorkerProcess(webhooks.own.stores, workdir)
        process._environ.update(only_new)
        await process.start()
        event_id = await webhooks.publish()
        at_one, at_two = [await arrival(receiver, event_id, path, 20) for path in ("/one", "/two")]
        assert await process.stop() == 0
        assert is_signed_by(at_one, one["secret"])
        assert at_one.headers["x-token"] == "t-1"
        assert len(v1_signatures(at_two)) == 2
        assert is_signed_by(at_two, older)
        assert is_signed_by(at_two, newer)
        assert SEALING_KEYS[0].id.encode() not in await _sealed(webhooks.own)


async def _sealed(own: Own) -> bytes:
    """Everything that is kept sealed; in front of each stands the id of its key."""
    rows = await _sql(own, "SELECT sealed FROM webhook_secrets UNION ALL SELECT sealed_headers FROM webhook_endpoints")
    return b"".join(row.sealed[:8] for row in rows if row.sealed is not None)


async def test_deliveries_are_looked_at_and_sent_again(webhooks: Webhooks, receiver: Sink) -> None:
    assert (await webhooks("deliveries")).out.strip() == "Nothing was sent."
    endpoint_id = (await webhooks.json("create", receiver.url()))["endpoint"]["id"]
    since = moment(timedelta(minutes=1))
    async with worker(webhooks.own.url):
        event_id = await webhooks.publish()
        ping = (await webhooks.json("test", endpoint_id))["event_id"]
        assert f"aap webhooks deliveries --endpoint {endpoint_id}" in (await webhooks("test", endpoint_id)).out
        await webhooks.settled(3)
        of_type = ("--endpoint", endpoint_id, "--event", "key.created", "--state", "succeeded")
        (delivery,) = await webhooks.json("deliveries", *of_type)
        assert (delivery["event_id"], delivery["attempts"], delivery["last_status"]) == (event_id, 1, 200)
        assert len(await webhooks.json("deliveries", "--limit", "2")) == 2
        assert await webhooks.json("deliveries", "--state", "failed") == []
        assert ping in {one["event_id"] for one in await webhooks.json("deliveries", "--event", "ping")}
        assert delivery["id"] in (await webhooks("deliveries")).out
        shown = await webhooks.json("delivery", delivery["id"])
        assert shown.keys() == {"delivery", "event", "attempts"}
        assert (shown["delivery"], shown["event"]["id"]) == (delivery, event_id)
        assert [(one["status"], one["problem"]) for one in shown["attempts"]] == [(200, None)]
        words = (await webhooks("delivery", delivery["id"])).out
        assert delivery["id"] in words
        assert "200" in words
        resent = await webhooks.json("resend", delivery["id"])
        assert resent == {"id": delivery["id"], "state": "pending"}
        await eventually(lambda: receiver.counts[event_id] == 2)
        await webhooks.settled(3)
        replay = ("replay", endpoint_id, "--since", since, "--event", "key.created", "--state", "succeeded")
        assert await webhooks.json(*replay, "--dry-run") == {"count": 1, "dry_run": True}
        assert (await webhooks(*replay, "--dry-run")).out == "1 deliveries would be sent again.\n"
        assert await webhooks.json(*replay, "--until", since, "--dry-run") == {"count": 0, "dry_run": True}
        assert (await webhooks(*replay)).out == "1 deliveries are sent again.\n"
        await eventually(lambda: receiver.counts[event_id] == 3)
        assert receiver.counts[ping] == 1


async def test_the_status_counts_workers_endpoints_and_what_is_due(webhooks: Webhooks, receiver: Sink) -> None:
    endpoint_id = (await webhooks.json("create", receiver.url()))["endpoint"]["id"]
    await webhooks.json("disable", (await webhooks.json("create", receiver.url("/off")))["endpoint"]["id"])
    query = "UPDATE webhook_endpoints SET failing_since = now(), last_problem = 'answered 500' WHERE id = $1"
    await _sql(webhooks.own, query, endpoint_id)
    found = await webhooks.json("status")
    counts = {"workers": 0, "events_waiting": 1, "pending": 0, "due": 0, "enabled": 1, "failing": 1, "disabled": 1}
    assert found["status"] == {**counts, "oldest_due_at": None}
    assert [(one["id"], one["last_problem"]) for one in found["troubled"]] == [(endpoint_id, "answered 500")]
    async with worker(webhooks.own.url):
        await eventually(lambda: receiver.counts)
        assert (await webhooks.json("status"))["status"]["workers"] == 1
    words = (await webhooks("status")).out
    assert "disabled" in words
    assert endpoint_id not in words


async def test_types_of_events_are_listed(webhooks: Webhooks) -> None:
    listed = await webhooks.json("events")
    assert len(listed) == 14
    words = (await webhooks("events")).out
    assert all(one["name"] in words and one["description"] in words for one in listed)


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("show", NOBODY),
            ("update", NOBODY, "--description", "x"),
            ("delete", NOBODY),
            ("rotate", NOBODY),
            ("end-overlap", NOBODY),
            ("reveal", NOBODY),
            ("test", NOBODY),
            ("enable", NOBODY),
            ("disable", NOBODY),
            ("recover", NOBODY, "--since", moment()),
            ("replay", NOBODY, "--since", moment()),
            ("deliveries", "--endpoint", NOBODY),
            ("delivery", "dlv_" + "0" * 26),
            ("resend", "dlv_" + "0" * 26),
        ],
        ids=lambda arguments: arguments[0],
    )
    async def test_what_does_not_exist(self, webhooks: Webhooks, arguments: tuple[str, ...]) -> None:
        assert await webhooks.error(*arguments) == (1, "No such webhook endpoint or delivery.")

    @pytest.mark.parametrize(
        ("arguments", "code", "named"),
        [
            (("create", "http://10.0.0.1/"), 1, "10.0.0.1 is not a public address"),
            (("create", "http://127.0.0.1:9/", "--event", "nonsense"), 1, "'nonsense' is none"),
            (("create", "http://127.0.0.1:9/", "--filter", "name =="), 1, "Invalid 'filter'"),
            (("create", "http://127.0.0.1:9/", "--header", "hunter2"), 1, "a header is written as"),
            (("create", "http://127.0.0.1:9/", "--header", "webhook-id: hunter2"), 1, "is set by us"),
            (("create", "http://127.0.0.1:9/", "--secret", "hunter2"), 1, "expected whsec_"),
            (("create", "http://127.0.0.1:9/", "--rate", "0"), 2, "--rate"),
            (("create",), 2, "URL"),
            (("create", "http://127.0.0.1:9/", "--org", "org_nope"), 1, "No such organization."),
            (("list", "--org", "org_nope"), 1, "No such organization."),
            (("rotate", NOBODY, "--secret", "hunter2"), 1, "expected whsec_"),
            (("recover", NOBODY), 2, "--since"),
            (("recover", NOBODY, "--since", "yesterday"), 2, "yesterday"),
            (("replay", NOBODY, "--since", "2026-01-01", "--state", "lost"), 2, "lost"),
            (("deliveries", "--limit", "0"), 2, "--limit"),
        ],
    )
    async def test_is_one_json_object_that_repeats_no_secret(
        self, webhooks: Webhooks, arguments: tuple[str, ...], code: int, named: str
    ) -> None:
        found, told = await webhooks.error(*arguments)
        assert found == code
        assert named in told
        assert "hunter2" not in told
        if any("hunter2" in one for one in arguments):
            plain = await webhooks(*arguments)
            assert (plain.code, plain.out) == (code, "")
            assert "hunter2" not in plain.err

    async def test_going_back_too_far(self, webhooks: Webhooks, receiver: Sink) -> None:
        endpoint_id = (await webhooks.json("create", receiver.url()))["endpoint"]["id"]
        too_far = moment(timedelta(days=15))
        for act in ("recover", "replay"):
            told = (1, "Invalid 'since': it is more than 14 days ago.")
            assert await webhooks.error(act, endpoint_id, "--since", too_far) == told

    async def test_without_a_sealing_key(self, webhooks: Webhooks) -> None:
        told = "Webhooks are not set up here: the operator has set no AAP_SEALING_KEYS."
        for arguments in (("create", "http://127.0.0.1:9/"), ("list",), ("reseal",)):
            assert await webhooks.error(*arguments, AAP_SEALING_KEYS="") == (1, told)
