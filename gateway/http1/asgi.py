"""Applications behind our server: one request as ASGI 3.0 has it."""

from __future__ import annotations

import asyncio
from typing import Any, Final
from urllib.parse import unquote

import structlog

from core.ids import new_id
from gateway.errors import ClientGone, body_of, status_of
from gateway.http1.request import HttpRequest, header_lines

_JSON: Final = b"content-type: application/json\r\nx-request-id: %b\r\n"
# The answer's length is told by what is sent, and its date by the server.
_SERVERS_OWN: Final = frozenset({b"content-length", b"transfer-encoding", b"connection", b"date"})
_log = structlog.get_logger(__name__)


async def serve_asgi(app: Any, request: HttpRequest, body_bytes_max: int) -> None:
    """Have *app* answer *request*, whose body it gets whole. What breaks in there is answered with 500."""
    bridge = _Bridge(request, body_bytes_max)
    try:
        await app(_scope(request), bridge.receive, bridge.send)
    except Exception as error:  # noqa: BLE001 - the edge: a bug must end in an answer
        if not request.is_gone:
            request_id = new_id("req")
            _log.error("request.broke", request_id=request_id, exc_info=error)
            request.respond(status_of(error), _JSON % request_id.encode(), body_of(error))
    finally:
        # An answer that was begun and not ended can only be cut off.
        request.abort()


class _Bridge:
    def __init__(self, request: HttpRequest, body_bytes_max: int) -> None:
        self._request = request
        self._body_bytes_max = body_bytes_max
        self._is_read = False
        self._status = 500
        self._lines = b""

    async def receive(self) -> dict[str, Any]:
        request = self._request
        if not self._is_read:
            self._is_read = True
            try:
                body = await request.read_body(self._body_bytes_max)
            except ClientGone:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": body, "more_body": False}
        if not request.is_gone and not request.is_ended:
            gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            request.on_hang_up = lambda: None if gone.done() else gone.set_result(None)
            await gone
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        request = self._request
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [header for header in message["headers"] if header[0].lower() not in _SERVERS_OWN]
            self._lines = header_lines(headers)
            if self._lines.count(b"\n") != len(headers) or self._lines.count(b"\r") != len(headers):
                raise ValueError("A response header contains a line break.")
        elif message["type"] == "http.response.body":
            body = bytes(message.get("body", b""))
            is_last = not message.get("more_body", False)
            if is_last and not request.is_started:
                request.respond(self._status, self._lines, body)
            elif not request.is_started:
                request.begin(self._status, self._lines, body)
            elif is_last:
                request.end(body)
            else:
                request.write(body)
            if request.is_blocked:
                await request.drained()


def _scope(request: HttpRequest) -> dict[str, Any]:
    address = request.peer_address
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.0" if request.is_http10 else "1.1",
        "method": request.method.decode("latin-1"),
        "scheme": "http",
        "path": unquote(request.path.decode("latin-1")),
        "raw_path": request.path,
        "query_string": request.query,
        "root_path": "",
        "headers": request.headers,
        "client": (address, 0) if address else None,
        "server": None,
        "state": {},
        "extensions": {},
    }
