"""Proxies: which upstreams go through one, and how."""

import asyncio
import base64
import contextlib
import socket

import pytest

from core.http1.errors import ConnectFailed, ConnectTimedOut
from core.http1.messages import Deadlines, Origin
from core.http1.proxies import Proxy, ProxySettings

from .conftest import DEADLINES, OK, listening, open_client

SECRET = base64.b64encode(b"user:p@ss").decode()


def settings_for(upstream, **more: str) -> ProxySettings:
    return ProxySettings.from_environ({"ALL_PROXY": f"http://user:p%40ss@127.0.0.1:{upstream.port}", **more})


class TestSettings:
    def test_each_scheme_has_its_variable_and_all_proxy_stands_in(self) -> None:
        found = ProxySettings.from_environ({"HTTPS_PROXY": "http://secure:3128", "ALL_PROXY": "http://other:3129/"})
        assert found.https == Proxy("secure", 3128)
        assert found.http == Proxy("other", 3129)
        assert ProxySettings.from_environ({}) == ProxySettings()

    def test_the_lower_case_spelling_wins_and_an_empty_value_counts_as_none(self) -> None:
        assert ProxySettings.from_environ({"http_proxy": "a:1", "HTTP_PROXY": "b:2"}).http == Proxy("a", 1)
        assert ProxySettings.from_environ({"http_proxy": "", "HTTP_PROXY": " "}).http is None

    def test_credentials_are_decoded_and_not_shown(self) -> None:
        proxy = ProxySettings.from_environ({"HTTP_PROXY": "http://user:p%40ss@proxy"}).http
        assert proxy is not None
        assert proxy.port == 80
        assert proxy.authorization == b"Basic " + SECRET.encode()
        assert SECRET not in repr(ProxySettings(http=proxy))

    @pytest.mark.parametrize(
        "url",
        [
            "https://user:planted@proxy",
            "socks5://planted",
            "http://",
            "http://planted:99999",
            "http://a/planted",
            "a b",
        ],
    )
    def test_a_bad_value_is_refused_without_quoting_it(self, url: str) -> None:
        with pytest.raises(ValueError, match="HTTPS_PROXY") as caught:
            ProxySettings.from_environ({"HTTPS_PROXY": url})
        assert "planted" not in str(caught.value)

    @pytest.mark.parametrize(
        ("entry", "host", "port", "is_direct"),
        [
            ("example.com", "example.com", 80, True),
            ("example.com", "api.example.com", 80, True),
            (".example.com", "api.example.com", 80, True),
            (".example.com", "example.com", 80, True),
            ("*.example.com", "api.example.com", 80, True),
            ("EXAMPLE.com.", "example.com.", 80, True),
            ("example.com", "badexample.com", 80, False),
            ("example.com", "example.com.evil", 80, False),
            ("example.com:8080", "example.com", 8080, True),
            ("example.com:8080", "example.com", 80, False),
            ("10.0.0.0/8", "10.1.2.3", 80, True),
            ("10.0.0.0/8", "11.1.2.3", 80, False),
            ("10.0.0.1", "10.0.0.1", 80, True),
            ("10.0.0.1:81", "10.0.0.1", 80, False),
            ("10.0.0.0/8:81", "10.0.0.1", 81, True),
            ("fd00::/8", "fd00::1", 80, True),
            ("::1", "::1", 80, True),
            ("[::1]:81", "::1", 81, True),
            ("[::1]:81", "::1", 80, False),
            ("[::1]", "::1", 80, True),
            ("0.0.0.1", "10.0.0.0.1", 80, False),
            ("*", "anything", 80, True),
            ("a, , b", "b", 80, True),
            ("", "a", 80, False),
        ],
    )
    def test_no_proxy(self, entry: str, host: str, port: int, *, is_direct: bool) -> None:
        found = ProxySettings.from_environ({"HTTP_PROXY": "proxy", "NO_PROXY": entry})
        assert (found.proxy_for(Origin("http", host, port)) is None) is is_direct

    @pytest.mark.parametrize("entry", ["a:b", "[::1]:x"])
    def test_a_bad_no_proxy_is_refused(self, entry: str) -> None:
        with pytest.raises(ValueError, match="NO_PROXY"):
            ProxySettings.from_environ({"NO_PROXY": entry})


class TestPlainHttp:
    async def test_the_request_goes_out_in_absolute_form_with_the_credentials(self, upstream) -> None:
        async with open_client(proxies=settings_for(upstream)) as client:
            request = upstream.request()
            request.origin = Origin("http", "api.example.com", 8080)
            task = asyncio.create_task(client.send(request, DEADLINES))
            head = await (await upstream.accept()).answer()
            assert head.startswith(
                b"POST http://api.example.com:8080/v1/chat HTTP/1.1\r\nhost: api.example.com:8080\r\n"
            )
            assert f"proxy-authorization: Basic {SECRET}".encode() in head
            assert (await task).status == 200

    async def test_an_exempt_upstream_is_reached_directly(self, upstream) -> None:
        async with open_client(proxies=settings_for(upstream, NO_PROXY="127.0.0.0/8")) as client:
            task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
            head = await (await upstream.accept()).answer()
            assert head.startswith(b"POST /v1/chat HTTP/1.1\r\n")
            assert b"proxy-" not in head
            await task


async def relay(peer, port: int) -> None:
    """Be the proxy's tunnel: pass bytes both ways until either side ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def pump(source, sink) -> None:
        try:
            while piece := await source.read(65_536):
                sink.write(piece)
        except ConnectionError:
            pass
        finally:
            sink.close()

    await asyncio.gather(pump(peer.reader, writer), pump(reader, peer.writer))


class TestTunnel:
    async def test_tls_runs_end_to_end_through_connect(self, upstream, authority) -> None:
        """Guarantee: the proxy sees the address and its own credentials, nothing of the request."""
        async with (
            listening(tls=authority.server_context("localhost")) as secure,
            open_client(proxies=settings_for(upstream), tls=authority.client_context()) as client,
        ):
            task = asyncio.create_task(client.send(secure.request("localhost"), DEADLINES))
            peer = await upstream.accept()
            head = await peer.request()
            assert head.startswith(b"CONNECT localhost:%d HTTP/1.1\r\n" % secure.port)
            assert f"proxy-authorization: Basic {SECRET}".encode() in head
            peer.send(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n")
            tunnel = asyncio.create_task(relay(peer, secure.port))
            request = await (await secure.accept()).answer()
            assert request.startswith(b"POST /v1/chat HTTP/1.1\r\n")
            assert b"proxy-authorization" not in request
            assert await (await task).read_all(10) == b"ok"
            await client.close()
            await tunnel

    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            (b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", "status 407"),
            (b"HTTP/1.0 502 Bad Gateway\r\n\r\nbody", "status 502"),
            (b"HTTP/1.1 200 OK\r\n\r\n\x16\x03", "bytes of its own"),
            (b"nonsense\r\n\r\n", "HTTP/1.1"),
            (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 4000, "broke off"),
        ],
    )
    async def test_a_tunnel_that_does_not_come_about_names_the_proxy(self, upstream, answer: bytes, words: str) -> None:
        async with open_client(proxies=settings_for(upstream)) as client:
            request = upstream.request()
            request.origin = Origin("https", "api.example.com", 443)
            task = asyncio.create_task(client.send(request, DEADLINES))
            peer = await upstream.accept()
            await peer.answer(answer)
            with pytest.raises(ConnectFailed, match=words) as caught:
                await task
            assert caught.value.phase == "proxy"
            assert SECRET not in str(caught.value)
            assert await peer.gone()

    @pytest.mark.parametrize("farewell", ["close", "reset"])
    async def test_a_proxy_that_hangs_up_is_a_failed_connect(self, upstream, farewell: str) -> None:
        async with open_client(proxies=settings_for(upstream)) as client:
            request = upstream.request()
            request.origin = Origin("https", "api.example.com", 443)
            task = asyncio.create_task(client.send(request, DEADLINES))
            peer = await upstream.accept()
            await peer.request()
            getattr(peer, farewell)()
            with pytest.raises(ConnectFailed, match="broke off"):
                await task

    async def test_a_silent_proxy_ends_at_the_connect_deadline(self, upstream) -> None:
        async with open_client(proxies=settings_for(upstream)) as client:
            request = upstream.request()
            request.origin = Origin("https", "api.example.com", 443)
            with pytest.raises(ConnectTimedOut):
                await client.send(request, Deadlines(0.05, 5, 5, 5))
            assert await (await upstream.accept()).gone()


class TestAddresses:
    async def test_ipv6_literals(self) -> None:
        async with listening("::1") as upstream, open_client() as client:
            task = asyncio.create_task(client.send(upstream.request("::1"), DEADLINES))
            head = await (await upstream.accept()).answer(OK)
            assert f"host: [::1]:{upstream.port}\r\n".encode() in head
            assert (await task).status == 200

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
    async def test_a_name_with_a_dead_address_is_reached_by_its_other_one(self, host: str, resolver) -> None:
        """Guarantee: whichever family the upstream lacks, the other is tried."""
        async with listening(host) as upstream, open_client() as client:
            resolver(
                (socket.AF_INET6, ("::1", upstream.port, 0, 0)),
                (socket.AF_INET, ("127.0.0.1", upstream.port)),
            )
            task = asyncio.create_task(client.send(upstream.request("two.example"), DEADLINES))
            await (await upstream.accept()).answer(OK)
            assert (await task).status == 200

    async def test_an_address_that_stays_silent_does_not_hold_up_the_next(self, upstream, resolver) -> None:
        """Guarantee: a black hole costs a quarter of a second, not the connect deadline."""
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(0)
            fillers = [fill(silent.getsockname()) for _ in range(4)]  # its queue is full: connecting hangs
            resolver(
                (socket.AF_INET, silent.getsockname()),
                (socket.AF_INET, ("127.0.0.1", upstream.port)),
            )
            async with open_client() as client:
                task = asyncio.create_task(client.send(upstream.request("two.example"), DEADLINES))
                await (await upstream.accept()).answer(OK)
                assert (await task).status == 200
                await client.close()
            for filler in fillers:
                filler.close()


def fill(address) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect(address)
    return sock


@pytest.fixture
async def resolver(monkeypatch):
    """Answer name look-ups from a list, at the standard library's seam."""

    def answer(*addresses) -> None:
        async def look_up(loop, host, port):
            return list(addresses)

        monkeypatch.setattr("core.http1.dial.look_up", look_up)

    return answer
