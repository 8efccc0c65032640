"""Requests with an Idempotency-Key: the first one is answered, all others get the same bytes and cost nothing.

A second request joins the first one while it runs, or is given the answer that was kept. The key belongs to an API key,
and to a route and body: with another body it is refused (422). Answers that fail are not kept: the next request is the
first again. When the gateway that worked on a request has died, the next one takes over, under the same request id, so
that the ledger has one entry of both. PostgreSQL down: refused, since nobody can tell who was first.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from typing import Final

import msgspec
import structlog

from core.database import DOWN
from core.errors import AppError
from core.settings import IdempotencySettings
from gateway.errors import AnswerTooLarge, IdempotencyKeyInvalid, IdempotencyKeyReused, StillRunning
from gateway.idempotency_claims import ClaimKey, Claims
from gateway.recording import Recording
from inference.exchange import Exchange
from metering.errors import LedgerUnavailable

# Stripe's bound, and enough for any UUID with a name before it.
_KEY_LENGTH_MAX: Final = 255
_POLL_SECONDS: Final = (0.05, 0.1, 0.2, 0.5)
# As long as OpenAI's clients wait for one answer.
_WAIT_SECONDS_MAX: Final = 600.0
_COMPLETE_SECONDS_MAX: Final = 2.0
_log = structlog.get_logger(__name__)


class KeptAnswer(msgspec.Struct, frozen=True):
    """An answer that was given before."""

    status: int
    content_type: bytes
    body: bytes


class Claim(msgspec.Struct, frozen=True):
    """The right and duty to answer. *recording* is what others join."""

    key: ClaimKey
    recording: Recording


class Idempotency:
    """Knows which requests of this process are the first of their kind, and finds the answers of the others'."""

    def __init__(self, claims: Claims, settings: IdempotencySettings) -> None:
        self._claims = claims
        self._bytes_max = settings.answer_bytes_max
        self.is_on = settings.retention_seconds > 0
        self._running: dict[ClaimKey, Recording] = {}
        self._loop = asyncio.get_running_loop()

    async def find(self, exchange: Exchange, header: bytes, body: bytes) -> Claim | Recording | KeptAnswer:
        """Return the claim of a first request, the recording to join, or the answer to give again.

        Waits while another process works on it. Errors: IdempotencyKeyInvalid, IdempotencyKeyReused, AnswerTooLarge,
        StillRunning, LedgerUnavailable.
        """
        principal = exchange.principal
        assert principal is not None
        key = ClaimKey(principal.key_id, _checked(header))
        digest = hashlib.sha256(exchange.endpoint.path.encode() + b"\n" + body).digest()
        until = self._loop.time() + _WAIT_SECONDS_MAX
        for attempt in itertools.count():
            running = self._running.get(key)
            if running is not None:
                return _same(running, digest)
            try:
                found = await self._look(exchange, key, digest, attempt)
            except DOWN as error:
                raise LedgerUnavailable from error
            if found is not None:
                return found
            if self._loop.time() > until:
                break
            await asyncio.sleep(_POLL_SECONDS[min(attempt, len(_POLL_SECONDS) - 1)])
        raise StillRunning

    async def _look(self, exchange: Exchange, key: ClaimKey, digest: bytes, attempt: int) -> Claim | KeptAnswer | None:
        """Return a claim or an answer; None when another is working on it."""
        principal = exchange.principal
        assert principal is not None
        if await self._claims.claim(key, digest, exchange.request_id, principal.organization_id):
            return self._claimed(key, digest)
        found = await self._claims.find(key)
        if found is None:
            return None
        if found.digest != digest:
            raise IdempotencyKeyReused
        if found.state == "too_large":
            raise AnswerTooLarge
        if found.state == "done":
            return KeptAnswer(found.status, found.content_type.encode(), found.body)
        # A claim of this very process that nobody here works on could not be completed: PostgreSQL was down.
        is_forgotten = found.gateway_id == self._claims.gateway_id and attempt > 0 and key not in self._running
        if (found.is_abandoned or is_forgotten) and await self._claims.take_over(key, found.gateway_id):
            # The ledger knows the first attempt, or soon will, by this id: it is billed once.
            exchange.request_id = found.request_id
            return self._claimed(key, digest)
        return None

    def _claimed(self, key: ClaimKey, digest: bytes) -> Claim:
        recording = self._running[key] = Recording(digest, self._bytes_max)
        return Claim(key, recording)

    async def complete(self, claim: Claim) -> None:
        """Keep what was recorded, before the caller has it all: whoever has an answer can have it again.

        PostgreSQL down: logged; others get it only while this process remembers that somebody works on it.
        """
        recording = claim.recording
        state = "too_large" if recording.is_too_large else "done"
        body = None if recording.is_too_large else recording.body
        try:
            async with asyncio.timeout(_COMPLETE_SECONDS_MAX):
                await self._claims.complete(
                    claim.key, state, recording.status, recording.content_type.decode("latin-1"), body
                )
        except DOWN as error:
            _log.warning("idempotency.answer_not_kept", error=type(error).__name__)

    async def close(self, claim: Claim, *, is_kept: bool, error: AppError | None) -> None:
        """End a claim: who joined has all there is. Unless the answer *is_kept*, the next request is the first again."""
        claim.recording.end(error)
        self._running.pop(claim.key, None)
        if not is_kept:
            try:
                await self._claims.release(claim.key)
            except DOWN as failure:
                _log.warning("idempotency.claim_not_released", error=type(failure).__name__)


def _same(running: Recording, digest: bytes) -> Recording:
    if running.digest != digest:
        raise IdempotencyKeyReused
    return running


def _checked(header: bytes) -> str:
    """Return the key as text. Errors: IdempotencyKeyInvalid."""
    text = header.decode("latin-1")
    if not 0 < len(text) <= _KEY_LENGTH_MAX or not text.isascii() or not text.isprintable():
        raise IdempotencyKeyInvalid
    return text
