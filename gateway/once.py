"""Answering a request with an Idempotency-Key: as the first of its kind, by joining it, or from what was kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from core.errors import AppError
from gateway.answers import answer_lines
from gateway.errors import AnswerTooLarge
from gateway.idempotency import Claim, Idempotency, KeptAnswer
from gateway.live import Run
from gateway.recording import Recording
from inference.errors import StreamInterrupted
from inference.exchange import Exchange

_REPLAYED: Final = b"idempotent-replayed: true\r\n"
Perform = Callable[[Run, bytes, bytes, Claim | None], Awaitable[None]]


class Once:
    """Has a request performed once, whatever the number of times that it is sent."""

    def __init__(self, idempotency: Idempotency, perform: Perform) -> None:
        self._idempotency = idempotency
        self._perform = perform

    @property
    def is_on(self) -> bool:
        """Whether answers are kept at all."""
        return self._idempotency.is_on

    async def answer(self, run: Run, header: bytes, content_type: bytes, body: bytes) -> None:
        """Answer a request. Errors: those of `Idempotency.find`, and those of the call itself."""
        exchange = run.exchange
        assert exchange.principal is not None
        exchange.principal.require_scope(exchange.endpoint.scope)
        found = await self._idempotency.find(exchange, header, body)
        if isinstance(found, Claim):
            await self._first(run, found, content_type, body)
            return
        exchange.outcome = "replayed"
        run.phase = "running"
        if isinstance(found, Recording):
            await _join(run, found)
        else:
            await _replay(run, found)

    async def keep(self, claim: Claim, exchange: Exchange) -> None:
        """Keep an answer that is whole and good, before its caller has all of it."""
        if _is_good(claim.recording, exchange):
            await self._idempotency.complete(claim)

    async def _first(self, run: Run, claim: Claim, content_type: bytes, body: bytes) -> None:
        exchange = run.exchange
        run.recording = claim.recording
        error: AppError | None = StreamInterrupted("The request that this one had joined was broken off.")
        is_kept = False
        try:
            await self._perform(run, content_type, body, claim)
            error, is_kept = None, _is_good(claim.recording, exchange)
        except AppError as failure:
            error = failure
            raise
        finally:
            await self._idempotency.close(claim, is_kept=is_kept, error=error)


def _is_good(recording: Recording, exchange: Exchange) -> bool:
    return 200 <= recording.status < 300 and exchange.outcome in {"done", "client_gone"}


async def _replay(run: Run, kept: KeptAnswer) -> None:
    if kept.content_type.startswith(b"text/event-stream"):
        is_blocked = run.begin(kept.status, kept.content_type, _REPLAYED, kept.body)
        run.end()
    else:
        lines = answer_lines(run.exchange, kept.content_type) + _REPLAYED
        is_blocked = run.whole(kept.status, lines, kept.body)
    if is_blocked:
        await run.drained()


async def _join(run: Run, recording: Recording) -> None:
    """Pass on what is being recorded. Errors: what the recorded call ends with; AnswerTooLarge."""
    recording.followers += 1
    try:
        while not recording.has_begun:
            await recording.changed()
        if recording.is_stream:
            await _follow(run, recording)
        else:
            while not recording.is_ended:
                await recording.changed()
            _require_whole(recording)
            await _replay(run, KeptAnswer(recording.status, recording.content_type, recording.body))
    finally:
        recording.followers -= 1


async def _follow(run: Run, recording: Recording) -> None:
    """Pass a stream on as it comes: first what has come, then each part."""
    sent = 0
    while not recording.parts and not recording.is_ended and not recording.is_too_large:
        await recording.changed()
    _require_joinable(recording)
    is_blocked = run.begin(recording.status, recording.content_type, _REPLAYED, b"".join(recording.parts))
    sent = len(recording.parts)
    while not recording.is_ended or sent < len(recording.parts):
        if is_blocked:
            await run.drained()
        if sent == len(recording.parts):
            await recording.changed()
        _require_joinable(recording)
        data = b"".join(recording.parts[sent:])
        sent = len(recording.parts)
        is_blocked = run.write(data) if data else False
    _require_whole(recording)
    run.end()


def _require_joinable(recording: Recording) -> None:
    if recording.is_too_large:
        raise AnswerTooLarge


def _require_whole(recording: Recording) -> None:
    _require_joinable(recording)
    if recording.error is not None:
        raise recording.error
