"""Which connection a request goes out on: reuse, stale retry, bounds, age, closing."""

import asyncio
import socket
import ssl

import pytest

from core.http1.connection import Http1Connection
from core.http1.connections import ConnectionLimits
from core.http1.errors import (
    ConnectFailed,
    ConnectionLost,
    ConnectTimedOut,
    FirstByteTimedOut,
    ProtocolViolated,
    TotalTimedOut,
)
from core.http1.messages import Deadlines, Origin, UpstreamRequest

from .conftest import DEADLINES, OK, OK_HEAD, exchange, listening, only_connection, open_client, until


async def send_ok(client, upstream, peer=None, **changes):
    """One whole exchange on *peer*, or on a new connection; returns the peer."""
    task = asyncio.create_task(client.send(upstream.request(**changes), DEADLINES))
    peer = peer or await upstream.accept()
    await peer.answer()
    response = await task
    assert await response.read_all(100) == b"ok"
    response.abort()
    return peer


class TestReuse:
    async def test_one_connection_serves_one_request_after_another(self, client, upstream) -> None:
        peer = await send_ok(client, upstream)
        for _ in range(3):
            await send_ok(client, upstream, peer)
        assert (client.requests_reused, client.connections_open, client.connections_idle) == (3, 1, 1)

    async def test_the_connection_used_last_is_taken_first(self, client, upstream) -> None:
        tasks = [asyncio.create_task(client.send(upstream.request(), DEADLINES)) for _ in range(2)]
        peers = [await upstream.accept(), await upstream.accept()]
        await peers[1].answer()
        await until(lambda: client.connections_idle == 1)
        await peers[0].answer()
        await asyncio.gather(*tasks)
        await send_ok(client, upstream, peers[0])

    async def test_the_body_ends_before_anybody_reads_it_and_the_connection_is_free_already(
        self, client, upstream
    ) -> None:
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        peer = await upstream.accept()
        await peer.answer()
        first = await task
        await send_ok(client, upstream, peer)
        first.abort()
        assert await first.read() == b"ok"
        assert await first.read() == b""
        assert first.read_nowait() == b""
        assert client.connections_idle == 1

    @pytest.mark.parametrize("farewell", ["close", "half_close", "reset", "stray"])
    async def test_a_connection_that_ends_or_speaks_while_idle_is_dropped_at_once(
        self, client, upstream, farewell
    ) -> None:
        peer = await send_ok(client, upstream)
        if farewell == "stray":
            peer.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        else:
            getattr(peer, farewell)()
        await until(lambda: client.connections_open == 0)
        assert client.connections_idle == 0
        await send_ok(client, upstream)
        assert client.requests_retried_stale == 0
        assert client.requests_reused == 0

    async def test_a_response_released_before_its_end_closes_the_connection(self, client, upstream) -> None:
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        peer = await upstream.accept()
        await peer.answer(OK[:-1])
        response = await task
        response.abort()
        response.abort()
        assert await peer.gone()
        assert await response.read() == b"o"
        with pytest.raises(ConnectionLost):
            await response.read()

    async def test_connections_idle_too_long_are_closed_without_a_request(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(idle_seconds_max=0.05)) as client:
            peer = await send_ok(client, upstream)
            assert await peer.gone()
            await until(lambda: client.connections_open == 0)

    async def test_a_connection_too_old_is_not_taken_even_if_it_is_still_there(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(idle_seconds_max=30)) as client:
            await send_ok(client, upstream)
            only_connection(client).idle_since -= 31
            await send_ok(client, upstream)
            assert upstream.accepted_count == 2
            assert client.requests_reused == 0


class TestStale:
    async def test_a_request_is_sent_again_once_if_the_reused_connection_was_closing(self, client, upstream) -> None:
        peer = await send_ok(client, upstream)
        task = asyncio.create_task(client.send(upstream.request(body=b'{"again":1}'), DEADLINES))
        first = await peer.request()
        peer.close()
        second_peer = await upstream.accept()
        assert await second_peer.answer() == first
        assert await (await task).read_all(10) == b"ok"
        assert (client.requests_retried_stale, client.requests_reused) == (1, 1)

    async def test_a_reset_counts_as_a_close(self, client, upstream) -> None:
        peer = await send_ok(client, upstream)
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        await peer.request()
        peer.reset()
        await (await upstream.accept()).answer()
        assert (await task).status == 200

    async def test_the_second_close_is_an_error(self, client, upstream) -> None:
        peer = await send_ok(client, upstream)
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        await peer.request()
        peer.close()
        second_peer = await upstream.accept()
        await second_peer.request()
        second_peer.close()
        with pytest.raises(ConnectionLost) as caught:
            await task
        assert not caught.value.response_started
        assert upstream.accepted_count == 2

    async def test_a_fresh_connection_is_not_retried(self, client, upstream) -> None:
        with pytest.raises(ConnectionLost):
            await exchange(client, upstream, b"", then_close=True)
        assert upstream.accepted_count == 1
        assert client.requests_retried_stale == 0

    @pytest.mark.parametrize("beginning", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", OK_HEAD, OK[:-1]])
    async def test_one_byte_of_an_answer_forbids_the_retry(self, client, upstream, beginning: bytes) -> None:
        peer = await send_ok(client, upstream)
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        await peer.answer(beginning)
        peer.close()
        with pytest.raises(ConnectionLost) as caught:
            await (await task).read_all(100)
        assert caught.value.response_started
        assert client.requests_retried_stale == 0

    async def test_neither_silence_nor_nonsense_is_retried(self, client, upstream) -> None:
        peer = await send_ok(client, upstream)
        deadlines = Deadlines(connect_seconds=5, first_byte_seconds=0.05, idle_seconds=5, total_seconds=5)
        with pytest.raises(FirstByteTimedOut):
            await client.send(upstream.request(), deadlines)
        peer = await send_ok(client, upstream)
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        await peer.answer(b"nonsense")
        with pytest.raises(ProtocolViolated):
            await task
        assert client.requests_retried_stale == 0

    async def test_the_retry_queues_for_a_place_and_gets_a_fresh_connection_there(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            peer = await send_ok(client, upstream)
            stale = asyncio.create_task(client.send(upstream.request(target=b"/stale"), DEADLINES))
            queued = asyncio.create_task(client.send(upstream.request(target=b"/queued"), DEADLINES))
            await peer.request()
            peer.close()
            assert (await (await upstream.accept()).answer()).startswith(b"POST /queued")
            assert (await (await upstream.accept()).answer()).startswith(b"POST /stale")
            assert (await stale).status == (await queued).status == 200
            assert client.requests_retried_stale == 1
            assert client.connections_open == 1

    async def test_the_retry_closes_an_idle_connection_to_make_room(self, upstream) -> None:
        """Guarantee: the retry never goes out on another connection that may be stale as well."""
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=2)) as client:
            tasks = [asyncio.create_task(client.send(upstream.request(), DEADLINES)) for _ in range(2)]
            peers = [await upstream.accept(), await upstream.accept()]
            for peer in peers:
                await peer.answer()
                await until(lambda: client.connections_idle > 0)
            await asyncio.gather(*tasks)
            await until(lambda: client.connections_idle == 2)
            task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
            await peers[1].request()
            peers[1].close()
            await (await upstream.accept()).answer()
            assert (await task).status == 200
            assert upstream.accepted_count == 3


class TestBound:
    async def test_requests_beyond_the_bound_wait_in_order(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            tasks = [
                asyncio.create_task(client.send(upstream.request(target=b"/%d" % number), DEADLINES))
                for number in range(4)
            ]
            peer = await upstream.accept()
            for number in range(4):
                assert (await peer.answer()).startswith(b"POST /%d " % number)
            assert [(await task).status for task in tasks] == [200] * 4
            assert upstream.accepted_count == 1

    async def test_waiting_ends_at_the_connect_deadline(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
            peer = await upstream.accept()
            with pytest.raises(ConnectTimedOut) as caught:
                await client.send(upstream.request(), Deadlines(0.05, 5, 5, 5))
            assert caught.value.phase == "pool"
            with pytest.raises(TotalTimedOut):
                await client.send(upstream.request(), Deadlines(5, 5, 5, 0.05))
            await peer.answer()
            await task
            await send_ok(client, upstream, peer)

    async def test_one_who_gives_up_waiting_does_not_take_the_connection_along(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            tasks = [asyncio.create_task(client.send(upstream.request(), DEADLINES)) for _ in range(3)]
            peer = await upstream.accept()
            tasks[1].cancel()
            await peer.answer()
            await peer.answer()
            assert (await tasks[0]).status == (await tasks[2]).status == 200
            with pytest.raises(asyncio.CancelledError):
                await tasks[1]

    async def test_one_cancelled_in_the_moment_of_its_turn_passes_it_on(self, upstream) -> None:
        """Guarantee: a connection handed to a task that is cancelled before it runs is not lost."""
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            first = asyncio.create_task(client.send(upstream.request(), DEADLINES))
            peer = await upstream.accept()
            second = asyncio.create_task(client.send(upstream.request(), DEADLINES))
            (pool,) = client._pools.values()
            await until(lambda: len(pool._waiters) == 1)
            await peer.request()
            only_connection(client).data_received(OK)
            second.cancel()
            await first
            with pytest.raises(asyncio.CancelledError):
                await second
            assert client.connections_idle == 1
            await send_ok(client, upstream, peer)

    async def test_a_closed_connection_gives_its_place_to_the_next(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            tasks = [asyncio.create_task(client.send(upstream.request(), DEADLINES)) for _ in range(2)]
            peer = await upstream.accept()
            await peer.answer(OK_HEAD + b"Connection: close\r\nContent-Length: 0\r\n\r\n")
            await (await upstream.accept()).answer()
            assert [(await task).status for task in tasks] == [200, 200]

    async def test_a_failed_dial_gives_its_place_back(self) -> None:
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            for _ in range(3):
                with pytest.raises(ConnectFailed):
                    await client.send(closed_port_request(), DEADLINES)

    @pytest.mark.parametrize("farewell", ["close", "reset"])
    async def test_upstreams_that_hang_up_at_once_cost_no_place(self, farewell: str) -> None:
        """Guarantee: whenever between the handshake and the request the end comes, the pool's count stays right."""
        async with (
            open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client,
            listening() as upstream,
        ):
            for rounds in range(30):
                task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
                peer = await upstream.accept()
                for _ in range(rounds % 5):
                    await asyncio.sleep(0)
                getattr(peer, farewell)()
                with pytest.raises((ConnectionLost, ConnectFailed)):
                    await task
            await send_ok(client, upstream)

    async def test_a_connection_that_ends_while_its_socket_is_being_handed_over_is_no_place_lost(
        self, upstream
    ) -> None:
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            made = Http1Connection.connection_made

            class EndsAtOnce(Http1Connection):
                __slots__ = ()

                def connection_made(self, transport) -> None:
                    made(self, transport)
                    self.eof_received()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("core.http1.connections.Http1Connection", EndsAtOnce)
                with pytest.raises(ConnectFailed, match="at once"):
                    await client.send(upstream.request(), DEADLINES)
            await (await upstream.accept()).gone()
            await send_ok(client, upstream)

    async def test_a_cancellation_while_the_socket_is_being_handed_over_leaves_nothing_open(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            made = Http1Connection.connection_made

            class CancelsItsDialler(Http1Connection):
                __slots__ = ()

                def connection_made(self, transport) -> None:
                    made(self, transport)
                    task.cancel()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("core.http1.connections.Http1Connection", CancelsItsDialler)
                task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await (await upstream.accept()).gone()
            await send_ok(client, upstream)

    async def test_origins_do_not_share_connections(self, client, upstream) -> None:
        await send_ok(client, upstream)
        task = asyncio.create_task(client.send(upstream.request("localhost"), DEADLINES))
        await (await upstream.accept()).answer()
        await task
        assert client.connections_open == 2


def closed_port_request() -> UpstreamRequest:
    """A request to a port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return UpstreamRequest(Origin("http", "127.0.0.1", port), b"POST", b"/", [], b"")


class TestOrigins:
    async def test_one_that_nobody_is_connected_to_is_forgotten(self, client, upstream) -> None:
        """Guarantee: any number of origins, as customers may choose them, fill no memory."""
        peer = await send_ok(client, upstream)
        assert list(client._pools) == [upstream.origin()]
        peer.close()
        await until(lambda: not client._pools)
        await send_ok(client, upstream)
        assert (client.connections_open, list(client._pools)) == (1, [upstream.origin()])

    async def test_one_that_cannot_be_reached_is_forgotten(self, client) -> None:
        request = UpstreamRequest(Origin("http", "127.0.0.1", 1), b"POST", b"/", [], b"{}")
        with pytest.raises(ConnectFailed):
            await client.send(request, DEADLINES)
        await until(lambda: not client._pools)

    async def test_a_retry_after_its_last_connection_is_known_to_the_client(self, upstream) -> None:
        """Guarantee: closing the client closes it, too."""
        async with open_client() as client:
            peer = await send_ok(client, upstream)
            stale = asyncio.create_task(client.send(upstream.request(), DEADLINES))
            await peer.request()
            peer.close()
            await (await upstream.accept()).answer()
            await stale
            assert client.requests_retried_stale == 1
            (pool,) = client._pools.values()
            assert len(pool.connections) == client.connections_open == 1


class TestConnecting:
    async def test_a_refused_connection_says_so(self, client) -> None:
        with pytest.raises(ConnectFailed, match="refused") as caught:
            await client.send(closed_port_request(), DEADLINES)
        assert caught.value.phase == "connect"

    async def test_a_name_that_cannot_exist_fails_in_the_dns_phase(self, client, upstream) -> None:
        with pytest.raises(ConnectFailed) as caught:
            await client.send(upstream.request("a" * 64 + ".invalid"), DEADLINES)
        assert caught.value.phase == "dns"

    async def test_a_handshake_nobody_answers_ends_at_the_connect_deadline(self, client, upstream) -> None:
        request = upstream.request()
        request.origin = type(request.origin)("https", "127.0.0.1", upstream.port)
        with pytest.raises(ConnectTimedOut) as caught:
            await client.send(request, Deadlines(0.05, 5, 5, 5))
        assert caught.value.phase == "connect"
        assert await (await upstream.accept()).gone()

    async def test_cancelling_while_connecting_closes_the_socket(self, client, upstream) -> None:
        request = upstream.request()
        request.origin = type(request.origin)("https", "127.0.0.1", upstream.port)
        task = asyncio.create_task(client.send(request, DEADLINES))
        peer = await upstream.accept()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await peer.gone()

    async def test_nagle_is_off_and_keep_alive_is_on(self, client, upstream) -> None:
        await send_ok(client, upstream)
        sock = only_connection(client)._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


class TestClose:
    async def test_closing_ends_what_runs_and_what_waits(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(connections_per_origin_max=1)) as client:
            tasks = [asyncio.create_task(client.send(upstream.request(), DEADLINES)) for _ in range(2)]
            peer = await upstream.accept()
            await peer.request()
            await client.close()
            with pytest.raises(ConnectionLost):
                await tasks[0]
            with pytest.raises(ConnectFailed):
                await tasks[1]
            assert await peer.gone()
            with pytest.raises(ConnectFailed) as caught:
                await client.send(upstream.request(), DEADLINES)
            assert caught.value.phase == "closed"

    async def test_a_connection_that_comes_about_after_the_close_is_closed(self, upstream) -> None:
        async with open_client() as client:
            task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
            await asyncio.sleep(0)
            await client.close()
            with pytest.raises(ConnectFailed):
                await task

    async def test_a_closed_client_opens_no_new_origin(self, upstream) -> None:
        client = open_client(tls=ssl.create_default_context())
        async with client as opened:
            await opened.close()
            with pytest.raises(ConnectFailed):
                await opened.send(upstream.request(), DEADLINES)
