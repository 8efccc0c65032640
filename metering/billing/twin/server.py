"""The twin on a socket: keep-alive, latency, broken connections, and webhooks on their way. All rules are elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncGenerator, Callable

import h11

from metering.billing.twin.app import Ticket, Twin
from metering.billing.twin.control import PREFIX, answer_control
from metering.billing.twin.delivery import deliver
from metering.billing.twin.pages import answer_page
from metering.billing.twin.wire import Reply, Request, json_reply, split_target

_CHUNK_BYTES = 65_536
BODY_BYTES_MAX = 4 * 1024 * 1024
# The twin's own time is looked at this often when nobody asks for anything.
TICK_SECONDS = 1.0
_log = logging.getLogger(__name__)


class TwinServer:
    """A listening twin. *url* is its base; *tell* is called with one line for each request and webhook."""

    def __init__(self, twin: Twin, url: str, tell: Callable[[str], None]) -> None:
        self.twin = twin
        self.url = url
        self._tell = tell
        self._wake = asyncio.Event()
        self._delivering = asyncio.Lock()
        self._connections: set[asyncio.Task[None]] = set()

    async def deliver_due(self) -> int:
        """Do what is due now, and send the webhooks that are due, one after the other. Returns how many were sent."""
        count = 0
        async with self._delivering:
            self.twin.tick()
            while delivery := self.twin.webhooks.take_due(self.twin.state.wall()):
                timeout = self.twin.options.webhook_timeout_seconds
                status = await deliver(delivery, self.twin.state.wall(), timeout)
                self.twin.webhooks.record(delivery, status, self.twin.state.wall())
                self._tell(f"webhook {delivery.type} {delivery.event_id} -> {delivery.url} {status or 'no answer'}")
                count += 1
        return count

    async def keep_time(self) -> None:
        """Run for as long as the server does: time passes and webhooks leave also when nobody asks."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_SECONDS)
            self._wake.clear()
            try:
                await self.deliver_due()
            except Exception:  # noqa: BLE001 - the twin's edge: one bad act must not stop its time
                _log.exception("twin.tick_failed")

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, h11.RemoteProtocolError):
            pass  # The peer left, or does not speak HTTP.
        except asyncio.CancelledError:
            writer.transport.abort()
        except Exception:  # noqa: BLE001 - the twin's edge
            _log.exception("twin.connection_failed")
        finally:
            self._connections.discard(task)
            writer.close()

    def disconnect(self) -> list[asyncio.Task[None]]:
        """End all connections."""
        for task in self._connections:
            task.cancel()
        return list(self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        while request := await _read(connection, reader):
            reply = await self._answer(request, writer)
            self._wake.set()
            if reply is None:
                return
            writer.write(_written(connection, request, reply))
            await writer.drain()
            if connection.our_state is h11.MUST_CLOSE:
                return
            connection.start_next_cycle()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> Reply | None:
        """The reply, or None after the connection was broken on purpose."""
        if len(request.body) > BODY_BYTES_MAX:
            return json_reply(413, {"error": {"message": "The body is too large.", "type": "invalid_request_error"}})
        if request.path.startswith(PREFIX):
            return answer_control(self.twin, request)
        self.twin.tick()
        if (page := answer_page(self.twin.state, request)) is not None:
            return page
        ticket = self.twin.admit(request)
        fault = ticket.fault.plan.kind if ticket.fault else ""
        if fault == "reset":
            self.twin.withdraw(ticket)
            self._tell(f"{request.method} {request.path} reset")
            _reset(writer)
            return None
        await self._wait(ticket)
        reply = self._reply(ticket)
        self._tell(f"{request.method} {request.path} {reply.status}{f' ({fault})' if fault else ''}")
        if fault == "drop_after_commit":
            writer.transport.abort()
            return None
        return reply

    def _reply(self, ticket: Ticket) -> Reply:
        """The twin's reply; a mistake of the twin itself is told as such, and logged."""
        try:
            return self.twin.answer(ticket)
        except Exception:  # noqa: BLE001 - the twin's edge
            _log.exception("twin.answer_failed")
            return json_reply(500, {"error": {"type": "api_error", "message": "The twin made a mistake: see its log."}})

    async def _wait(self, ticket: Ticket) -> None:
        seconds = self.twin.options.latency_seconds
        if ticket.fault and ticket.fault.plan.kind == "hold":
            ticket.fault.entered.set()
            await ticket.fault.released.wait()
        if ticket.fault and ticket.fault.plan.kind == "slow":
            ticket.fault.entered.set()
            seconds += ticket.fault.plan.seconds
        if seconds:
            await asyncio.sleep(seconds)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Have the peer see a reset: a socket that does not linger is not closed politely."""
    raw: socket.socket | None = writer.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _read(connection: h11.Connection, reader: asyncio.StreamReader) -> Request | None:
    """The next request with its body, or None when the peer is done."""
    head: h11.Request | None = None
    parts: list[bytes] = []
    size = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_CHUNK_BYTES))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            size += len(event.data)
            # One byte over the limit is kept, so that the answer can tell that it was too much.
            if size <= BODY_BYTES_MAX + _CHUNK_BYTES:
                parts.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            return _request(head, b"".join(parts))
        else:
            return None


def _request(head: h11.Request, body: bytes) -> Request:
    path, query = split_target(head.target.decode("ascii"))
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
    return Request(method=head.method.decode("ascii"), path=path, query=query, headers=headers, body=body)


def _written(connection: h11.Connection, request: Request, reply: Reply) -> bytes:
    headers = [*reply.headers.items(), ("content-length", str(len(reply.body)))]
    body = b"" if request.method == "HEAD" else reply.body
    parts = [
        connection.send(h11.Response(status_code=reply.status, headers=headers)),
        connection.send(h11.Data(data=body)) if body else b"",
        connection.send(h11.EndOfMessage()),
    ]
    return b"".join(part for part in parts if part)


def _silent(_: str) -> None:
    """Tell nobody."""


@contextlib.asynccontextmanager
async def serving(
    twin: Twin, host: str = "127.0.0.1", port: int = 0, tell: Callable[[str], None] = _silent
) -> AsyncGenerator[TwinServer]:
    """Serve *twin* for as long as the block runs; port 0 takes any free one, `server.url` says which."""
    server = TwinServer(twin, "", tell)
    listener = await asyncio.start_server(server.connected, host, port)
    bound = listener.sockets[0].getsockname()
    server.url = twin.state.base_url = f"http://{host}:{bound[1]}"
    timekeeper = asyncio.create_task(server.keep_time())
    try:
        yield server
    finally:
        listener.close()
        timekeeper.cancel()
        twin.faults.clear()
        await asyncio.gather(timekeeper, *server.disconnect(), return_exceptions=True)
        await listener.wait_closed()
