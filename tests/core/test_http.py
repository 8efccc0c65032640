from __future__ import annotations

import asyncio

import httpcore
import httpx
import pytest

from core.egress import EgressPolicy, Guard, is_special
from core.http import AddressForbidden, GuardedNetwork, NamedOrigin, open_client


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("100.64.0.1", "100.100.100.200", "169.254.169.254", "168.63.129.16", "192.0.0.1", "198.18.0.1", "240.0.0.1"),
        *("224.0.0.1", "255.255.255.255", "192.88.99.1", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8"),
        *("fe80::1", "fe80::1%eth0", "fd00:ec2::254", "fc00::1", "fec0::1", "ff02::1", "64:ff9b::7f00:1"),
        *("64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1", "5f00::1", "100::1", "3fff::1"),
        *("", "localhost", "0x7f.1", "2130706433", "017700000001"),
    ],
)
def test_what_only_our_network_reaches_is_forbidden(address: str) -> None:
    assert is_special(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "54.187.174.169", "2606:4700:4700::1111"])
def test_public_addresses_are_not(address: str) -> None:
    assert not is_special(address)


async def _listening(hits: list[bytes]) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        hits.append(head)
        location = b"location: http://127.0.0.1:1/\r\n" if b"GET /moved" in head else b""
        status = b"302 Found" if location else b"200 OK"
        writer.write(b"HTTP/1.1 " + status + b"\r\n" + location + b"content-length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


class TestAClient:
    async def test_reaches_a_private_address_only_if_the_operator_named_it(self) -> None:
        hits: list[bytes] = []
        server = await _listening(hits)
        port = server.sockets[0].getsockname()[1]
        async with server:
            async with open_client(timeout_seconds=5) as client:
                with pytest.raises(httpx.ConnectError):
                    await client.get(f"http://127.0.0.1:{port}/")
            assert hits == []
            async with open_client(timeout_seconds=5, trusted=[NamedOrigin("127.0.0.1", port)]) as client:
                assert (await client.get(f"http://127.0.0.1:{port}/")).text == "ok"
        assert len(hits) == 1

    async def test_follows_no_redirect(self) -> None:
        server = await _listening([])
        port = server.sockets[0].getsockname()[1]
        async with server, open_client(timeout_seconds=5, trusted=[NamedOrigin("127.0.0.1", port)]) as client:
            assert (await client.get(f"http://127.0.0.1:{port}/moved")).status_code == 302

    async def test_uses_no_proxy_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hits: list[bytes] = []
        server = await _listening(hits)
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        async with server, open_client(timeout_seconds=5) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get("http://127.0.0.1:9/")
        assert hits == []


class TestNames:
    @pytest.mark.parametrize(
        "answers",
        [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"], ["fe80::1%eth0"]],
        ids=["private", "public and private", "IPv6 loopback", "an address of the link"],
    )
    async def test_with_any_forbidden_address_are_not_connected(self, answers: list[str]) -> None:
        guard, _ = _guard(answers)
        with pytest.raises(AddressForbidden):
            await GuardedNetwork(guard=guard).connect_tcp("rebinding.example", 443)

    async def test_without_an_address_are_not_connected(self) -> None:
        guard, _ = _guard([])
        with pytest.raises(httpcore.ConnectError, match="not resolved"):
            await GuardedNetwork(guard=guard).connect_tcp("nowhere.example", 443)

    async def test_are_looked_up_once_and_connected_by_number(self) -> None:
        guard, asked = _guard(["8.8.8.8"])
        connected: list[str] = []

        class Network(httpcore.AsyncNetworkBackend):
            async def connect_tcp(self, host: str, *_: object, **__: object) -> httpcore.AsyncNetworkStream:
                connected.append(host)
                raise httpcore.ConnectError("far enough")

        guarded = GuardedNetwork(guard=guard)
        guarded._network = Network()
        with pytest.raises(httpcore.ConnectError, match="far enough"):
            await guarded.connect_tcp("public.example", 443)
        assert (asked, connected) == (["public.example"], ["8.8.8.8"])

    @pytest.mark.parametrize("port", [22, 25, 80, 5432, 6379])
    async def test_are_connected_on_ports_of_the_web_only(self, port: int) -> None:
        guard, asked = _guard(["8.8.8.8"])
        with pytest.raises(AddressForbidden):
            await GuardedNetwork(guard=guard).connect_tcp("public.example", port)
        assert asked == []


def _guard(answers: list[str]) -> tuple[Guard, list[str]]:
    asked: list[str] = []

    async def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return answers

    return Guard(EgressPolicy, resolve), asked
