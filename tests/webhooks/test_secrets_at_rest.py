"""Signing secrets and customers' own headers: nowhere in the clear, and nothing is sent without them."""

from __future__ import annotations

from base64 import b64decode, b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from core.sealing import SealBroken
from core.settings import SealingKey
from tests.harness.eventually import eventually
from tests.harness.stores import TestStores
from tests.harness.webhook_place import SEALER, SEALING_KEYS, WorkerProcess, worker
from tests.harness.webhook_sink import Sink
from tests.webhooks.office import ENDPOINTS, Office, Place, Refusal, is_signed_by, office_at, webhook_place
from webhooks.signing import secret_text
from webhooks.vault import open_headers, secret_place

UNREADABLE = Refusal(503, "webhook_secret_unreadable", None)
BROUGHT = bytes(range(200, 232))
CREDENTIAL = "Bearer planted-credential-7Qx"


@pytest.fixture(scope="module")
async def place(stores: TestStores, template: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    async with webhook_place(stores, template, tmp_path_factory.mktemp("rest")) as made:
        yield made


@pytest.fixture
async def office(place: Place) -> AsyncIterator[Office]:
    async with office_at(place) as made:
        yield made


def spellings(secret: bytes) -> list[str]:
    """A secret as it could stand in a text, or in the hexadecimal digits of bytes that hold such a text."""
    encoded = b64encode(secret).decode()
    plain = [secret_text(secret), encoded, urlsafe_b64encode(secret).decode(), secret.hex()]
    return [*plain, *(one.rstrip("=").encode().hex() for one in plain)]


async def test_nothing_is_kept_or_logged_in_the_clear(place: Place, receiver: Sink, workdir: Path) -> None:
    process = WorkerProcess(place.stores, workdir)
    process._environ["AAP_LOG_LEVEL"] = "debug"
    async with office_at(place) as office:
        made = await office.endpoint(receiver.url(), headers={"authorization": CREDENTIAL})
        brought = await office.endpoint(receiver.url("/two"), secret=secret_text(BROUGHT))
        await office.post(f"{ENDPOINTS}/{brought['id']}", {"headers": {"x-token": CREDENTIAL}})
        rotated = await office.post(f"{ENDPOINTS}/{made['id']}/rotate_secret")
        shown = await office.get(f"{ENDPOINTS}/{made['id']}/secret")
        assert shown["secret"] == rotated["secret"]
        await process.start()
        await office.publish("a")
        await eventually(lambda: sum(receiver.counts.values()) == 2, 20)
        await office.settled(2)
        assert await process.stop() == 0
        listed = await office.call("GET", ENDPOINTS)
    assert receiver.arrivals["/hook"][0].headers["authorization"] == CREDENTIAL
    secrets = [b64decode(one["secret"].removeprefix("whsec_")) for one in (made, rotated)] + [BROUGHT]
    dump = await place.dump()
    tables = "\n".join(row for rows in dump.values() for row in rows)
    assert {name for name, rows in dump.items() if rows} >= {"webhook_endpoints", "webhook_secrets", "webhook_attempts"}
    # Bytes are shown as hexadecimal digits: what is looked for would be found.
    assert SEALING_KEYS[0].id.encode().hex() in "".join(dump["webhook_secrets"])
    assert "webhooks.started" in process.log
    assert "request.ended" in place.gateway.log
    for text in (tables, process.log, place.gateway.log, listed.text):
        for secret in secrets:
            assert not [one for one in spellings(secret) if one in text]
        assert CREDENTIAL not in text
        assert CREDENTIAL.encode().hex() not in text
        assert "planted-credential" not in text


async def test_the_key_that_seals_is_nowhere_either(place: Place, office: Office) -> None:
    await office.endpoint("http://127.0.0.1:9/", headers={"authorization": CREDENTIAL})
    tables = "\n".join(row for rows in (await place.dump()).values() for row in rows)
    key = SEALING_KEYS[0].key
    for text in (tables, place.gateway.log):
        assert key.hex() not in text
        assert b64encode(key).decode() not in text


async def sealed_of(place: Place, endpoint: dict[str, Any]) -> Any:
    (row,) = await place.sql(
        "SELECT id, organization_id, sealed FROM webhook_secrets WHERE endpoint_id = $1", endpoint["id"]
    )
    return row


async def move_secret(place: Place, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Put *one*'s sealed secret where *other*'s is."""
    await place.sql(
        "UPDATE webhook_secrets SET sealed = (SELECT sealed FROM webhook_secrets WHERE endpoint_id = $1) "
        "WHERE endpoint_id = $2",
        one["id"],
        other["id"],
    )


class TestMoved:
    async def test_a_secret_opens_in_its_own_row_alone(self, place: Place, office: Office) -> None:
        one, other = [await office.endpoint("http://127.0.0.1:9/") for _ in range(2)]
        row = await sealed_of(place, one)
        opened = SEALER.open(row.sealed, secret_place(row.organization_id, row.id))
        assert secret_text(opened) == one["secret"]
        there = await sealed_of(place, other)
        with pytest.raises(SealBroken, match="moved"):
            SEALER.open(row.sealed, secret_place(there.organization_id, there.id))
        with pytest.raises(SealBroken, match="moved"):
            SEALER.open(row.sealed, secret_place("org_other", row.id))

    async def test_a_secret_is_not_shown_in_another_row(self, place: Place, office: Office) -> None:
        one, other = [await office.endpoint("http://127.0.0.1:9/") for _ in range(2)]
        await move_secret(place, one, other)
        answer = await office.call("GET", f"{ENDPOINTS}/{other['id']}/secret")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == UNREADABLE
        assert one["secret"] not in answer.text
        assert (await office.get(f"{ENDPOINTS}/{one['id']}/secret"))["secret"] == one["secret"]
        assert "webhooks.secret_unreadable" in place.gateway.log

    async def test_nor_in_another_organizations(self, place: Place, office: Office) -> None:
        async with office_at(place) as thief:
            mine, stolen = await thief.endpoint("http://127.0.0.1:9/"), await office.endpoint("http://127.0.0.1:9/")
            await move_secret(place, stolen, mine)
            assert await thief.refused("GET", f"{ENDPOINTS}/{mine['id']}/secret") == UNREADABLE

    async def test_nothing_is_sent_unsigned(self, place: Place, office: Office, receiver: Sink, workdir: Path) -> None:
        """Guarantee: an endpoint whose secret cannot be read gets nothing, loses nothing, and holds up nobody."""
        well = await office.endpoint(receiver.url("/well"))
        broken = await office.endpoint(receiver.url("/broken"))
        await move_secret(place, well, broken)
        process = WorkerProcess(place.stores, workdir)
        await process.start()
        (event_id,) = await office.publish("a")
        await eventually(lambda: "webhooks.secret_unreadable" in process.log, 20)
        await office.settled(1, endpoint_id=well["id"])
        (later,) = await office.publish("b")
        await office.settled(2, endpoint_id=well["id"])
        assert await process.stop() == 0
        assert receiver.counts == {event_id: 1, later: 1}
        assert list(receiver.arrivals) == ["/well"]
        assert all(is_signed_by(one, well["secret"]) for one in receiver.arrivals["/well"])
        waiting = await office.deliveries(endpoint_id=broken["id"])
        assert [(one["state"], one["attempt_count"]) for one in waiting] == [("pending", 0)] * 2
        assert broken["id"] in process.log
        assert well["secret"] not in process.log

    async def test_headers_open_at_their_own_endpoint_alone(self, place: Place, office: Office) -> None:
        one, other = [await office.endpoint("http://127.0.0.1:9/", headers={"x": CREDENTIAL}) for _ in range(2)]
        query = "SELECT organization_id, sealed_headers FROM webhook_endpoints WHERE id = $1"
        (row,) = await place.sql(query, one["id"])
        owner = {"organization_id": row.organization_id}
        assert open_headers(SEALER, row.sealed_headers, endpoint_id=one["id"], **owner) == {"x": CREDENTIAL}
        with pytest.raises(SealBroken, match="moved"):
            open_headers(SEALER, row.sealed_headers, endpoint_id=other["id"], **owner)
        move = "UPDATE webhook_endpoints SET sealed_headers = $1 WHERE id = $2"
        await place.sql(move, row.sealed_headers, other["id"])
        # Neither it nor the others are hidden by that.
        assert (await office.get(f"{ENDPOINTS}/{other['id']}"))["header_names"] is None
        listed = {found["id"]: found["header_names"] for found in (await office.get(ENDPOINTS))["data"]}
        assert (listed[one["id"]], listed[other["id"]]) == (["x"], None)
        # New ones need none of the old.
        mended = await office.post(f"{ENDPOINTS}/{other['id']}", {"headers": {"y": "1"}})
        assert mended["header_names"] == ["y"]
        assert (await office.get(f"{ENDPOINTS}/{other['id']}"))["header_names"] == ["y"]


async def test_what_is_changed_by_a_bit_is_unreadable(place: Place, office: Office) -> None:
    made = await office.endpoint("http://127.0.0.1:9/")
    row = await sealed_of(place, made)
    for at in (0, 2, len(row.sealed) // 2, len(row.sealed) - 1):
        changed = bytes(byte ^ (1 if index == at else 0) for index, byte in enumerate(row.sealed))
        await place.sql("UPDATE webhook_secrets SET sealed = $1 WHERE id = $2", changed, row.id)
        assert await office.refused("GET", f"{ENDPOINTS}/{made['id']}/secret") == UNREADABLE
    await place.sql("UPDATE webhook_secrets SET sealed = $1 WHERE id = $2", row.sealed, row.id)
    assert (await office.get(f"{ENDPOINTS}/{made['id']}/secret"))["secret"] == made["secret"]


async def test_what_was_waiting_for_its_secret_is_sent_by_a_worker_that_can_read_it(
    place: Place, office: Office, receiver: Sink, workdir: Path
) -> None:
    made = await office.endpoint(receiver.url())
    process = WorkerProcess(place.stores, workdir)
    process._environ["AAP_SEALING_KEYS"] = f"other:{SealingKey('other', bytes(32)).key.hex()}"
    await process.start()
    (event_id,) = await office.publish("a")
    await eventually(lambda: made["id"] in process.log, 20)
    assert await process.stop() == 0
    assert receiver.arrivals == {}
    async with worker(place.stores.database_url):
        await eventually(lambda: receiver.counts == {event_id: 1})
    assert is_signed_by(receiver.arrivals["/hook"][0], made["secret"])
