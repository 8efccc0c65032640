"""Forms go upstream in one plain spelling: what was read here is what is sent, and nothing that was read past."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.errors import BodyInvalid
from inference.forms import media_type_of, parts_of, written

TYPE = b"multipart/form-data; boundary=b"
CHANGES = {"response_format": b"json", "model": b"deployed"}


def part(name: str, value: bytes, style: str = 'Content-Disposition: form-data; name="{}"') -> bytes:
    return b"--b\r\n" + style.format(name).encode() + b"\r\n\r\n" + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def read(body: bytes, content_type: bytes = TYPE) -> list[tuple[str, str | None, str, bytes]]:
    return [(one.name, one.filename, one.content_type, one.value) for one in parts_of(content_type, body)]


STYLES = [
    'Content-Disposition: form-data; name="{}"',
    "content-disposition:form-data;name={}",
    'CONTENT-DISPOSITION: form-data; name = "{}"; other=1',
    'Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="{}"',
    'Content-Disposition: form-data; name="{}"; filename="ü \\" ; name=model; z=.mp3"\r\nX-Length: 4',
    'Content-Disposition: form-data; name="model"\r\nContent-Disposition: form-data; name="{}"',
    'Content-Disposition: form-data;\r\n name="{}"',
]
# What may stand in a file or around the parts, all of it meant to be taken for something else.
BAIT = [
    b"--b\r\n",
    b"\r\n--b",
    b"--b--",
    b"\r\n--b--\r\n",
    b"\r\n\r\n",
    b'Content-Disposition: form-data; name="response_format"',
    b"text",
    b"\n",
    b"\r",
    b"x",
]
pieces = st.lists(st.sampled_from(BAIT), max_size=5).map(b"".join)
some_parts = st.lists(
    st.builds(part, st.sampled_from(["file", "model", "response_format", "x"]), pieces, st.sampled_from(STYLES)),
    max_size=4,
)


@given(parts=some_parts, before=pieces, behind=pieces)
def test_what_is_sent_is_what_was_read_but_for_the_values_that_change(
    parts: list[bytes], before: bytes, behind: bytes
) -> None:
    """Guarantee: whatever the form looks like; and written once more, it does not change any more."""
    body = before + form(*parts) + behind
    try:
        was = read(body)
        sent = written(TYPE, body, CHANGES)
    except BodyInvalid:
        return
    assert read(sent) == [(*head, CHANGES.get(head[0], value)) for *head, value in was]
    assert written(TYPE, sent, {}) == sent
    # Nothing is there but the parts: no preamble, no epilogue, one head for each.
    assert sent.startswith(b"--b\r\nContent-Disposition: form-data; name=") or sent == b"--b--\r\n"
    assert sent.endswith(b"--b--\r\n")
    assert sent.count(b"\r\n\r\n") >= len(was)


def test_a_usual_form_is_sent_as_it_came() -> None:
    file = 'Content-Disposition: form-data; name="{}"; filename="a.mp3"\r\nContent-Type: audio/mpeg'
    body = form(part("model", b"m"), part("file", b"\x00\r\n--x", file))
    assert written(TYPE, body, {}) == body
    assert written(TYPE, body, {"model": b"n"}) == body.replace(b"\r\n\r\nm\r\n", b"\r\n\r\nn\r\n")


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
def test_a_boundary_that_may_be_read_in_two_ways_is_refused(content_type: bytes) -> None:
    with pytest.raises(BodyInvalid):
        media_type_of(content_type)
    with pytest.raises(BodyInvalid):
        read(form(part("model", b"m")), content_type)


@pytest.mark.parametrize(
    ("content_type", "plain"),
    [
        (b"multipart/form-data; boundary=b", b"multipart/form-data; boundary=b"),
        (b'Multipart/Form-Data;boundary="b";charset=x', b"multipart/form-data; boundary=b"),
        (b"multipart/form-data; boundary=q; boundary=b", b"multipart/form-data; boundary=b"),
        (b'multipart/form-data; boundary="a b:c"', b'multipart/form-data; boundary="a b:c"'),
    ],
)
def test_the_media_type_has_one_plain_spelling(content_type: bytes, plain: bytes) -> None:
    assert media_type_of(content_type) == plain


@pytest.mark.parametrize("style", ['Content-Disposition: form-data; name="{}"\nX: y', "Content-Type: a\nb"])
def test_a_head_with_control_characters_is_not_sent_on(style: str) -> None:
    with contextlib.suppress(BodyInvalid):
        sent = written(TYPE, form(part("model", b"m", style)), {})
        assert b"\n" not in sent.replace(b"\r\n", b"")


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
    file = 'Content-Disposition: form-data; name="{}"; filename="a"'
    body = form(part("file", bait * (10_000_000 // len(bait)), file), part("response_format", b"text"))
    with contextlib.suppress(BodyInvalid):
        assert written(TYPE, body, CHANGES).endswith(b"\r\n\r\njson\r\n--b--\r\n")
