"""TLS: whom we trust, what we say in the handshake, and that the rest works the same inside it."""

import asyncio
import ssl

import pytest

from core.http1.errors import ConnectFailed, ConnectionLost

from .conftest import DEADLINES, OK, OK_HEAD, Authority, listening, only_connection, open_client, until


async def send_ok(client, upstream, host: str, peer=None):
    task = asyncio.create_task(client.send(upstream.request(host), DEADLINES))
    peer = peer or await upstream.accept()
    await peer.answer()
    assert await (await task).read_all(10) == b"ok"
    return peer


class TestTrusted:
    async def test_name_sni_and_alpn(self, authority) -> None:
        """Guarantee: the name goes out as SNI, and only http/1.1 is offered although the upstream prefers h2."""
        names: list[str | None] = []
        context = authority.server_context("localhost")
        context.sni_callback = lambda _socket, name, _context: names.append(name)
        async with listening(tls=context) as upstream, open_client(tls=authority.client_context()) as client:
            peer = await send_ok(client, upstream, "localhost")
            assert names == ["localhost"]
            assert peer.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
            await send_ok(client, upstream, "localhost", peer)
            assert client.requests_reused == 1

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
    async def test_an_address_is_checked_against_the_certificate_too(self, authority, host: str) -> None:
        async with (
            listening(host, tls=authority.server_context(host)) as upstream,
            open_client(tls=authority.client_context()) as client,
        ):
            await send_ok(client, upstream, host)

    async def test_a_large_upload_and_a_flood_work_inside_tls(self, authority) -> None:
        size_bytes = 8 << 20
        async with (
            listening(tls=authority.server_context("localhost")) as upstream,
            open_client(tls=authority.client_context()) as client,
        ):
            body = b"b" * size_bytes
            task = asyncio.create_task(client.send(upstream.request("localhost", body=body), DEADLINES))
            peer = await upstream.accept()
            assert (await peer.request()).endswith(body)
            peer.send(OK_HEAD + b"Content-Length: %d\r\n\r\n" % size_bytes + body)
            response = await task
            await until(lambda: only_connection(client).is_reading_paused)
            assert await response.read_all(size_bytes) == body
            assert client.connections_idle == 1


class TestRefused:
    async def refuse(self, context: ssl.SSLContext, host: str, tls: ssl.SSLContext | None) -> str:
        async with listening(tls=context) as upstream, open_client(tls=tls) as client:
            with pytest.raises(ConnectFailed) as caught:
                await client.send(upstream.request(host), DEADLINES)
            assert caught.value.phase == "tls"
            assert upstream._peers.empty()
            return str(caught.value)

    async def test_a_certificate_for_another_host(self, authority) -> None:
        message = await self.refuse(authority.server_context("example.com"), "localhost", authority.client_context())
        assert "certificate" in message

    async def test_a_certificate_for_another_address(self, authority) -> None:
        context = authority.server_context("localhost", "127.0.0.2")
        assert "certificate" in await self.refuse(context, "127.0.0.1", authority.client_context())

    async def test_an_unknown_authority(self, authority, tmp_path) -> None:
        other = Authority(tmp_path)
        assert "certificate" in await self.refuse(
            other.server_context("localhost"), "localhost", authority.client_context()
        )

    async def test_the_public_authorities_do_not_vouch_for_a_private_one(self, authority) -> None:
        """Guarantee: without a context of its own the client trusts certifi's roots and nothing else."""
        assert "certificate" in await self.refuse(authority.server_context("localhost"), "localhost", None)

    async def test_an_expired_certificate(self, authority) -> None:
        context = authority.server_context("localhost", days=(-1.9, -1))
        assert "expired" in await self.refuse(context, "localhost", authority.client_context())

    async def test_a_server_that_speaks_no_tls(self, authority, upstream) -> None:
        request = upstream.request()
        request.origin = type(request.origin)("https", "127.0.0.1", upstream.port)
        async with open_client(tls=authority.client_context()) as client:
            task = asyncio.create_task(client.send(request, DEADLINES))
            (await upstream.accept()).send(OK)
            with pytest.raises(ConnectFailed) as caught:
                await task
            assert caught.value.phase == "tls"

    @pytest.mark.parametrize("after_bytes", [0, 1])
    async def test_a_server_that_hangs_up_in_the_handshake(self, authority, upstream, after_bytes: int) -> None:
        request = upstream.request()
        request.origin = type(request.origin)("https", "127.0.0.1", upstream.port)
        async with open_client(tls=authority.client_context()) as client:
            task = asyncio.create_task(client.send(request, DEADLINES))
            peer = await upstream.accept()
            assert await peer.reader.read(after_bytes) == b"\x16"[:after_bytes]
            peer.reset()
            with pytest.raises(ConnectFailed) as caught:
                await task
            assert caught.value.phase == "tls"


class TestEnds:
    async def test_cancelling_closes_within_the_second(self, authority) -> None:
        async with (
            listening(tls=authority.server_context("localhost")) as upstream,
            open_client(tls=authority.client_context()) as client,
        ):
            task = asyncio.create_task(client.send(upstream.request("localhost"), DEADLINES))
            peer = await upstream.accept()
            await peer.request()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await peer.gone()

    async def test_an_idle_connection_the_upstream_closes_is_dropped(self, authority) -> None:
        async with (
            listening(tls=authority.server_context("localhost")) as upstream,
            open_client(tls=authority.client_context()) as client,
        ):
            peer = await send_ok(client, upstream, "localhost")
            peer.close()
            await until(lambda: client.connections_open == 0)

    async def test_a_reset_inside_tls_is_a_loss(self, authority) -> None:
        async with (
            listening(tls=authority.server_context("localhost")) as upstream,
            open_client(tls=authority.client_context()) as client,
        ):
            task = asyncio.create_task(client.send(upstream.request("localhost"), DEADLINES))
            peer = await upstream.accept()
            await peer.answer(OK[:-1])
            response = await task
            assert await response.read() == b"o"
            peer.reset()
            with pytest.raises(ConnectionLost):
                await response.read()
