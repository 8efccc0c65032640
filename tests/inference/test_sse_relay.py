"""The relay of server-sent events: bytes are what matters, never how they were split."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.upstreams.sse import SseRelay
from tests.harness.provider import chunk

EVENTS = [
    b": comment",
    b"data: " + chunk("Grüße, 世界 🌍"),
    b"event: x\ndata: " + chunk('say "usage":null and \\"error\\"'),
    b"data:" + chunk("no space"),
    b"data: " + chunk(finish="stop"),
]
USAGE = b"data: " + chunk(usage=(11, 22))
DONE = b"data: [DONE]"


def joined(events: list[bytes], end: bytes) -> bytes:
    return b"".join(event.replace(b"\n", end) + end + end for event in events)


def relayed(relay: SseRelay, pieces: list[bytes]) -> bytes:
    return b"".join([relay.feed(piece) for piece in pieces]) + relay.finish()


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("hides", [True, False])
def test_every_split_point_gives_the_same_bytes(end: bytes, hides: bool) -> None:
    """Guarantee: what the caller gets does not depend on where the network cut the stream."""
    whole = joined([*EVENTS, USAGE, DONE], end)
    kept = joined([*EVENTS, DONE], end).replace(b',"usage":null', b"") if hides else whole
    for at in range(len(whole) + 1):
        relay = SseRelay(hides_usage=hides)
        assert relayed(relay, [whole[:at], whole[at:]]) == kept
        assert relay.usage is not None
        assert relay.usage.counts() == (11, 22)
        assert relay.is_done
        assert relay.error is None


@given(cuts=st.lists(st.integers(0, 2000), max_size=30), end=st.sampled_from([b"\n", b"\r", b"\r\n"]))
@settings(max_examples=300, deadline=None)
def test_any_number_of_cuts_gives_the_same_bytes(cuts: list[int], end: bytes) -> None:
    whole = joined([*EVENTS, USAGE, DONE], end)
    places = [0, *sorted({cut for cut in cuts if cut < len(whole)}), len(whole)]
    pieces = [whole[a:b] for a, b in zip(places, places[1:], strict=False)]
    relay = SseRelay(hides_usage=True)
    assert relayed(relay, pieces) == joined([*EVENTS, DONE], end).replace(b',"usage":null', b"")
    assert relay.usage is not None


def test_byte_by_byte_gives_the_same_bytes() -> None:
    whole = joined([*EVENTS, USAGE, DONE], b"\r\n")
    relay = SseRelay(hides_usage=False)
    assert relayed(relay, [whole[at : at + 1] for at in range(len(whole))]) == whole


def test_words_about_usage_inside_an_answer_are_left_alone() -> None:
    text = 'x,"usage":null,{"usage":{"prompt_tokens":1}} [DONE] "error": 1'
    whole = joined([b"data: " + chunk(text), DONE], b"\n")
    relay = SseRelay(hides_usage=True)
    out = relayed(relay, [whole])
    first = out.split(b"\n\n")[0].removeprefix(b"data: ")
    assert msgspec.json.decode(first)["choices"][0]["delta"]["content"] == text
    assert relay.usage is None
    assert relay.error is None


def test_a_large_event_goes_on_in_pieces_and_whole() -> None:
    """Guarantee: an event of any size is passed on without being held in memory."""
    event = b"data: " + b"x" * (8 * 1024 * 1024)
    whole = joined([EVENTS[1], event, USAGE, DONE], b"\n")
    relay = SseRelay(hides_usage=True)
    pieces = [whole[at : at + 65_536] for at in range(0, len(whole), 65_536)]
    out: list[bytes] = []
    held_bytes_max = 0
    for piece in pieces:
        out.append(relay.feed(piece))
        held_bytes_max = max(held_bytes_max, len(relay._held))
    assert b"".join(out) + relay.finish() == joined([EVENTS[1], event, DONE], b"\n").replace(b',"usage":null', b"")
    assert held_bytes_max <= 256 * 1024 + 65_536
    assert relay.usage is not None


def test_an_error_event_is_noticed_and_passed_on() -> None:
    whole = joined([EVENTS[1], b'data: {"error":{"message":"no"}}'], b"\n")
    relay = SseRelay(hides_usage=False)
    assert relayed(relay, [whole]) == whole
    assert relay.error == b'{"message":"no"}'


@pytest.mark.parametrize("value", [b"null", b"false", b"{}", b'""'])
def test_an_empty_error_is_none(value: bytes) -> None:
    relay = SseRelay(hides_usage=False)
    relay.feed(b'data: {"choices":[],"error":' + value + b"}\n\n")
    assert relay.error is None


def test_an_unterminated_last_event_is_passed_on() -> None:
    relay = SseRelay(hides_usage=True)
    assert relay.feed(b"data: {}\n\ndata: tail") + relay.finish() == b"data: {}\n\ndata: tail"


@given(st.binary(max_size=400), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_are_never_lost_or_changed(data: bytes, at: int) -> None:
    relay = SseRelay(hides_usage=False)
    assert relayed(relay, [data[:at], data[at:]]) == data
