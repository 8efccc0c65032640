"""The hot routes: raw ASGI in front of Litestar (decision 0003). One call from its first header to its last byte.

What the call may do and where it goes is decided below (`keys`, `inference`); here is only HTTP.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import structlog

from core.errors import AppError, UpstreamFailed
from core.ids import new_id
from core.settings import EdgeSettings
from gateway.admission import Admission
from gateway.answers import answer_headers, passed_on
from gateway.authentication import credential_in
from gateway.client_address import client_address
from gateway.errors import BodyTooLarge, ContentTypeUnsupported, FramingUnsupported, MethodNotAllowed
from gateway.live import ClientGone, LiveRuns, Run
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
    ) -> None:
        self._settings = settings
        self._authenticator = authenticator
        self._inference = inference
        self._admission = admission
        self._live = live
        self._loop = asyncio.get_running_loop()
        self.endpoints = {_PREFIX + endpoint.path: endpoint for endpoint in ENDPOINTS}

    async def serve(self, endpoint: Endpoint, scope: Any, receive: Any, send: Any) -> None:
        """Answer one call. Every failure ends in OpenAI's form; whatever happens, the call is settled once."""
        exchange = Exchange(new_id("req"), endpoint)
        run = Run(exchange, send, asyncio.current_task(), self._loop.time())
        self._live.add(run)
        try:
            await self._answer(run, scope, receive)
        except asyncio.CancelledError:
            if run.interruption is None or run.task is None:
                raise
            run.task.uncancel()
            exchange.outcome = "client_gone" if isinstance(run.interruption, ClientGone) else "interrupted"
            await run.fail(run.interruption)
        except AppError as error:
            _note(exchange, error)
            await run.fail(error)
        except Exception as error:  # noqa: BLE001 - the edge: a bug of ours must not cut the connection
            _log.error("call.broke", request_id=exchange.request_id, exc_info=error)
            exchange.outcome = "broken"
            await run.fail(error)
        finally:
            self._live.discard(run)
            self._inference.settle(exchange)

    async def _answer(self, run: Run, scope: Any, receive: Any) -> None:
        if scope["method"] != "POST":
            raise MethodNotAllowed("POST")
        headers = scope["headers"]
        exchange = run.exchange
        principal = await self._authenticator.authenticate(
            credential_in(headers), lambda: client_address(scope, self._settings.trusted_proxies)
        )
        exchange.principal = principal
        content_type = _content_type(headers, exchange.endpoint)
        if not self._admission.enter_nowait():
            await self._admission.enter()
        try:
            body = await _read_body(headers, receive, self._settings.body_bytes_max)
            run.phase, run.since = "waiting", self._loop.time()
            watch = self._watch(run, receive) if principal.disconnect_policy == "abort" else None
            try:
                call = await self._inference.open(exchange, content_type, body)
                if call.is_stream:
                    watch = watch or self._watch(run, receive)
                    await self._stream(run, call)
                else:
                    run.phase = "running"
                    answer = await call.collect()
                    sent = answer_headers(exchange, call.content_type) + passed_on(call.headers)
                    await run.whole(call.status, sent, answer)
            finally:
                if watch is not None:
                    watch.cancel()
        finally:
            self._admission.leave()

    async def _stream(self, run: Run, call: Call) -> None:
        """Pass the events through, also when nobody listens any more: the last one says what the provider bills."""
        exchange = run.exchange
        read, write, clock = call.read, run.write, self._loop.time
        try:
            data = await read()
            exchange.first_byte_at = time.perf_counter()
            await run.begin(call.status, call.content_type, passed_on(call.headers))
            while data:
                await write(data, clock())
                data = await read()
        except asyncio.CancelledError:
            call.abort()
            raise
        if run.is_gone:
            exchange.outcome = "client_gone"
        else:
            await run.end()

    def _watch(self, run: Run, receive: Any) -> asyncio.Task[None]:
        return self._loop.create_task(_notice_hang_up(run, receive))


async def _notice_hang_up(run: Run, receive: Any) -> None:
    """Wait for the caller to hang up; under the policy `abort`, end the call then."""
    message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
    run.is_gone = True
    principal = run.exchange.principal
    if principal is not None and principal.disconnect_policy == "abort":
        run.interrupt(ClientGone("The caller hung up."))


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


def _content_type(headers: list[tuple[bytes, bytes]], endpoint: Endpoint) -> bytes:
    """Return the media type of the body. Errors: ContentTypeUnsupported, FramingUnsupported."""
    expected = _MEDIA_TYPES[endpoint.body]
    found = b""
    is_chunked = False
    for name, value in headers:
        if name == b"content-type":
            found = value
        elif name == b"transfer-encoding":
            if is_chunked or value.lower() != b"chunked":
                # The server would take it; a proxy in front may have read the body's end elsewhere.
                raise FramingUnsupported
            is_chunked = True
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise ContentTypeUnsupported("a body without content encoding")
    if found == expected:
        return found
    # Clients that leave it out mean JSON; a form cannot be read without its boundary.
    if found.partition(b";")[0].strip().lower() != expected and (found or endpoint.body == "form"):
        raise ContentTypeUnsupported(expected.decode())
    return found


async def _read_body(headers: list[tuple[bytes, bytes]], receive: Any, bytes_max: int) -> bytes:
    """Return the body. Errors: BodyTooLarge before more than *bytes_max* bytes are in memory; ClientGone."""
    for name, value in headers:
        if name == b"content-length" and value.isdigit() and int(value[:20]) > bytes_max:
            raise BodyTooLarge(bytes_max)
    message = await receive()
    body = message.get("body", b"")
    if not message.get("more_body"):
        if message["type"] == "http.disconnect":
            raise ClientGone("The caller hung up.")
        if len(body) > bytes_max:
            raise BodyTooLarge(bytes_max)
        return body
    pieces: list[bytes] = []
    size_bytes = 0
    while True:
        size_bytes += len(body)
        if size_bytes > bytes_max:
            raise BodyTooLarge(bytes_max)
        pieces.append(body)
        if not message.get("more_body"):
            return b"".join(pieces)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("The caller hung up.")
        body = message.get("body", b"")
