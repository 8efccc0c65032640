"""Forms go upstream in one plain spelling: what was read here is what every other parser reads, and nothing more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.errors import BodyInvalid
from inference.forms import Form, form_of
from tests.harness.forms import read_form

TYPE = b"multipart/form-data; boundary=b"
CHANGES = {"response_format": b"json", "model": b"deployed"}


def part(name: str, value: bytes, style: str = 'Content-Disposition: form-data; name="{}"') -> bytes:
    return b"--b\r\n" + style.replace("{}", name).encode() + b"\r\n\r\n" + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def read(one: Form) -> list[tuple[str, bytes]]:
    return [(found.name, found.value) for found in one.parts()]


def written(body: bytes, changes: dict[str, bytes] | None = None) -> list[tuple[str, str | None, bytes]]:
    """As another parser reads what is sent."""
    one = form_of(TYPE, body)
    return [tuple(found) for found in read_form(one.media_type.decode(), one.written(changes or {}))]


STYLES = [
    'Content-Disposition: form-data; name="{}"',
    "content-disposition:form-data;name={}",
    'CONTENT-DISPOSITION: form-data; name = "{}"; other=1',
    'Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="{}"',
    'Content-Disposition: form-data; name="{}"; filename="ü \\" ; name=model; z=.mp3"\r\nX-Length: 4',
    'Content-Disposition: form-data; name="{}"; filename="C:\\"',
    'Content-Disposition: form-data; name="model"\r\nContent-Disposition: form-data; name="{}"',
    'Content-Disposition: form-data;\r\n name="{}"',
    'Content-Disposition: form-data; name="{}\\"; filename="; name=model; z="',
    'Content-Disposition: form-data; name="{}%0D%0AContent-Disposition: form-data; name=model; z="',
    "Content-Disposition: form-data; name={}; filename*=utf-8''a%22%0D%0A%C3%BC.mp3",
    'Content-Disposition: form-data; name="{}"\r\nContent-Type: a\nContent-Disposition: form-data; name=model',
]
# What may stand in a value or around the parts, all of it meant to be taken for something else.
SMUGGLED = b'Content-Disposition: form-data; name="model"\r\n\r\nsmuggled'
BAIT = [
    *(b"--b\r\n", b"\n--b\r\n", b"\r--b\r\n", b"y--b\r\n", b"--b--", b"\r\n--b--\r\n", b"\r\n\r\n"),
    *(b"--b\r\n" + SMUGGLED, b"\n--b\n" + SMUGGLED, SMUGGLED, b"text", b"\n", b"\r", b"x"),
]
pieces = st.lists(st.sampled_from(BAIT), max_size=5).map(b"".join)
some_parts = st.lists(
    st.builds(part, st.sampled_from(["file", "model", "response_format", "x"]), pieces, st.sampled_from(STYLES)),
    max_size=4,
)


@given(parts=some_parts, before=pieces, behind=pieces)
def test_every_parser_reads_what_was_read_here_but_for_the_values_that_change(
    parts: list[bytes], before: bytes, behind: bytes
) -> None:
    """Guarantee: no form names one model to us and another one to a provider."""
    try:
        one = form_of(TYPE, before + form(*parts) + behind)
        was, sent = read(one), one.written(CHANGES)
    except BodyInvalid:
        return
    wanted = [(name, CHANGES.get(name, value)) for name, value in was]
    assert read(form_of(one.media_type, sent)) == wanted
    if wanted:
        # The standard library folds a last line end into the part; apart from that it reads each to the byte.
        theirs = read_form(one.media_type.decode(), sent)
        assert [found.name for found in theirs] == [name for name, _ in wanted]
        ours = [value for _, value in wanted]
        assert [found.value.rstrip(b"\r\n") for found in theirs] == [value.rstrip(b"\r\n") for value in ours]
    # Nothing is there but the parts: no preamble, no epilogue, one head for each.
    delimiter = b"--" + one.media_type.partition(b"boundary=")[2]
    assert sent.count(delimiter) == len(was) + 1
    assert sent.startswith(delimiter)
    assert sent.endswith(delimiter + b"--\r\n")


@pytest.mark.parametrize(
    "style",
    [
        'Content-Disposition: form-data; name="{}\\"; filename="; name=model; z="',
        'Content-Disposition: form-data; name="{}%0D%0AContent-Disposition: form-data; name=model; z="',
        'Content-Disposition: form-data; name="{}%22; name=model"',
        'Content-Disposition: form-data; name="{}"\r\nContent-Type: a\nContent-Disposition: form-data; name=model',
        'Content-Disposition: form-data; name=""',
    ],
)
def test_a_head_that_may_be_read_in_two_ways_is_refused(style: str) -> None:
    one = form_of(TYPE, form(part("model", b"cheap"), part("x", b"dear", style)))
    with pytest.raises(BodyInvalid):
        read(one)
    with pytest.raises(BodyInvalid):
        one.written({})


@pytest.mark.parametrize(
    ("disposition", "filename"),
    [
        ('filename="a.mp3"', "a.mp3"),
        ('filename="日本.mp3"', "日本.mp3"),
        ('filename="a\\"b.mp3"', "a%22b.mp3"),
        ('filename="a%22b.mp3"', "a%22b.mp3"),
        ('filename="a%0Ab.mp3"', "a%0Ab.mp3"),
        ('filename="a\tb.mp3"', "a_b.mp3"),
        ('filename="trailing\\\\"', "trailing%5C%5C"),
        ("filename*=utf-8''%C3%BC.mp3", "ü.mp3"),
        ("filename=\"plain.mp3\"; filename*=utf-8''%C3%BC.mp3", "plain.mp3"),
    ],
)
def test_a_file_keeps_its_name_in_plain_letters(disposition: str, filename: str) -> None:
    """Guarantee: it stays a file, with its ending, as clients of many languages write it."""
    one = form_of(TYPE, form(part("file", b"\x00\r\n--x", 'Content-Disposition: form-data; name="{}"; ' + disposition)))
    assert f'; filename="{filename}"\r\n'.encode() in one.written({})
    assert [found.is_file for found in one.parts()] == [True]


def test_fields_that_are_given_several_times_stay_so_in_order() -> None:
    body = form(*[part("timestamp_granularities[]", value) for value in (b"word", b"segment")], part("model", b"m"))
    assert [value for _, _, value in written(body, {"model": b"n"})] == [b"word", b"segment", b"n"]


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data; boundary=\xe9",
        b'multipart/form-data; boundary="a\tb"',
        b'multipart/form-data; boundary="a "',
        b'multipart/form-data; boundary=""',
        b"multipart/form-data; boundary=" + b"b" * 71,
        b"multipart/form-data",
        b"multipart/mixed; boundary=b",
        b"text/plain",
    ],
)
def test_a_boundary_that_is_none_is_refused(content_type: bytes) -> None:
    with pytest.raises(BodyInvalid):
        form_of(content_type, form(part("model", b"m")))


@pytest.mark.parametrize(
    "bait",
    [
        b"content-disposition:",
        b"content-disposition:;name=response_format\r\n",
        b"\r\n--b",
        b"\r\n--bb\r\n",
        b"\r\n--b\r",
        b"\r\n\r\n",
    ],
)
def test_a_file_cannot_keep_us_busy(bait: bytes) -> None:
    """Guarantee: the time it takes is the time to read the form. (By the square of it, this would take hours.)"""
    value = bait * (10_000_000 // len(bait)) + b"x"
    file = part("file", value, 'Content-Disposition: form-data; name="{}"; filename="a"')
    try:
        sent = form_of(TYPE, form(file, part("response_format", b"text"))).written(CHANGES)
    except BodyInvalid:
        assert bait.startswith(b"\r\n--b")  # a delimiter that goes on as none may
    else:
        assert value in sent
        assert b"\r\n\r\njson\r\n--" in sent
