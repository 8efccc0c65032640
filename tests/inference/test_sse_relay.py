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


def picture(
    *, kind: str = "completed", bytes_large: int = 300_000, is_usage_first: bool = False, tokens: int = 9
) -> bytes:
    usage = b'"usage":{"input_tokens":3,"output_tokens":%d,"total_tokens":%d}' % (tokens, tokens + 3)
    large = b'"b64_json":"%b"' % (b"A" * bytes_large)
    first, second = (usage, large) if is_usage_first else (large, usage)
    return b'data: {"type":"image_generation.%b",%b,%b}' % (kind.encode(), first, second)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([10, 200_000, 262_144, 300_000, 600_000]), min_size=1, max_size=3),
    is_usage_first=st.booleans(),
    end=st.sampled_from([b"\n", b"\r\n"]),
    piece=st.sampled_from([1_000, 4_097, 65_536, 262_144, 10**7]),
)
def test_the_usage_of_a_large_event_is_found_however_it_is_split(
    sizes: list[int], end: bytes, piece: int, *, is_usage_first: bool
) -> None:
    events = [
        picture(bytes_large=size, is_usage_first=is_usage_first, tokens=number) for number, size in enumerate(sizes, 1)
    ]
    whole = b"".join(event + end + end for event in events)
    relay = SseRelay(hides_usage=False)
    out = b"".join(relay.feed(whole[at : at + piece]) for at in range(0, len(whole), piece)) + relay.finish()
    assert out == whole
    assert relay.usage is not None
    assert relay.usage.counts() == (3, len(sizes))
    assert relay.is_usage_last
    assert relay.events == len(sizes)


@pytest.mark.parametrize(
    "behind",
    [
        picture(kind="partial_image")[:-1_000],
        picture(kind="partial_image") + b"\n\n",
        b'data: {"choices":[{"delta":{"content":"%b"}}],"usage":{"prompt_tokens":100,"completion_tokens":2}}\n\n'
        % (b"A" * 300_000),
        picture(is_usage_first=True)[:-1_000],
        picture() + b"\n\ndata: {}\n\n",
    ],
)
def test_a_usage_that_is_not_the_last_word_is_not_taken_for_it(behind: bytes) -> None:
    relay = SseRelay(hides_usage=False)
    for at in range(0, len(behind), 10_000):
        relay.feed(behind[at : at + 10_000])
    assert not relay.is_usage_last


def test_a_large_event_that_nothing_ends_is_looked_into_all_the_same() -> None:
    whole = picture() + b"\n"
    relay = SseRelay(hides_usage=False)
    out = b"".join(relay.feed(whole[at : at + 10_000]) for at in range(0, len(whole), 10_000))
    assert out + relay.finish() == whole
    assert relay.usage is not None
    assert relay.usage.counts() == (3, 9)


def test_words_about_usage_in_a_large_event_are_words() -> None:
    words = msgspec.json.encode({"choices": [{"delta": {"content": '"usage":{"prompt_tokens":1}' * 20_000}}]})
    relay = SseRelay(hides_usage=False)
    relay.feed(b"data: " + words + b"\n\n")
    relay.feed(b"data: " + words)
    relay.feed(b"\n\n")
    assert relay.usage is None


def test_a_usage_that_came_before_a_large_event_is_not_its_own() -> None:
    early = (
        b'data: {"type":"image_generation.partial_image","usage":{"input_tokens":3,"output_tokens":1,"total_tokens":4}}'
    )
    large = b'data: {"type":"image_generation.completed","b64_json":"%b"}' % (b"A" * 300_000)
    whole = early + b"\n\n" + large + b"\n\n"
    relay = SseRelay(hides_usage=False)
    for at in range(0, len(whole), 10_000):
        relay.feed(whole[at : at + 10_000])
    assert relay.usage is not None
    assert not relay.is_usage_last


@pytest.mark.parametrize("hides", [True, False])
def test_a_burst_of_usages_is_passed_on_whole(hides: bool) -> None:
    """Guarantee: in one look at each. (By the square of their number this would take minutes.)"""
    one = b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n'
    content = b"data: " + chunk("x").replace(b',"usage":null', b"") + b"\n\n"
    whole = (one + content) * 20_000 + one
    relay = SseRelay(hides_usage=hides)
    assert relay.feed(whole) == (content * 20_000 if hides else whole)
    assert relay.is_usage_last
