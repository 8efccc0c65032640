"""Answering a request with an Idempotency-Key: as the first of its kind, by joining it, or from what was kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from core.errors import AppError
from gateway.answers import answer_lines, passed_on
from gateway.errors import AnswerTooLarge
from gateway.idempotency import Claim, Idempotency, read
from gateway.live import Run
from gateway.recording import Recording
from inference.call import Call
from inference.errors import StreamInterrupted
from inference.exchange import Exchange
from inference.wire import parse

# Stripe's names for both.
_REPLAYED: Final = b"idempotent-replayed: true\r\noriginal-request: %b\r\n"
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
        """Answer a request. Errors: IdempotencyKeyInvalid, those of `Idempotency.find`, and those of the call."""
        exchange = run.exchange
        assert exchange.principal is not None
        exchange.principal.require_scope(exchange.endpoint.scope)
        asked = read(exchange, header, content_type, body)
        exchange.is_stream = _asks_for_events(exchange, content_type, body)
        run.is_guest = True
        while (recording := self._idempotency.running(asked)) is not None:
            if await _join(run, recording):
                return
        claim = self._idempotency.begin(asked)
        try:
            await self._idempotency.find(exchange, claim)
            if claim.hold is not None:
                await self._answer_first(run, claim, content_type, body)
        except AppError as error:
            claim.recording.end(error)
            raise
        finally:
            await self._idempotency.close(claim, was_begun=exchange.intent is not None)
        if claim.hold is None:
            await _pass_on(run, claim.recording)

    async def _answer_first(self, run: Run, claim: Claim, content_type: bytes, body: bytes) -> None:
        assert claim.hold is not None
        run.is_guest = False
        run.exchange.request_id = claim.recording.request_id = claim.hold.request_id
        run.recording = claim.recording
        await self._perform(run, content_type, body, claim)

    def begin(self, claim: Claim, call: Call) -> None:
        """Record how an answer begins."""
        head = call.content_type + b"\r\n" + passed_on(call.headers)
        claim.recording.begin(call.status, head.removesuffix(b"\r\n"), is_stream=call.is_stream)

    async def record(self, claim: Claim, exchange: Exchange, data: bytes) -> None:
        """Record the next part of a stream. With the last event, the answer is kept before anybody gets it."""
        relay = exchange.relay
        is_last = relay is not None and relay.is_done and relay.error is None
        claim.recording.write(data, is_last=is_last)
        if is_last:
            await self._end(claim, is_good=True)

    async def keep(self, claim: Claim, exchange: Exchange, answer: bytes = b"") -> None:
        """Record the end of an answer. Before its caller has all of it, it is kept, or given up if it is not good."""
        claim.recording.write(answer, is_last=True)
        await self._end(claim, is_good=exchange.outcome == "done")

    async def _end(self, claim: Claim, *, is_good: bool) -> None:
        recording = claim.recording
        if recording.is_ended:
            return
        try:
            if is_good and 200 <= recording.status < 300:
                await self._idempotency.complete(claim)
        finally:
            recording.end()
        if not claim.is_settled:
            await self._idempotency.give_up(claim)


def _asks_for_events(exchange: Exchange, content_type: bytes, body: bytes) -> bool:
    """Tell whether the answer is to be a stream: who waits for it gets comments meanwhile. Errors: BodyInvalid."""
    endpoint = exchange.endpoint
    return endpoint.can_stream and b'"stream"' in body and parse(endpoint, content_type, body, 1).is_stream


async def _join(run: Run, recording: Recording) -> bool:
    """Pass on what is being recorded; False if nothing came of it and somebody else must be the first.

    Errors: what the recorded call ends with; StreamInterrupted when it is broken off; AnswerTooLarge; StillRunning.
    """
    recording.join()
    try:
        # What is recorded of a stream is passed on as it comes, of a whole answer when it is there.
        while not (recording.is_ended or recording.is_stream):
            await recording.changed()
        if recording.is_void:
            return False
        await _pass_on(run, recording)
        return True
    finally:
        recording.leave()


async def _pass_on(run: Run, recording: Recording) -> None:
    """Give an answer as it was given before: a whole one at once, a stream as it comes."""
    more = _REPLAYED % recording.request_id.encode()
    run.phase = "running"
    if recording.is_stream:
        run.exchange.is_stream = True
        await _follow(run, recording, more)
    else:
        _require_whole(recording)
        if recording.is_too_large:
            raise AnswerTooLarge
        if run.whole(recording.status, answer_lines(run.exchange, recording.head) + more, recording.body):
            await run.drained()
    run.exchange.outcome = "replayed"


async def _follow(run: Run, recording: Recording, more: bytes) -> None:
    data = recording.since(0)
    sent = len(data)
    is_blocked = run.begin(recording.status, recording.head, more, data)
    while True:
        if is_blocked:
            await run.drained()
        data = recording.since(sent)
        if not data and recording.is_ended:
            break
        if not data:
            await recording.changed()
        sent += len(data)
        is_blocked = run.write(data) if data else False
    _require_whole(recording)
    run.end()


def _require_whole(recording: Recording) -> None:
    """Errors: what the recorded call failed with; StreamInterrupted when it was broken off."""
    if recording.error is not None:
        raise recording.error.with_traceback(None)
    if recording.is_void:
        raise StreamInterrupted("The request that this one had joined was broken off.")
