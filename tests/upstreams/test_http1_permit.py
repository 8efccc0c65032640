"""A request with a permit: connected meanwhile, and not one byte of it sent before."""

import asyncio

import pytest

from core.http1.errors import ConnectionLost

from .conftest import DEADLINES, until


class NotRecordedError(Exception):
    """What a permit may fail with."""


def permit() -> "asyncio.Future[None]":
    return asyncio.get_running_loop().create_future()


async def idle_connection(client, upstream):
    """The peer of a connection that waits in the pool."""
    task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
    peer = await upstream.accept()
    await peer.answer()
    assert await (await task).read_all(10) == b"ok"
    return peer


async def nothing_was_sent(peer) -> bool:
    """Tell whether a moment passes without a byte."""
    try:
        async with asyncio.timeout(0.1):
            return not await peer.reader.read(1)
    except TimeoutError:
        return True


async def test_it_connects_at_once_and_sends_when_it_may(client, upstream) -> None:
    may = permit()
    task = asyncio.create_task(client.send(upstream.request(), DEADLINES, may))
    peer = await upstream.accept()
    assert await nothing_was_sent(peer)
    may.set_result(None)
    await peer.answer()
    assert await (await task).read_all(10) == b"ok"


async def test_an_idle_connection_waits_too(client, upstream) -> None:
    peer = await idle_connection(client, upstream)
    may = permit()
    task = asyncio.create_task(client.send(upstream.request(), DEADLINES, may))
    assert await nothing_was_sent(peer)
    may.set_result(None)
    await peer.answer()
    assert await (await task).read_all(10) == b"ok"


@pytest.mark.parametrize("is_done_before", [True, False])
async def test_what_is_not_permitted_is_not_sent(client, upstream, is_done_before: bool) -> None:
    peer = await idle_connection(client, upstream)
    may = permit()
    if is_done_before:
        may.set_exception(NotRecordedError())
    task = asyncio.create_task(client.send(upstream.request(), DEADLINES, may))
    if not is_done_before:
        assert await nothing_was_sent(peer)
        may.set_exception(NotRecordedError())
    with pytest.raises(NotRecordedError):
        await task
    assert await peer.reader.read() == b""
    await until(lambda: client.connections_open == 0)


async def test_who_leaves_before_it_may_be_sent_sends_nothing_and_leaks_no_connection(client, upstream) -> None:
    peer = await idle_connection(client, upstream)
    may = permit()
    task = asyncio.create_task(client.send(upstream.request(), DEADLINES, may))
    assert await nothing_was_sent(peer)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not may.cancelled()
    may.set_result(None)
    assert await peer.reader.read() == b""
    await until(lambda: client.connections_open == 0)


async def test_a_connection_that_closes_meanwhile_is_replaced(client, upstream) -> None:
    peer = await idle_connection(client, upstream)
    may = permit()
    task = asyncio.create_task(client.send(upstream.request(), DEADLINES, may))
    assert await nothing_was_sent(peer)
    peer.close()
    await until(lambda: client.connections_open == 0)
    may.set_result(None)
    other = await upstream.accept()
    await other.answer()
    assert await (await task).read_all(10) == b"ok"
    assert client.requests_retried_stale == 1


async def test_a_fresh_connection_that_closes_meanwhile_is_a_lost_one(client, upstream) -> None:
    may = permit()
    task = asyncio.create_task(client.send(upstream.request(), DEADLINES, may))
    peer = await upstream.accept()
    assert await nothing_was_sent(peer)
    peer.close()
    await until(lambda: client.connections_open == 0)
    may.set_result(None)
    with pytest.raises(ConnectionLost):
        await task
