"""The hot routes, beside Litestar and on our own server (decisions 0003, 0010): a call from first header to last byte.

What the call may do and where it goes is decided below (`keys`, `inference`); here is only HTTP.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import structlog

from core.errors import AppError, UpstreamFailed
from core.ids import new_id
from core.settings import EdgeSettings
from gateway.admission import Admission
from gateway.answers import answer_lines, cost_line, passed_on
from gateway.authentication import credential_in
from gateway.client_address import client_address
from gateway.errors import ClientGone, ContentTypeUnsupported, MethodNotAllowed
from gateway.http1.request import HttpRequest
from gateway.idempotency import Claim, Idempotency
from gateway.live import LiveRuns, Run
from gateway.once import Once
from inference.call import Call, Inference
from inference.endpoints import ENDPOINTS, Endpoint
from inference.exchange import Exchange
from keys.authenticate import Authenticator

_MEDIA_TYPES: Final = {"json": b"application/json", "form": b"multipart/form-data"}
_PREFIX: Final = "/v1"
_log = structlog.get_logger(__name__)


class HotRoutes:
    """Serves the data plane's POST routes."""

    def __init__(
        self,
        *,
        settings: EdgeSettings,
        authenticator: Authenticator,
        inference: Inference,
        admission: Admission,
        live: LiveRuns,
        idempotency: Idempotency,
    ) -> None:
        self._settings = settings
        self._authenticator = authenticator
        self._inference = inference
        self._admission = admission
        self._live = live
        self._once = Once(idempotency, self._perform)
        self._loop = asyncio.get_running_loop()
        self.endpoints = {(_PREFIX + endpoint.path).encode(): endpoint for endpoint in ENDPOINTS}

    async def serve(self, endpoint: Endpoint, request: HttpRequest) -> None:
        """Answer one call. Every failure ends in OpenAI's form; whatever happens, the call is settled once."""
        exchange = Exchange(new_id("req"), endpoint)
        run = Run(exchange, request, self._loop.time())
        request.on_hang_up = run.hang_up
        self._live.add(run)
        try:
            await self._answer(run, request)
        except asyncio.CancelledError:
            if run.interruption is None or run.task is None:
                raise
            run.task.uncancel()
            exchange.outcome = "client_gone" if isinstance(run.interruption, ClientGone) else "interrupted"
            run.fail(run.interruption)
        except AppError as error:
            _note(exchange, error)
            run.fail(error)
        except Exception as error:  # noqa: BLE001 - the edge: a bug of ours must not cut the connection
            _log.error("call.broke", request_id=exchange.request_id, exc_info=error)
            exchange.outcome = "broken"
            run.fail(error)
        finally:
            self._live.discard(run)
            run.close()
            self._inference.settle(exchange)

    async def _answer(self, run: Run, request: HttpRequest) -> None:
        if request.method != b"POST":
            raise MethodNotAllowed("POST")
        exchange = run.exchange
        credential = credential_in(request.headers)

        def address() -> str:
            return client_address(request.peer_address, request.headers, self._settings.trusted_proxies)

        principal = self._authenticator.recall(credential, address) if credential else None
        if principal is None:
            principal = await self._authenticator.authenticate(credential, address)
        exchange.principal = principal
        content_type = _content_type(request.found, exchange.endpoint)
        if not self._admission.enter_nowait():
            await self._admission.enter()
        try:
            bytes_max = self._settings.body_bytes_max
            body = request.read_body_nowait(bytes_max)
            if body is None:
                body = await request.read_body(bytes_max)
            run.phase, run.since = "waiting", self._loop.time()
            key = request.found.get(b"idempotency-key")
            if key is not None and self._once.is_on:
                await self._once.answer(run, key, content_type, body)
            else:
                await self._perform(run, content_type, body)
        finally:
            self._admission.leave()

    async def _perform(self, run: Run, content_type: bytes, body: bytes, claim: Claim | None = None) -> None:
        """Have the call answered, and pass the answer on."""
        exchange = run.exchange
        call = await self._inference.open(exchange, content_type, body)
        if call.is_stream:
            await self._stream(run, call, claim)
            return
        run.phase = "running"
        answer = await call.collect()
        if claim is not None:
            self._once.begin(claim, call)
            await self._once.keep(claim, exchange, answer)
        lines = answer_lines(exchange, call.content_type) + passed_on(call.headers) + cost_line(call.charged())
        if run.whole(call.status, lines, answer):
            await run.drained()

    async def _stream(self, run: Run, call: Call, claim: Claim | None) -> None:
        """Pass the events through, also when nobody listens any more: the last one says what the provider bills."""
        exchange = run.exchange
        try:
            data = await call.read()
            exchange.first_byte_at = time.perf_counter()
            run.phase = "running"
            if claim is not None:
                self._once.begin(claim, call)
                await self._once.record(claim, exchange, data)
            if run.begin(call.status, call.content_type, passed_on(call.headers), data):
                await run.drained()
            if claim is None:
                while not await call.pass_on(run.write):
                    await run.drained()
            else:
                await self._record(run, call, claim)
        except asyncio.CancelledError:
            call.abort()
            raise
        if claim is not None:
            await self._once.keep(claim, exchange)
        if run.is_gone:
            exchange.outcome = "client_gone"
        run.end()

    async def _record(self, run: Run, call: Call, claim: Claim) -> None:
        """Pass the events through behind the first, each of them recorded first."""
        while data := await call.read():
            await self._once.record(claim, run.exchange, data)
            if run.write(data):
                await run.drained()


def _note(exchange: Exchange, error: AppError) -> None:
    """Log what the caller is not told. *outcome* tells a refusal from a failure."""
    if isinstance(error, UpstreamFailed):
        exchange.outcome = "upstream_failed"
    notes = getattr(error, "__notes__", None)
    if notes or error.__cause__ is not None:
        _log.warning(
            "call.failed",
            request_id=exchange.request_id,
            code=error.code,
            notes=notes,
            cause=type(error.__cause__).__name__ if error.__cause__ else None,
        )


def _content_type(found: dict[bytes, bytes], endpoint: Endpoint) -> bytes:
    """Return the media type of the body. Errors: ContentTypeUnsupported."""
    if b"content-encoding" in found and found[b"content-encoding"].lower() != b"identity":
        raise ContentTypeUnsupported("a body without content encoding")
    expected = _MEDIA_TYPES[endpoint.body]
    media_type = found.get(b"content-type", b"")
    # Clients that leave it out mean JSON; a form cannot be read without its boundary.
    if (
        media_type != expected
        and media_type.partition(b";")[0].strip().lower() != expected
        and (media_type or endpoint.body == "form")
    ):
        raise ContentTypeUnsupported(expected.decode())
    return media_type
