"""Requests with an Idempotency-Key: the first one is answered, all others get the same bytes and cost nothing.

A second request joins the first one while it runs, or is given the answer that was kept. The key belongs to an API key,
and to a route and body: with another body it is refused (422). Answers that fail are not kept: the next request is the
first again. When the gateway that worked on a request has died, the next one takes over, under the same request id, so
that the ledger has one entry of both. PostgreSQL down: refused, since nobody can tell who was first; an answer that was
given meanwhile is kept when it is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import msgspec
import structlog

from core.database import DOWN
from core.settings import IdempotencySettings
from gateway.errors import AnswerTooLarge, IdempotencyKeyInvalid, IdempotencyKeyReused, StillRunning
from gateway.idempotency_claims import ClaimKey, Claims, FoundClaim, Hold, KeptAnswer
from gateway.recording import Recording
from inference.exchange import Exchange
from metering.errors import LedgerUnavailable

# Stripe's bound, and enough for any UUID with a name before it.
_KEY_LENGTH_MAX: Final = 255
_POLL_SECONDS: Final = (0.05, 0.1, 0.2, 0.5)
# As long as OpenAI's clients wait for one answer.
_WAIT_SECONDS_MAX: Final = 600.0
# As long as a connection to PostgreSQL may take to be had.
_LOOK_SECONDS_MAX: Final = 5.0
_COMPLETE_SECONDS_MAX: Final = 2.0
_RELEASE_SECONDS_MAX: Final = 1.0
_RETRY_SECONDS: Final = 1.0
_FORM_PARTS_MAX: Final = 64
_BOUNDARY: Final = re.compile(rb'^multipart/form-data\s*;.*\bboundary="?([^";,\s]+)', re.IGNORECASE)
_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


class Asked(msgspec.Struct, frozen=True):
    """What was asked for: requests that are the same have the same."""

    key: ClaimKey
    digest: bytes


class Claim:
    """A request of which no other one of this process is the first. *recording* is what others join.

    With a *hold* it is the first of all, and has the right and duty to answer.
    """

    __slots__ = ("asked", "hold", "is_settled", "recording")

    def __init__(self, asked: Asked, recording: Recording) -> None:
        self.asked = asked
        self.recording = recording
        self.hold: Hold | None = None
        self.is_settled = False
        """Whether it was completed or given up: each is done once, and not both."""


class Idempotency:
    """Knows which requests of this process are the first of their kind, and finds the answers of the others'."""

    def __init__(self, claims: Claims, settings: IdempotencySettings) -> None:
        self._claims = claims
        self._bytes_max = settings.answer_bytes_max
        self._kept_seconds = settings.retention_seconds
        self.is_on = settings.retention_seconds > 0
        self._running: dict[Asked, Recording] = {}
        self._holds: set[Hold] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._loop = asyncio.get_running_loop()

    async def stop(self, timeout_seconds: float = 5.0) -> None:
        """Finish what calls have left to be written, once no call runs any more.

        An answer that cannot be kept in time is logged: whoever asks again is answered anew, and billed for it.
        """
        self._is_stopping = True
        if self._renewing is not None:
            self._renewing.cancel()
        until = self._loop.time() + timeout_seconds
        # Again: what ends may have left something in turn.
        while self._tasks and (left_seconds := until - self._loop.time()) > 0:
            await asyncio.wait(self._tasks, timeout=left_seconds)
        left = [task for task in self._tasks if not task.done()]
        if left:
            _log.error("idempotency.stopped_with_claims_left", count=len(left))
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def running(self, asked: Asked) -> Recording | None:
        """Return the recording to join, if a request of this process asks for the same."""
        recording = self._running.get(asked)
        return None if recording is None or recording.is_void else recording

    def begin(self, asked: Asked) -> Claim:
        """Let all others of this process that ask for the same join this one. Closed once, by `close`."""
        recording = self._running[asked] = Recording(self._bytes_max)
        return Claim(asked, recording)

    async def find(self, exchange: Exchange, claim: Claim) -> None:
        """Make this request the first of all, or record the answer that was kept. Waits while another process works.

        Errors: IdempotencyKeyReused, AnswerTooLarge, StillRunning, LedgerUnavailable.
        """
        until = self._loop.time() + _WAIT_SECONDS_MAX
        for attempt in itertools.count():
            try:
                async with asyncio.timeout(_LOOK_SECONDS_MAX):
                    await self._look(exchange, claim, is_first=attempt == 0)
            except DOWN as error:
                raise LedgerUnavailable from error
            if claim.hold is not None or claim.recording.is_ended:
                return
            if self._loop.time() > until:
                break
            await asyncio.sleep(_POLL_SECONDS[min(attempt, len(_POLL_SECONDS) - 1)])
        raise StillRunning

    async def _look(self, exchange: Exchange, claim: Claim, *, is_first: bool) -> None:
        key, digest = claim.asked.key, claim.asked.digest
        assert exchange.principal is not None
        organization_id = exchange.principal.organization_id
        # Most keys are new: nobody is asked for what may be there before it is tried.
        found = None if is_first else await self._unbroken(self._claims.find(key))
        if found is None:
            claim.hold = await self._taken(self._claims.claim(key, digest, exchange.request_id, organization_id))
            if claim.hold is not None:
                return
            found = await self._unbroken(self._claims.find(key))
        if found is None:
            return
        if found.digest != digest:
            raise IdempotencyKeyReused
        if found.state == "too_large":
            raise AnswerTooLarge
        if found.state == "done":
            kept = found.answer
            claim.recording.request_id = kept.request_id
            claim.recording.fill(kept.status, kept.head, kept.body)
        elif self._is_free(found):
            claim.hold = await self._taken(self._claims.take_over(key, found, exchange.request_id))

    def _is_free(self, found: FoundClaim) -> bool:
        # Of our own claims all that somebody works on are in `_running`, and were joined: this one could not be given
        # up, or is about to be.
        return found.is_abandoned or found.gateway_id == self._claims.gateway_id

    async def complete(self, claim: Claim) -> None:
        """Keep what was recorded, before anybody has it all: whoever has an answer can have it again.

        PostgreSQL down: after two seconds the caller waits no longer. It is kept when PostgreSQL is back; until then
        this process gives it to those who ask.
        """
        recording, hold = claim.recording, claim.hold
        assert hold is not None
        claim.is_settled = True
        answer = KeptAnswer(hold.request_id, recording.status, recording.head, recording.body)
        writing = self._later(self._keep(claim, hold, answer))
        await asyncio.wait({writing}, timeout=_COMPLETE_SECONDS_MAX)

    async def _keep(self, claim: Claim, hold: Hold, answer: KeptAnswer) -> None:
        state = "too_large" if claim.recording.is_too_large else "done"
        until = self._loop.time() + self._kept_seconds
        is_told = False
        try:
            while self._loop.time() < until:
                try:
                    await self._claims.complete(hold, state, answer)
                except DOWN as error:
                    if not is_told:
                        _log.warning("idempotency.answer_not_kept_yet", error=type(error).__name__)
                    is_told = True
                    await asyncio.sleep(_RETRY_SECONDS)
                else:
                    return
        finally:
            self._forget(claim)

    async def give_up(self, claim: Claim, *, was_begun: bool = True) -> None:
        """Keep nothing: the next request is the first again.

        *was_begun* tells whether the ledger was told of the call. If not, a lost call whose claim this was keeps it:
        the next attempt is billed together with it, not beside it.

        Nobody waits long for that: what PostgreSQL cannot be told now, the end of the claim's lease tells it.
        """
        claim.is_settled = True
        self._forget(claim)
        if claim.hold is not None:
            await asyncio.wait(
                {self._later(self._release(claim.hold, was_begun=was_begun))}, timeout=_RELEASE_SECONDS_MAX
            )

    async def close(self, claim: Claim, *, was_begun: bool = True) -> None:
        """End a claim, however its call has ended: who joined has all there is, and nobody waits for more."""
        claim.recording.end(is_void=True)
        if not claim.is_settled:
            await self.give_up(claim, was_begun=was_begun)

    def _forget(self, claim: Claim) -> None:
        if self._running.get(claim.asked) is claim.recording:
            del self._running[claim.asked]
        if claim.hold is not None:
            self._holds.discard(claim.hold)

    async def _release(self, hold: Hold, *, was_begun: bool) -> None:
        try:
            if hold.is_inherited and not was_begun:
                await self._claims.hand_back(hold)
            else:
                await self._claims.release(hold.key, hold.request_id)
        except DOWN as error:
            _log.warning("idempotency.claim_not_released", error=type(error).__name__)

    async def _taken(self, taking: Coroutine[Any, Any, Hold | None]) -> Hold | None:
        """Return the claim that *taking* takes. Who cannot wait for it gives it back as soon as it is there."""
        task = self._later(taking)
        try:
            hold = await asyncio.shield(task)
        except BaseException:
            task.add_done_callback(self._give_back)
            raise
        if hold is not None:
            self._holds.add(hold)
            if not self._is_stopping and (self._renewing is None or self._renewing.done()):
                self._renewing = self._later(self._renew())
        return hold

    def _give_back(self, taking: asyncio.Task[Hold | None]) -> None:
        if not taking.cancelled() and taking.exception() is None:
            hold = taking.result()
            if hold is not None:
                self._later(self._release(hold, was_begun=False))

    async def _renew(self) -> None:
        """Renew the leases of all claims of this process, as long as there are any."""
        while self._holds:
            await asyncio.sleep(self._claims.lease_seconds / 3)
            try:
                await self._claims.renew(list(self._holds))
            except DOWN as error:
                _log.warning("idempotency.claims_not_renewed", error=type(error).__name__)

    async def _unbroken(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await *work*, which goes on when the caller leaves: a statement that is broken off costs its connection."""
        task = self._later(work)
        try:
            return await asyncio.shield(task)
        except BaseException:
            # Whatever comes of it, nobody waits for it any more.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    def _later(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def read(exchange: Exchange, header: bytes, content_type: bytes, body: bytes) -> Asked:
    """Return what is asked for. Errors: IdempotencyKeyInvalid."""
    text = header.decode("latin-1")
    if not 0 < len(text) <= _KEY_LENGTH_MAX or not text.isascii() or not text.isprintable():
        raise IdempotencyKeyInvalid
    assert exchange.principal is not None
    key = ClaimKey(exchange.principal.key_id, text)
    return Asked(key, _digest(exchange.endpoint.path, content_type, body))


def _digest(path: str, content_type: bytes, body: bytes) -> bytes:
    """Return what two requests have in common that ask for the same.

    Clients choose another boundary for a form each time that they send it, also when they try again.
    """
    found = hashlib.sha256(path.encode() + b"\n")
    boundary = _BOUNDARY.match(content_type)
    # No form has more parts (`inference/wire.py`); what a caller makes of its boundary must not keep us busy.
    for part in body.split(b"--" + boundary[1], _FORM_PARTS_MAX) if boundary else (body,):
        found.update(b"%d\n" % len(part))
        found.update(part)
    return found.digest()
