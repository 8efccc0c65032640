"""Time, cancellation and back-pressure: what bounds an exchange."""

import asyncio
import tracemalloc

import pytest

from core.http1.connection import WRITE_SLICE_BYTES
from core.http1.connections import ConnectionLimits
from core.http1.errors import (
    BodyTooLarge,
    ConnectionLost,
    FirstByteTimedOut,
    IdleTimedOut,
    TotalTimedOut,
)
from core.http1.messages import Deadlines

from .conftest import DEADLINES, OK, OK_HEAD, only_connection, open_client, until

MIB = 1 << 20


async def begin(client, upstream, raw: bytes, deadlines=DEADLINES, **changes):
    task = asyncio.create_task(client.send(upstream.request(**changes), deadlines))
    peer = await upstream.accept()
    await peer.answer(raw)
    return peer, await task


class TestPassingOn:
    async def test_what_arrives_is_given_on_at_once_and_in_order_until_the_end(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK_HEAD + b"Content-Length: 6\r\n\r\nab")
        given: list[bytes] = []

        def sink(data: bytes) -> bool:
            given.append(data)
            if len(given) < 3:  # what is answered to one piece is behind it
                peer.send(b"cd" if len(given) == 1 else b"ef")
            return True

        assert await response.pass_on(sink)
        assert given == [b"ab", b"cd", b"ef"]
        assert await response.read() == b""

    async def test_who_wants_no_more_has_what_was_given_and_nothing_is_lost(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK_HEAD + b"Content-Length: 6\r\n\r\n")
        given: list[bytes] = []

        def sink(data: bytes) -> bool:
            given.append(data)
            return False

        for piece in (b"ab", b"cd", b"ef"):
            peer.send(piece)
            assert not await response.pass_on(sink)
        assert await response.pass_on(sink)
        assert given == [b"ab", b"cd", b"ef"]

    async def test_its_failure_is_the_readers_and_closes_the_connection(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK_HEAD + b"Content-Length: 6\r\n\r\n")

        def sink(data: bytes) -> bool:
            raise ZeroDivisionError(data)

        passing = asyncio.create_task(response.pass_on(sink))
        await until(lambda: response._waiter is not None)
        peer.send(b"ab")
        with pytest.raises(ZeroDivisionError, match="ab"):
            await passing
        assert await peer.gone()

    async def test_so_does_its_failure_over_what_was_there_already(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK_HEAD + b"Content-Length: 6\r\n\r\nab")

        def sink(data: bytes) -> bool:
            raise ZeroDivisionError(data)

        with pytest.raises(ZeroDivisionError):
            await response.pass_on(sink)
        assert await peer.gone()

    async def test_a_break_comes_behind_what_arrived_before_it(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK_HEAD + b"Content-Length: 6\r\n\r\nab")
        given: list[bytes] = []

        def sink(data: bytes) -> bool:
            given.append(data)
            peer.close()
            return True

        with pytest.raises(ConnectionLost):
            await response.pass_on(sink)
        assert given == [b"ab"]

    async def test_who_is_cancelled_gets_nothing_more_and_closes_the_connection(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK_HEAD + b"Content-Length: 6\r\n\r\n")
        given: list[bytes] = []
        passing = asyncio.create_task(response.pass_on(lambda data: not given.append(data)))
        await until(lambda: response._waiter is not None)
        passing.cancel()
        response.wake()
        with pytest.raises(asyncio.CancelledError):
            await passing
        assert await peer.gone()
        assert given == []


class TestDeadlines:
    async def test_silence_after_the_request_ends_at_the_first_byte_deadline(self, client, upstream) -> None:
        with pytest.raises(FirstByteTimedOut, match=r"0\.05 s"):
            await client.send(upstream.request(), Deadlines(5, 0.05, 5, 5))
        assert await (await upstream.accept()).gone()

    async def test_a_head_in_drips_does_not_move_the_deadline(self, client, upstream) -> None:
        task = asyncio.create_task(client.send(upstream.request(), Deadlines(5, 0.2, 5, 5)))
        peer = await upstream.accept()
        await peer.answer(b"HTTP/1.1 200 OK\r\nA: ")

        async def drip() -> None:
            tick = asyncio.Event()
            while not task.done():
                peer.send(b"x")
                asyncio.get_running_loop().call_later(0.01, tick.set)
                await tick.wait()
                tick.clear()

        async with asyncio.timeout(2):
            _, outcome = await asyncio.gather(drip(), asyncio.wait([task]))
        assert outcome
        assert isinstance(task.exception(), FirstByteTimedOut)

    async def test_a_body_that_stops_ends_at_the_idle_deadline_after_what_came(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK[:-1], Deadlines(5, 5, 0.05, 5))
        assert await response.read() == b"o"
        with pytest.raises(IdleTimedOut):
            await response.read()
        with pytest.raises(IdleTimedOut):
            response.read_nowait()
        assert await peer.gone()

    async def test_a_body_that_goes_on_moves_the_idle_deadline_but_not_the_total_one(self, client, upstream) -> None:
        raw = OK_HEAD + b"Content-Length: 100000\r\n\r\n"
        peer, response = await begin(client, upstream, raw, Deadlines(5, 5, 0.2, 0.5))
        pieces = 0
        loop = asyncio.get_running_loop()
        started_at = loop.time()

        async def read_on() -> None:
            nonlocal pieces
            while True:
                loop.call_later(0.02, peer.send, b"x")
                assert await response.read() == b"x"
                pieces += 1

        with pytest.raises(TotalTimedOut):
            await read_on()
        assert pieces > 10
        assert loop.time() - started_at < 2

    async def test_the_total_deadline_covers_the_wait_for_the_head(self, client, upstream) -> None:
        with pytest.raises(TotalTimedOut):
            await client.send(upstream.request(), Deadlines(5, 5, 5, 0.05))

    async def test_the_idle_deadline_rests_while_we_do_not_read(self, upstream) -> None:
        async with open_client(limits=ConnectionLimits(buffered_bytes_max=1000)) as client:
            raw = OK_HEAD + b"Content-Length: 2001\r\n\r\n" + b"x" * 2000
            peer, response = await begin(client, upstream, raw, Deadlines(5, 5, 0.05, 5))
            connection = only_connection(client)
            await until(lambda: connection.is_reading_paused)
            done = asyncio.Event()
            asyncio.get_running_loop().call_later(0.15, done.set)
            await done.wait()
            peer.send(b"y")
            assert await response.read_all(5000) == b"x" * 2000 + b"y"

    async def test_a_warm_connection_arms_no_timer(self, client, upstream) -> None:
        peer, _ = await begin(client, upstream, OK)
        timer = only_connection(client)._timer
        for _ in range(3):
            task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
            await peer.answer()
            await task
            assert only_connection(client)._timer is timer

    async def test_a_timer_left_over_from_a_short_exchange_does_not_end_a_longer_one(self, client, upstream) -> None:
        peer, _ = await begin(client, upstream, OK, Deadlines(5, 0.05, 5, 5))
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        await peer.request()
        await until(lambda: only_connection(client)._timer_at > asyncio.get_running_loop().time() + 1)
        peer.send(OK)
        assert (await task).status == 200


class TestCancellation:
    async def test_cancelling_send_closes_the_connection(self, client, upstream) -> None:
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        peer = await upstream.accept()
        await peer.request()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await peer.gone()
        assert client.connections_idle == 0

    async def test_cancelling_read_closes_the_connection(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK[:-2])
        task = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await peer.gone()
        with pytest.raises(ConnectionLost):
            await response.read()

    async def test_abort_wakes_the_reader_and_is_idempotent(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK[:-2])
        task = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        response.abort()
        response.abort()
        with pytest.raises(ConnectionLost):
            await task
        assert await peer.gone()

    async def test_an_answer_that_arrives_with_the_cancellation_is_thrown_away(self, client, upstream) -> None:
        """Guarantee: a cancelled request's connection is closed, never handed on with an answer under way."""
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        peer = await upstream.accept()
        await peer.request()
        connection = only_connection(client)
        task.cancel()
        connection.data_received(OK)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await peer.gone()
        assert client.connections_idle == 0

    async def test_a_cancellation_just_after_the_answer_leaves_the_connection_to_its_next_user(
        self, client, upstream
    ) -> None:
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        peer = await upstream.accept()
        await peer.request()
        connection = only_connection(client)
        connection.data_received(OK)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.connections_idle == 1
        second = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        await peer.answer()
        assert (await second).status == 200

    async def test_a_cancellation_just_after_a_failure_leaves_nothing_behind(self, client, upstream) -> None:
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        await (await upstream.accept()).request()
        only_connection(client).data_received(b"nonsense")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_two_readers_are_a_programming_error(self, client, upstream) -> None:
        _, response = await begin(client, upstream, OK[:-2])
        task = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await response.read()
        response.abort()
        with pytest.raises(ConnectionLost):
            await task


class TestReading:
    async def test_read_joins_what_arrived_and_read_nowait_never_waits(self, client, upstream) -> None:
        raw = OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        peer, response = await begin(client, upstream, raw)
        assert response.read_nowait() is None
        peer.send(b"1\r\na\r\n2\r\nbc\r\n")
        assert await response.read() == b"abc"
        assert response.read_nowait() is None
        peer.send(b"1\r\nd\r\n0\r\n\r\n")
        assert await response.read() == b"d"
        assert response.read_nowait() == b""
        assert await response.read() == b""

    @pytest.mark.parametrize("is_at_once", [True, False])
    async def test_a_body_larger_than_allowed_is_refused(self, client, upstream, *, is_at_once: bool) -> None:
        raw = OK_HEAD + b"Content-Length: 10\r\n\r\n" + b"x" * (10 if is_at_once else 9)
        _, response = await begin(client, upstream, raw)
        with pytest.raises(BodyTooLarge) as caught:
            await response.read_all(8)
        assert caught.value.bytes_max == 8

    async def test_a_body_of_exactly_the_bound_is_read(self, client, upstream) -> None:
        _, response = await begin(client, upstream, OK)
        assert await response.read_all(2) == b"ok"

    async def test_a_reset_mid_body_comes_after_what_arrived(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK[:-1])
        assert await response.read() == b"o"
        peer.reset()
        with pytest.raises(ConnectionLost) as caught:
            await response.read()
        assert caught.value.response_started

    async def test_a_reset_does_not_end_a_body_that_lasts_until_the_close(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK_HEAD + b"\r\nsome")
        assert await response.read() == b"some"
        peer.reset()
        with pytest.raises(ConnectionLost):
            await response.read()

    async def test_a_half_closed_upstream_ends_a_body_without_length(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK_HEAD + b"\r\nall")
        peer.half_close()
        assert await response.read_all(10) == b"all"
        assert await peer.gone()


class TestBackPressure:
    async def test_a_flood_meets_a_slow_reader_and_memory_stays_flat(self, client, upstream) -> None:
        """Guarantee: 64 MiB pass through a connection whose buffer never exceeds its bound by more than one read."""
        peer, response = await begin(client, upstream, OK_HEAD + b"Content-Length: %d\r\n\r\n" % (64 * MIB))
        flood = asyncio.create_task(send_much(peer, 64 * MIB))
        connection = only_connection(client)
        await until(lambda: connection.is_reading_paused)
        for _ in range(100):
            await asyncio.sleep(0)
        tracemalloc.start()
        seen = buffered_max = 0
        while piece := await response.read():
            seen += len(piece)
            buffered_max = max(buffered_max, len(piece))
            await asyncio.sleep(0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        await flood
        assert seen == 64 * MIB
        assert buffered_max <= 2 * 262_144
        assert peak < 4 * MIB
        assert client.connections_idle == 1

    async def test_reading_stays_paused_until_somebody_reads(self, client, upstream) -> None:
        peer, response = await begin(client, upstream, OK_HEAD + b"\r\n")
        flood = asyncio.create_task(send_much(peer, 16 * MIB))
        connection = only_connection(client)
        await until(lambda: connection.is_reading_paused)
        held = connection._framing.body_bytes
        for _ in range(200):
            await asyncio.sleep(0)
        assert connection._framing.body_bytes == held <= 2 * 262_144
        response.abort()
        with pytest.raises(ConnectionError):
            await flood

    async def test_a_body_of_64_mib_leaves_in_slices_as_the_upstream_takes_them(self, client, upstream) -> None:
        """Guarantee: what waits to be sent is a view of the caller's body, not a copy."""
        body = b"b" * (64 * MIB)
        task = asyncio.create_task(client.send(upstream.request(body=body), DEADLINES))
        peer = await upstream.accept()
        connection = only_connection_once_open(client)
        await until(lambda: connection()._is_write_paused)
        assert connection()._transport.get_write_buffer_size() <= 4 * WRITE_SLICE_BYTES
        tracemalloc.start()
        head = await peer.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: %d" % len(body) in head
        seen = 0
        while seen < len(body):
            seen += len(await peer.reader.read(65_536))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 * MIB
        peer.send(OK)
        assert (await task).status == 200
        assert client.connections_idle == 1

    async def test_an_answer_before_the_body_is_sent_is_read_and_the_connection_closed(self, client, upstream) -> None:
        body = b"b" * (32 * MIB)
        task = asyncio.create_task(client.send(upstream.request(body=body), DEADLINES))
        peer = await upstream.accept()
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\n\r\nmuch")
        response = await task
        assert (response.status, await response.read_all(10)) == (413, b"much")
        assert client.connections_idle == 0
        assert await peer.gone()

    async def test_an_upload_nobody_takes_ends_at_the_first_byte_deadline(self, client, upstream) -> None:
        with pytest.raises(FirstByteTimedOut):
            await client.send(upstream.request(body=b"b" * (32 * MIB)), Deadlines(5, 0.1, 5, 5))

    async def test_a_close_in_the_middle_of_an_upload_is_a_loss(self, client, upstream) -> None:
        task = asyncio.create_task(client.send(upstream.request(body=b"b" * (32 * MIB)), DEADLINES))
        peer = await upstream.accept()
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.reset()
        with pytest.raises(ConnectionLost):
            await task


def only_connection_once_open(client):
    def get():
        (pool,) = client._pools.values()
        return next(iter(pool.connections)) if pool.connections else Pending

    return get


class Pending:
    _is_write_paused = False


async def send_much(peer, size_bytes: int) -> None:
    piece = b"f" * 65_536
    for _ in range(size_bytes // len(piece)):
        peer.send(piece)
        await peer.writer.drain()
