"""One try to deliver: the request as it is signed and sent, and what came of it."""

from __future__ import annotations

import asyncio
import errno
from datetime import datetime
from typing import Final, NamedTuple

from core.clock import Clock
from core.egress import Destination, EgressPolicy, EgressRefused, check_url
from core.http import GuardedClient
from core.http1.errors import (
    ConnectFailed,
    ConnectionLost,
    ConnectTimedOut,
    FirstByteTimedOut,
    ProtocolViolated,
    UpstreamError,
)
from core.http1.messages import Deadlines, Origin, UpstreamRequest
from core.http1.response import Http1Response
from core.version import VERSION
from webhooks.schedule import retry_after_seconds
from webhooks.signing import PlatformKeys, sign
from webhooks.targets import Target

# Standard Webhooks 1.0: 15 to 30 s for an answer.
ANSWER_SECONDS_MAX: Final = 15.0
DEADLINES: Final = Deadlines(
    connect_seconds=5.0,
    first_byte_seconds=ANSWER_SECONDS_MAX,
    idle_seconds=ANSWER_SECONDS_MAX,
    total_seconds=ANSWER_SECONDS_MAX + 5.0,
)
# The status is what counts. What is kept of the rest helps whoever looks for a fault, and gets no more time than this.
RESPONSE_BYTES_MAX: Final = 16_384
_BODY_SECONDS_MAX: Final = 2.0
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE})
_FIXED_HEADERS: Final = (
    (b"content-type", b"application/json"),
    (b"accept", b"*/*"),
    (b"user-agent", f"aap-webhooks/{VERSION}".encode()),
)


class Message(NamedTuple):
    """What is delivered: the event's id, which is `webhook-id`, and its body."""

    event_id: str
    body: bytes


class Outcome(NamedTuple):
    """What came of an attempt. None of *problem*: it was taken."""

    status: int | None
    problem: str | None
    duration_ms: int
    response_body: bytes | None
    retry_after_seconds: float | None
    started_at: datetime
    is_ours: bool = False
    """Whether it failed for a reason of our own: that says nothing of the endpoint, and uses up no attempt."""


class Sender:
    """Sends webhooks, every one through the guard."""

    def __init__(self, client: GuardedClient, keys: PlatformKeys, clock: Clock) -> None:
        self._client = client
        self._keys = keys
        self._clock = clock

    async def attempt(self, target: Target, message: Message, policy: EgressPolicy) -> Outcome:
        """Send *message* to *target* once. Whatever goes wrong is in the outcome, in words for the endpoint's owner."""
        started_at, started = self._clock.now(), self._clock.monotonic_seconds()
        status: int | None = None
        body: bytes | None = None
        wait: float | None = None
        is_ours = False
        try:
            # Under the policy of this moment: it may have changed since the address was typed.
            request = self._request(target, message, check_url(target.url, policy), started_at)
            response = await self._client.send(request, DEADLINES)
            status = response.status
            wait = _retry_after(response, started_at)
            problem = problem_of(status)
            body = await _read_some(response)
        except EgressRefused as error:
            problem = f"refused: {error}"
        except UpstreamError as error:
            is_ours = _is_ours(error)
            problem = "there was no connection to spare here" if is_ours else _words_for(error)
        duration_ms = int((self._clock.monotonic_seconds() - started) * 1000)
        return Outcome(status, problem, duration_ms, body, wait, started_at, is_ours)

    def _request(self, target: Target, message: Message, place: Destination, now: datetime) -> UpstreamRequest:
        timestamp = int(now.timestamp())
        signatures = sign(message.event_id, timestamp, message.body, target.secrets_at(now), self._keys)
        return UpstreamRequest(
            Origin(place.scheme, place.host, place.port),
            b"POST",
            place.target.encode(),
            (
                *_FIXED_HEADERS,
                (b"webhook-id", message.event_id.encode()),
                (b"webhook-timestamp", str(timestamp).encode()),
                (b"webhook-signature", signatures.encode()),
                *target.headers,
            ),
            message.body,
        )


def problem_of(status: int) -> str | None:
    """Return what is wrong with an answer. Standard Webhooks: only 2xx is success, and redirects are failures."""
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"answered {status}: redirects are not followed"
    return f"answered {status}"


async def _read_some(response: Http1Response) -> bytes | None:
    """Return the beginning of the body; a connection that has more to say is closed."""
    parts: list[bytes] = []
    size_bytes = 0
    try:
        async with asyncio.timeout(_BODY_SECONDS_MAX):
            while size_bytes <= RESPONSE_BYTES_MAX and (piece := await response.read()):
                parts.append(piece)
                size_bytes += len(piece)
    except (UpstreamError, TimeoutError):
        # There was an answer; that it does not end changes nothing of it.
        response.abort()
    if size_bytes > RESPONSE_BYTES_MAX:
        response.abort()
    return b"".join(parts)[:RESPONSE_BYTES_MAX] or None


def _retry_after(response: Http1Response, now: datetime) -> float | None:
    return retry_after_seconds(next((value for name, value in response.headers if name == b"retry-after"), None), now)


def _is_ours(error: UpstreamError) -> bool:
    """Tell whether it is for want of connections or descriptors of ours that nothing was sent."""
    if isinstance(error, ConnectTimedOut):
        return error.phase == "pool"
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _OUT_OF_DESCRIPTORS


def _words_for(error: UpstreamError) -> str:
    if isinstance(error, ConnectFailed):
        words = {
            "refused": f"refused: {error}",
            "dns": "the host was not found in the DNS",
            "tls": "no TLS connection came about: the certificate is not valid, or TLS is not spoken there",
        }
        return words.get(error.phase, "the connection was refused, or the host not reached")
    if isinstance(error, ConnectTimedOut):
        return f"no connection within {DEADLINES.connect_seconds:.0f} s"
    if isinstance(error, ConnectionLost):
        return "the connection ended before there was an answer"
    if isinstance(error, ProtocolViolated):
        return "the answer was no HTTP/1.1 answer"
    if isinstance(error, FirstByteTimedOut):
        return f"no answer within {ANSWER_SECONDS_MAX:.0f} s"
    return f"no answer within {DEADLINES.total_seconds:.0f} s"
