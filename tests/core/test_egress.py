"""Guarantee: nobody has our servers ask for what only they can reach, whatever they call it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from core.egress import Destination, EgressPolicy, EgressRefused, Guard, check_url, system_lookup
from core.http import GuardedClient
from core.http1.connections import ConnectionLimits
from core.http1.errors import ConnectFailed
from core.http1.messages import Deadlines, Origin, UpstreamRequest

PUBLIC = EgressPolicy()
DEADLINES = Deadlines(2, 2, 2, 5)
# Spelled in ways that some program somewhere takes for an address of its own network.
SPELLINGS = [
    *("https://127.0.0.1/", "https://127.1/", "https://127.0.1/", "https://2130706433/", "https://0x7f000001/"),
    *("https://0x7f.1/", "https://0x7f.0.0.1/", "https://0177.0.0.1/", "https://017700000001/", "https://0/"),
    *("https://0.0.0.0/", "https://0x0/", "https://00000000000/", "https://127.0.0.1./", "https://127.000.000.001/"),
    *("https://127.0.0.1:443/", "https://127.255.255.254/", "https://[::]/", "https://[::1]/", "https://[0:0::1]/"),
    *("https://[::ffff:127.0.0.1]/", "https://[::ffff:7f00:1]/", "https://[::127.0.0.1]/", "https://[::ffff:0:0]/"),
    *("https://[fe80::1]/", "https://[fe80::1%25eth0]/", "https://[fe80::1%eth0]/", "https://[fec0::1]/"),
    *("https://10.0.0.1/", "https://10.255.255.255/", "https://172.16.0.1/", "https://172.31.255.255/"),
    *("https://192.168.0.1/", "https://100.64.0.1/", "https://100.127.255.255/", "https://169.254.169.254/"),
    *(
        "https://169.254.169.254/latest/meta-data/",
        "https://2852039166/",
        "https://0xa9fea9fe/",
        "https://0xA9.0xFE.43518/",
    ),
    *("https://[fd00:ec2::254]/", "https://168.63.129.16/", "https://100.100.100.200/", "https://192.0.0.192/"),
    *("https://metadata.google.internal/", "https://metadata/", "https://localhost/", "https://LOCALHOST/"),
    *("https://localhost./", "https://foo.localhost/", "https://printer.local/", "https://db.internal/"),
    *(
        "https://kubernetes.default.svc.cluster.local/",
        "https://router.home.arpa/",
        "https://redis/",
        "https://a.onion/",
    ),
    *("https://[64:ff9b::7f00:1]/", "https://[64:ff9b:1::a00:1]/", "https://[2002:7f00:1::]/", "https://[2001::1]/"),
    *("https://[2001:0:7f00:1::]/", "https://[fc00::1]/", "https://[fd12:3456::1]/", "https://[ff02::1]/"),
    *("https://[100::1]/", "https://[2001:db8::1]/", "https://[5f00::1]/", "https://[3fff::1]/"),
    *("https://224.0.0.1/", "https://239.255.255.250/", "https://240.0.0.1/", "https://255.255.255.255/"),
    *("https://198.18.0.1/", "https://198.19.255.255/", "https://192.0.2.1/", "https://203.0.113.1/"),
    *("https://192.88.99.1/", "https://256.256.256.256/", "https://1.2.3.4.5/", "https://08.8.8.8/"),
    *("https://①②⑦.⓪.⓪.①/", "https://127。0。0。1/", "https://[::1/", "https://::1/"),
]
TRICKS = [
    *("https://hooks.example@127.0.0.1/", "https://user:pass@hooks.example/", "https://127.0.0.1#@hooks.example/"),
    *("https://hooks.example#@127.0.0.1/", "https://hooks.example\\@127.0.0.1/", "https:\\\\127.0.0.1\\"),
    *(
        "https://127.0.0.1\t.hooks.example/",
        "https://hooks.example/\r\nx: y",
        "https://hooks .example/",
        " https://hooks.example/",
    ),
    *("https://hooks.example\n/", "https://hooks.example/\x00", "https://hooks.example/a b", "https://hooks.example/ü"),
    *(
        "https://hooks.example:22/",
        "https://hooks.example:25/",
        "https://hooks.example:80/",
        "https://hooks.example:6379/",
    ),
    *(
        "https://hooks.example:5432/",
        "https://hooks.example:0/",
        "https://hooks.example:/",
        "https://hooks.example:99999/",
    ),
    *(
        "http://hooks.example/",
        "HTTP://hooks.example/",
        "ftp://hooks.example/",
        "file:///etc/passwd",
        "gopher://hooks.example/",
    ),
    *(
        "dict://hooks.example:11211/",
        "data:text/plain,x",
        "javascript:alert(1)",
        "jar:https://hooks.example!/",
        "//hooks.example/",
    ),
    *("hooks.example", "", "https:", "https://", "https:///path", "https://.hooks.example/", "https://hooks..example/"),
    *("https://hooks.example./", "https://-hooks.example/", "https://%31%32%37.0.0.1/", "https://hooks%2eexample/"),
    *(
        "https://" + "a" * 64 + ".example/",
        "https://" + "a." * 130 + "example/",
        "https://hooks.example/" + "a" * 2_000,
    ),
]


class TestSpellings:
    def test_are_as_many_as_promised(self) -> None:
        assert len(set(SPELLINGS + TRICKS)) >= 100

    @pytest.mark.parametrize("url", [*SPELLINGS, *TRICKS])
    def test_are_refused_in_words(self, url: str) -> None:
        with pytest.raises(EgressRefused) as refused:
            check_url(url, PUBLIC)
        assert str(refused.value).endswith(".")

    @pytest.mark.parametrize("url", SPELLINGS)
    async def test_are_refused_by_the_guard_as_well(self, url: str) -> None:
        """Guarantee: what reaches the guard without having been checked is not connected either."""
        host = url.removeprefix("https://").partition("/")[0].removesuffix(":443").strip("[]")

        async def resolve(name: str, port: int) -> list[str]:
            # What this machine's resolver makes of it, without asking the network: as inet_aton does, or not at all.
            del port
            return [str(ipaddress.IPv4Address(socket.inet_aton(name)))] if _is_number(name) else ["10.0.0.1"]

        with pytest.raises((EgressRefused, OSError)):
            await Guard(EgressPolicy, resolve).addresses(host, 443)

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("https://hooks.example", Destination("https", "hooks.example", 443, "/")),
            ("https://Hooks.Example:8443/a?b=c", Destination("https", "hooks.example", 8443, "/a?b=c")),
            ("https://hooks.example?x", Destination("https", "hooks.example", 443, "/?x")),
            ("https://bücher.example/", Destination("https", "xn--bcher-kva.example", 443, "/")),
            ("https://8.8.8.8/x", Destination("https", "8.8.8.8", 443, "/x")),
            ("https://[2606:4700:4700::1111]/", Destination("https", "2606:4700:4700::1111", 443, "/")),
            ("https://hooks.example/a@b", Destination("https", "hooks.example", 443, "/a@b")),
            ("https://3com.example/", Destination("https", "3com.example", 443, "/")),
            ("https://0xabc.example/", Destination("https", "0xabc.example", 443, "/")),
        ],
    )
    def test_of_the_public_internet_pass(self, url: str, expected: Destination) -> None:
        assert check_url(url, PUBLIC) == expected


class TestAPolicy:
    def test_opens_a_network_of_the_operators(self) -> None:
        policy = EgressPolicy(allow=("10.1.0.0/16",), ports=(9000,), plain_http=True)
        assert check_url("http://10.1.2.3:9000/", policy).host == "10.1.2.3"
        assert check_url("http://hooks.internal:9000/", policy).host == "hooks.internal"
        with pytest.raises(EgressRefused):
            check_url("http://10.2.0.1:9000/", policy)

    def test_closes_a_network_of_others(self) -> None:
        with pytest.raises(EgressRefused):
            check_url("https://8.8.8.8/", EgressPolicy(forbid=("8.8.8.0/24",)))
        with pytest.raises(EgressRefused):
            check_url("https://10.0.0.1/", EgressPolicy(allow=("10.0.0.0/8",), forbid=("10.0.0.1/32",)))

    @pytest.mark.parametrize("fields", [{"allow": ("10.0.0.1/8",)}, {"forbid": ("x",)}, {"ports": (0,)}])
    def test_that_is_malformed_is_none(self, fields: dict) -> None:
        with pytest.raises(ValueError):
            EgressPolicy(**fields)


class Target:
    """A server on loopback that counts who connects: nobody may."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.port = 0

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n")


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    made = Target()
    server = await asyncio.start_server(made.take, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    for writer in made.writers:
        writer.close()
        await writer.wait_closed()
    server.close()
    await server.wait_closed()


def request(host: str, port: int) -> UpstreamRequest:
    return UpstreamRequest(Origin("http", host, port), b"POST", b"/hook", (), b"{}")


class Names:
    """A resolver whose answers change each time it is asked."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        del host, port
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@asynccontextmanager
async def client_of(guard: Guard) -> AsyncIterator[GuardedClient]:
    client = GuardedClient(guard, ConnectionLimits())
    try:
        yield client
    finally:
        await client.close()


class TestNoPacketIsSent:
    @pytest.mark.parametrize(
        "host", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "localhost", "0.0.0.0", "127.1", "0x7f.1", "2130706433"]
    )
    async def test_to_what_is_refused(self, host: str, target: Target) -> None:
        policy = EgressPolicy(ports="any", plain_http=True)
        async with client_of(Guard(lambda: policy)) as client:
            with pytest.raises(ConnectFailed) as failed:
                await client.send(request(host, target.port), DEADLINES)
        assert failed.value.phase == "refused"
        assert target.connections == 0

    @pytest.mark.parametrize(
        "answers", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["::1"], ["::ffff:127.0.0.1"]]
    )
    async def test_to_a_name_that_leads_inside(self, answers: list[str], target: Target) -> None:
        policy = EgressPolicy(ports="any", plain_http=True)
        async with client_of(Guard(lambda: policy, Names(answers))) as client:
            with pytest.raises(ConnectFailed, match="not a public address") as failed:
                await client.send(request("hooks.example", target.port), DEADLINES)
        assert failed.value.phase == "refused"
        assert target.connections == 0

    async def test_by_a_rebinding_name(self, target: Target) -> None:
        """Guarantee: one lookup for a connection. What the name answers the next time is never connected to."""
        policy = EgressPolicy(ports="any", plain_http=True, allow=("::1/128",))
        names = Names(["::1"], ["127.0.0.1"])
        async with client_of(Guard(lambda: policy, names)) as client:
            # The vetted address, where nobody listens, is what was connected to.
            with pytest.raises(ConnectFailed, match="cannot be reached"):
                await client.send(request("rebinding.example", target.port), DEADLINES)
            assert names.asked == 1
            with pytest.raises(ConnectFailed, match="not a public address"):
                await client.send(request("rebinding.example", target.port), DEADLINES)
        assert (names.asked, target.connections) == (2, 0)

    async def test_after_a_redirect(self, target: Target) -> None:
        """Guarantee: a redirect is an answer. Where it leads is nothing to us."""
        policy = EgressPolicy(ports="any", plain_http=True, allow=("127.0.0.0/8",))
        async with client_of(Guard(lambda: policy)) as client:
            response = await client.send(request("127.0.0.1", target.port), DEADLINES)
            assert (response.status, await response.read_all(10)) == (302, b"")
        assert len(target.requests) == 1

    async def test_by_a_pooled_connection_once_the_policy_has_changed(self, target: Target) -> None:
        policy = EgressPolicy(ports="any", plain_http=True, allow=("127.0.0.0/8",))
        async with client_of(Guard(lambda: policy)) as client:
            for _ in range(2):
                response = await client.send(request("127.0.0.1", target.port), DEADLINES)
                await response.read_all(10)
            assert (target.connections, len(target.requests)) == (1, 2)
            policy = EgressPolicy(ports="any", plain_http=True)
            with pytest.raises(ConnectFailed, match="not a public address"):
                await client.send(request("127.0.0.1", target.port), DEADLINES)
        assert (target.connections, len(target.requests)) == (1, 2)


@pytest.fixture
def silent_name_servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lookups that say nothing until the event is set, but for one name."""
    said = threading.Event()

    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if host != "quick.example":
            said.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield said
    said.set()


async def test_dead_name_servers_hold_up_nobody_else(silent_name_servers: threading.Event) -> None:
    """Guarantee: a name whose server says nothing takes one thread, however many ask, and none from other names."""
    guard = Guard(EgressPolicy, system_lookup)
    waiting = [asyncio.ensure_future(guard.addresses(f"dead-{at % 40}.example", 443)) for at in range(400)]
    async with asyncio.timeout(5):
        assert await guard.addresses("quick.example", 443) == ["8.8.8.8"]
    silent_name_servers.set()
    assert await asyncio.gather(*waiting) == [["8.8.8.8"]] * 400


async def test_who_gives_up_a_lookup_leaves_it_to_the_others(silent_name_servers: threading.Event) -> None:
    guard = Guard(EgressPolicy, system_lookup)
    first = asyncio.ensure_future(guard.addresses("dead.example", 443))
    second = asyncio.ensure_future(guard.addresses("dead.example", 443))
    await asyncio.wait([first], timeout=0.01)
    first.cancel()
    await asyncio.wait([first])
    silent_name_servers.set()
    assert await second == ["8.8.8.8"]


async def test_families_take_turns() -> None:
    names = Names(["2606:4700::1", "2606:4700::2", "8.8.8.8", "8.8.4.4"])
    assert await Guard(EgressPolicy, names).addresses("hooks.example", 443) == [
        *("2606:4700::1", "8.8.8.8", "2606:4700::2", "8.8.4.4"),
    ]


def _is_number(name: str) -> bool:
    try:
        socket.inet_aton(name)
    except OSError:
        return False
    return True
