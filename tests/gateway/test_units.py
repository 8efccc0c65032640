"""Small parts of the edge, each on its own."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import re
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.settings import EdgeSettings, Network, load
from gateway.admission import Admission
from gateway.answers import go_duration
from gateway.authentication import credential_in
from gateway.client_address import client_address
from gateway.errors import GatewayFull, GatewayStopping
from keys.errors import KeyIncorrect

TRUSTED: tuple[Network, ...] = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8::/32"))


def address(peer: str, forwarded: Iterable[str], trusted: tuple[Network, ...] = TRUSTED) -> str:
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    return client_address(peer, [(b"host", b"x"), *headers], trusted)


class TestClientAddress:
    @pytest.mark.parametrize("forwarded", [(), ("1.1.1.1",), ("10.0.0.1", "1.1.1.1"), ("127.0.0.1",)])
    def test_a_peer_that_nobody_trusts_is_the_caller_whatever_it_claims(self, forwarded: tuple[str, ...]) -> None:
        assert address("192.0.2.1", forwarded) == "192.0.2.1"
        assert address("10.0.0.9", forwarded, ()) == "10.0.0.9"

    @pytest.mark.parametrize(
        ("forwarded", "expected"),
        [
            ((), "10.0.0.9"),
            (("192.0.2.1",), "192.0.2.1"),
            (("6.6.6.6, 192.0.2.1",), "192.0.2.1"),
            (("6.6.6.6,192.0.2.1 , 10.0.0.3",), "192.0.2.1"),
            (("6.6.6.6", "192.0.2.1"), "192.0.2.1"),
            (("6.6.6.6", "192.0.2.1, 10.0.0.3", "10.0.0.4"), "192.0.2.1"),
            (("192.0.2.1, 2001:db8::5",), "192.0.2.1"),
            (("10.0.0.2, 10.0.0.3",), "10.0.0.2"),
            (("10.0.0.1, 6.6.6.6, 192.0.2.1, 10.1.1.1",), "192.0.2.1"),
            (("2001:dead::1",), "2001:dead::1"),
        ],
    )
    def test_each_trusted_hop_vouches_for_the_one_before(self, forwarded: tuple[str, ...], expected: str) -> None:
        assert address("10.0.0.9", forwarded) == expected

    def test_a_trusted_proxy_on_a_socket_for_both_families_is_trusted(self) -> None:
        """Guarantee: listening on `::`, where 10.0.0.9 is reported as ::ffff:10.0.0.9, changes nothing."""
        for peer in ("::ffff:10.0.0.9", "::FFFF:10.0.0.9", "2001:db8::9"):
            assert address(peer, ["6.6.6.6, 192.0.2.1, ::ffff:10.0.0.3"]) == "192.0.2.1"
        assert address("::ffff:192.0.2.1", ["1.1.1.1"]) == "192.0.2.1"

    @given(st.lists(st.text(st.characters(max_codepoint=255)), max_size=4))
    def test_no_header_breaks_it_and_none_outweighs_an_untrusted_peer(self, forwarded: list[str]) -> None:
        assert isinstance(address("10.0.0.9", forwarded), str)
        assert address("192.0.2.1", forwarded) == "192.0.2.1"

    def test_no_peer_is_no_address(self) -> None:
        assert address("", ["1.1.1.1"]) == ""


class TestCredential:
    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ([], None),
            ([(b"authorization", b"Bearer k")], b"k"),
            ([(b"authorization", b"bEARER   k ")], b"k"),
            ([(b"x-api-key", b"k")], b"k"),
            ([(b"api-key", b" k ")], b"k"),
            ([(b"authorization", b"Bearer k"), (b"x-api-key", b"k"), (b"authorization", b"Bearer k")], b"k"),
            ([(b"cookie", b"Bearer k")], None),
        ],
    )
    def test_every_clients_form(self, headers: list[tuple[bytes, bytes]], expected: bytes | None) -> None:
        assert credential_in(headers) == expected

    @pytest.mark.parametrize(
        "headers",
        [
            [(b"authorization", b"Basic k")],
            [(b"authorization", b"Bearerk")],
            [(b"authorization", b"k")],
            [(b"authorization", b"Bearer k"), (b"authorization", b"Bearer l")],
            [(b"authorization", b"Bearer k"), (b"x-api-key", b"l")],
        ],
    )
    def test_what_is_none_or_several(self, headers: list[tuple[bytes, bytes]]) -> None:
        with pytest.raises(KeyIncorrect):
            credential_in(headers)


class TestGoDuration:
    @pytest.mark.parametrize(
        ("milliseconds", "expected"),
        [
            (-5, "0s"),
            (0, "0s"),
            (1, "1ms"),
            (999, "999ms"),
            (1_000, "1s"),
            (1_500, "1.5s"),
            (59_999, "59.999s"),
            (60_000, "1m0s"),
            (360_000, "6m0s"),
            (90_061, "1m30.061s"),
            (3_600_000, "1h0m0s"),
            (86_400_000, "24h0m0s"),
            (90_000_010, "25h0m0.01s"),
        ],
    )
    def test_it_is_written_as_go_writes_it(self, milliseconds: int, expected: str) -> None:
        assert go_duration(milliseconds) == expected

    @given(st.integers(1, 10**10))
    def test_it_reads_back_as_the_same_time(self, milliseconds: int) -> None:
        text = go_duration(milliseconds)
        factors = {"h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
        parts = re.findall(r"([0-9.]+)(h|ms|m|s)", text)
        assert "".join(number + unit for number, unit in parts) == text
        assert round(sum(float(number) * factors[unit] for number, unit in parts)) == milliseconds


def edge(**changes: Any) -> EdgeSettings:
    return msgspec.structs.replace(load({}).edge, **changes)


class TestAdmission:
    async def take(self, admission: Admission) -> None:
        if not admission.enter_nowait():
            await admission.enter()

    async def test_so_many_run_so_many_wait_and_the_next_is_refused(self) -> None:
        admission = Admission(edge(in_flight_max=2, queued_max=1, queue_seconds_max=5))
        await self.take(admission)
        await self.take(admission)
        waiting = asyncio.ensure_future(self.take(admission))
        await asyncio.sleep(0)
        assert (admission.running, admission.queued) == (2, 1)
        with pytest.raises(GatewayFull):
            await self.take(admission)
        assert admission.refused == 1
        admission.leave()
        await waiting
        assert (admission.running, admission.queued) == (2, 0)

    async def test_first_come_first_served_and_nobody_passes_the_queue(self) -> None:
        admission = Admission(edge(in_flight_max=1, queued_max=10, queue_seconds_max=5))
        await self.take(admission)
        order: list[int] = []

        async def one(number: int) -> None:
            await self.take(admission)
            order.append(number)

        waiting = [asyncio.ensure_future(one(number)) for number in range(5)]
        await asyncio.sleep(0)
        for _ in range(5):
            assert not admission.enter_nowait()
            admission.leave()
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert order == [0, 1, 2, 3, 4]
        admission.leave()
        assert admission.running == 0

    async def test_who_waits_too_long_is_refused_and_takes_no_place(self) -> None:
        admission = Admission(edge(in_flight_max=1, queued_max=10, queue_seconds_max=0.02))
        await self.take(admission)
        with pytest.raises(GatewayFull):
            await self.take(admission)
        assert (admission.running, admission.queued, admission.refused) == (1, 0, 1)
        admission.leave()
        assert admission.enter_nowait()

    async def test_a_stop_turns_away_who_waits_and_who_comes(self) -> None:
        admission = Admission(edge(in_flight_max=1, queued_max=10, queue_seconds_max=5))
        await self.take(admission)
        waiting = asyncio.ensure_future(self.take(admission))
        await asyncio.sleep(0)
        admission.stop()
        with pytest.raises(GatewayStopping):
            await waiting
        with pytest.raises(GatewayStopping):
            admission.enter_nowait()
        assert not await admission.wait_idle(0.01)
        idle = asyncio.ensure_future(admission.wait_idle(5))
        await asyncio.sleep(0)
        admission.leave()
        assert await idle

    async def test_in_a_storm_of_hang_ups_no_place_is_lost(self) -> None:
        """Guarantee: a place that comes in the same moment as a hang-up or a time-out goes to the next one."""
        chance = random.Random(3)
        admission = Admission(edge(in_flight_max=3, queued_max=1_000, queue_seconds_max=0.05))
        most = 0

        async def one() -> None:
            nonlocal most
            await self.take(admission)
            try:
                most = max(most, admission.running)
                for _ in range(chance.randint(0, 3)):
                    await asyncio.sleep(0)
            finally:
                admission.leave()

        tasks = [asyncio.ensure_future(one()) for _ in range(800)]
        while not all(task.done() for task in tasks):
            for task in chance.sample(tasks, 20):
                task.cancel()
            await asyncio.sleep(0)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(one is None for one in ended) > 50
        assert (admission.running, admission.queued, most) == (0, 0, 3)
        assert await admission.wait_idle(0)
