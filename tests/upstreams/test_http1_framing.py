"""Where responses begin and end, and which ones are refused."""

import asyncio
import contextlib
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.http1.errors import ConnectionLost, ProtocolViolated
from core.http1.framing import HEAD_BYTES_MAX, HEADERS_MAX, ResponseFraming

from .conftest import DEADLINES, OK, OK_HEAD, exchange, only_connection, until

CHUNKED = (
    OK_HEAD
    + b"Transfer-Encoding: chunked\r\nX-Answer: 42 \r\n\r\n5;a=b\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\nX-Trailer: t\r\n\r\n"
)
SIZED = OK_HEAD + b"Content-Length: 11\r\nContent-Type: text/plain\r\n\r\nhello world"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + SIZED


class NoSource:
    is_reading_paused = False

    def abort(self) -> None:
        raise AssertionError

    def resume_reading(self) -> None:
        raise AssertionError


def parse(*pieces: bytes, is_head_only: bool = False) -> ResponseFraming:
    framing = ResponseFraming(NoSource())
    framing.begin(is_head_only=is_head_only)
    for piece in pieces:
        framing.feed(piece)
    return framing


class TestAccepted:
    @pytest.mark.parametrize("raw", [CHUNKED, SIZED, INTERIM], ids=["chunked", "sized", "interim"])
    def test_every_split_point_gives_the_same_response(self, raw: bytes) -> None:
        for cut in range(1, len(raw)):
            framing = parse(raw[:cut], raw[cut:])
            assert framing.response is not None
            assert framing.response.read_nowait() == b"hello world"
            assert framing.is_reusable, cut

    @given(raw=st.sampled_from([CHUNKED, SIZED, INTERIM]), cuts=st.sets(st.integers(1, 200)))
    def test_random_splits_give_the_same_response(self, raw: bytes, cuts: set[int]) -> None:
        edges = [0, *sorted(cut for cut in cuts if cut < len(raw)), len(raw)]
        framing = parse(*(raw[start:end] for start, end in itertools.pairwise(edges)))
        assert framing.response is not None
        assert framing.response.read_nowait() == b"hello world"
        assert framing.is_reusable

    async def test_every_split_point_over_a_socket(self, client, upstream) -> None:
        """Guarantee: also when the pieces arrive one by one, on one connection reused for all of them."""
        peer = None
        for cut in range(1, len(CHUNKED)):
            task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
            peer = peer or await upstream.accept()
            await peer.answer(CHUNKED[:cut])
            framing = only_connection(client)._framing
            await until(lambda cut=cut, framing=framing: framing._received_bytes >= cut)
            peer.send(CHUNKED[cut:])
            response = await task
            assert await response.read_all(100) == b"hello world"
        assert client.requests_reused == len(CHUNKED) - 2
        assert upstream.accepted_count == 1

    async def test_headers_come_lower_cased_and_stripped_and_the_trailer_is_left_out(self, client, upstream) -> None:
        status, headers, body = await exchange(client, upstream, CHUNKED)
        assert (status, body) == (200, b"hello world")
        assert headers == [(b"transfer-encoding", b"chunked"), (b"x-answer", b"42")]

    async def test_an_empty_header_value_and_repeated_headers_are_kept(self, client, upstream) -> None:
        raw = OK_HEAD + b"A:\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 0\r\n\r\n"
        _, headers, body = await exchange(client, upstream, raw)
        assert headers[:3] == [(b"a", b""), (b"set-cookie", b"a"), (b"set-cookie", b"b")]
        assert body == b""

    async def test_a_body_without_length_lasts_until_the_close(self, client, upstream) -> None:
        raw = OK_HEAD + b"\r\n" + b"x" * 100_000
        assert (await exchange(client, upstream, raw, then_close=True))[2] == b"x" * 100_000
        assert client.connections_idle == 0

    async def test_interim_responses_are_skipped(self, client, upstream) -> None:
        status, headers, body = await exchange(client, upstream, INTERIM)
        assert (status, body) == (200, b"hello world")
        assert (b"link", b"</a>") not in headers
        assert client.connections_idle == 1

    @pytest.mark.parametrize("length", [b"", b"Content-Length: 5\r\n"])
    @pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
    async def test_204_and_304_have_no_body(self, client, upstream, status: bytes, length: bytes) -> None:
        assert (await exchange(client, upstream, b"HTTP/1.1 " + status + b"\r\n" + length + b"\r\n"))[2] == b""
        assert client.connections_idle == 1

    async def test_the_answer_to_head_has_no_body_and_the_connection_lives_on(self, client, upstream) -> None:
        raw = OK_HEAD + b"Content-Length: 5\r\n\r\n"
        task = asyncio.create_task(client.send(upstream.request(method=b"HEAD", body=b""), DEADLINES))
        peer = await upstream.accept()
        await peer.answer(raw)
        response = await task
        assert await response.read() == b""
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        await peer.answer(OK)
        assert await (await task).read_all(10) == b"ok"
        assert client.requests_reused == 1

    async def test_a_compressed_body_is_passed_through_as_it_is(self, client, upstream) -> None:
        raw = OK_HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x00"
        _, headers, body = await exchange(client, upstream, raw)
        assert body == b"\x1f\x8b\x00"
        assert (b"content-encoding", b"gzip") in headers

    @pytest.mark.parametrize(
        "raw", [OK_HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", OK.replace(b"1.1", b"1.0", 1)]
    )
    async def test_a_connection_the_upstream_wants_closed_is_closed(self, client, upstream, raw: bytes) -> None:
        assert (await exchange(client, upstream, raw))[2] == b"ok"
        await until(lambda: client.connections_open == 0)

    async def test_a_large_body_in_one_piece_with_its_head_is_no_large_head(self) -> None:
        framing = parse(OK_HEAD + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000)
        assert framing.is_reusable


REFUSED = {
    "two lengths": OK_HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "length list": OK_HEAD + b"Content-Length: 2, 2\r\n\r\nok",
    "signed length": OK_HEAD + b"Content-Length: +2\r\n\r\nok",
    "length overflow": OK_HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nok",
    "empty length": OK_HEAD + b"Content-Length:\r\n\r\nok",
    "length then chunked": OK_HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked then length": OK_HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    "gzip, chunked": OK_HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": OK_HEAD + b"Transfer-Encoding: identity\r\n\r\nok",
    "chunked, gzip": OK_HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\nok",
    "xchunked": OK_HEAD + b"Transfer-Encoding: xchunked\r\n\r\nok",
    "chunked twice": OK_HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "obs-fold": OK_HEAD + b"A: b\r\n c\r\nContent-Length: 0\r\n\r\n",
    "space before colon": OK_HEAD + b"A : b\r\nContent-Length: 0\r\n\r\n",
    "no name": OK_HEAD + b": b\r\nContent-Length: 0\r\n\r\n",
    "NUL": OK_HEAD + b"A: b\x00c\r\nContent-Length: 0\r\n\r\n",
    "control": OK_HEAD + b"A: b\x01c\r\nContent-Length: 0\r\n\r\n",
    "bare LF": OK_HEAD + b"A: b\nB: c\r\nContent-Length: 0\r\n\r\n",
    "bare CR": OK_HEAD + b"A: b\rB: c\r\nContent-Length: 0\r\n\r\n",
    "name not ASCII": OK_HEAD + b"A\xff: b\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 0\r\n\r\n",
    "RTSP": b"RTSP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "ICE": b"ICE/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "leading line": b"\r\n" + OK,
    "status 099": b"HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n",
    "status 20": b"HTTP/1.1 20 X\r\nContent-Length: 0\r\n\r\n",
    "status 2000": b"HTTP/1.1 2000 X\r\nContent-Length: 0\r\n\r\n",
    "101": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "101 plain": b"HTTP/1.1 101 Switching\r\n\r\n",
    "many 1xx": b"HTTP/1.1 103 Early\r\n\r\n" * 9 + OK,
    "1xx then HTTP/2.0": b"HTTP/1.1 103 Early\r\n\r\nHTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "201 headers": OK_HEAD + b"A: b\r\n" * (HEADERS_MAX + 1) + b"\r\n",
    "long head": OK_HEAD + b"A: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n",
}
REFUSED_BODIES = {
    "size not hex": b"zz\r\nok\r\n0\r\n\r\n",
    "size with 0x": b"0x2\r\nok\r\n0\r\n\r\n",
    "size with space": b"2 \r\nok\r\n0\r\n\r\n",
    "size overflow": b"fffffffffffffffff\r\nok\r\n0\r\n\r\n",
    "size after LF": b"2\nok\r\n0\r\n\r\n",
    "data too long": b"2\r\nokay\r\n0\r\n\r\n",
    "length in trailer": b"2\r\nok\r\n0\r\nContent-Length: 2\r\n\r\n",
    "folded trailer": b"2\r\nok\r\n0\r\n a\r\n\r\n",
}


class TestRefused:
    @pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
    async def test_a_bad_head_is_refused_and_the_connection_closed(self, client, upstream, raw: bytes) -> None:
        with pytest.raises(ProtocolViolated):
            await exchange(client, upstream, raw)
        await until(lambda: client.connections_open == 0)

    @pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
    def test_a_bad_head_is_refused_byte_by_byte_as_well(self, raw: bytes) -> None:
        with pytest.raises(ProtocolViolated):
            parse(*(raw[at : at + 1] for at in range(len(raw))))

    @pytest.mark.parametrize("raw", REFUSED_BODIES.values(), ids=REFUSED_BODIES.keys())
    async def test_a_bad_chunk_is_refused_after_what_came_before_it(self, client, upstream, raw: bytes) -> None:
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        peer = await upstream.accept()
        await peer.answer(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n" + raw)
        response = await task
        with pytest.raises(ProtocolViolated):
            await response.read_all(100)
        assert await peer.gone()

    async def test_a_head_that_never_ends_is_refused_at_its_bound(self, client, upstream) -> None:
        task = asyncio.create_task(client.send(upstream.request(), DEADLINES))
        peer = await upstream.accept()
        await peer.answer(OK_HEAD)
        line = b"A: " + b"x" * 1000 + b"\r\n"
        for _ in range(2000):
            peer.send(line)
        with pytest.raises(ProtocolViolated, match="head is larger"):
            await task
        assert await peer.gone()

    @pytest.mark.parametrize("repeated", [b"1;" + b"e" * 5000 + b"\r\nx\r\n", b"T: " + b"t" * 2000 + b"\r\n"])
    def test_chunk_extensions_and_trailers_are_bounded(self, repeated: bytes) -> None:
        start = b"0\r\n" if repeated.startswith(b"T") else b""
        with pytest.raises(ProtocolViolated, match="extensions or trailers"):
            parse(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + start, *[repeated] * 100)

    def test_a_body_of_single_characters_as_chunks_is_not_taken_for_an_attack(self) -> None:
        framing = parse(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 50_000, b"0\r\n\r\n")
        assert framing.is_reusable

    async def test_no_message_quotes_the_request_or_the_response(self, client, upstream) -> None:
        headers = [(b"authorization", b"Bearer planted")]
        with pytest.raises(ProtocolViolated) as caught:
            await exchange(client, upstream, OK_HEAD + b"planted\x00: x\r\n\r\n", headers=headers, body=b"planted")
        assert "planted" not in str(caught.value)


SURPLUS = {
    "a byte": b"X",
    "a response": OK,
    "half a response": b"HTTP/1.1 20",
    "a line": b"\r\n",
    "a line feed": b"\n",
}


class TestSurplus:
    @pytest.mark.parametrize("surplus", SURPLUS.values(), ids=SURPLUS.keys())
    @pytest.mark.parametrize("raw", [OK, CHUNKED, OK_HEAD + b"Content-Length: 0\r\n\r\n", b"HTTP/1.1 204 N\r\n\r\n"])
    async def test_surplus_bytes_keep_a_connection_out_of_the_pool(self, client, upstream, raw, surplus) -> None:
        """Guarantee: bytes after the end can never become somebody else's answer; the response itself stands."""
        status, _, _ = await exchange(client, upstream, raw + surplus)
        assert status in (200, 204)
        await until(lambda: client.connections_open == 0)
        assert client.connections_idle == 0

    async def test_a_body_after_the_answer_to_head_is_surplus(self, client, upstream) -> None:
        await exchange(client, upstream, OK, method=b"HEAD", body=b"")
        await until(lambda: client.connections_open == 0)


class TestLost:
    @pytest.mark.parametrize(
        "raw",
        [SIZED[:-1], CHUNKED[:-1], CHUNKED[:-30], OK_HEAD + b"Content-Length: 1\r\n\r\n"],
        ids=["sized", "before the last byte", "mid-chunk", "no body"],
    )
    async def test_an_early_close_is_never_taken_for_the_end(self, client, upstream, raw: bytes) -> None:
        with pytest.raises(ConnectionLost) as caught:
            await exchange(client, upstream, raw, then_close=True)
        assert caught.value.response_started

    async def test_a_close_within_the_head_is_a_loss_after_the_start(self, client, upstream) -> None:
        with pytest.raises(ConnectionLost) as caught:
            await exchange(client, upstream, b"HTTP/1.1 200 OK\r\nA", then_close=True)
        assert caught.value.response_started

    async def test_a_close_without_a_byte_is_a_loss_before_the_start(self, client, upstream) -> None:
        with pytest.raises(ConnectionLost) as caught:
            await exchange(client, upstream, b"", then_close=True)
        assert not caught.value.response_started


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(noise=st.binary(max_size=300))
def test_no_bytes_at_all_raise_anything_but_a_violation(noise: bytes) -> None:
    for raw in (noise, OK_HEAD + noise, OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + noise):
        with contextlib.suppress(ProtocolViolated):
            parse(raw)
