"""Forms, changed where the provider is to read something else: these fields and nothing else, whatever the rest is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multipart import MultipartSegment, PushMultipartParser

from inference.errors import BodyInvalid
from inference.forms import with_values

TYPE = b"multipart/form-data; boundary=b"
CHANGES = {"response_format": ("text", "json")}


def part(name: str, value: bytes, style: str = 'Content-Disposition: form-data; name="{}"') -> bytes:
    return b"--b\r\n" + style.format(name).encode() + b"\r\n\r\n" + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def read(body: bytes) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    with PushMultipartParser("b", content_length=len(body)) as parser:
        for piece in parser.parse(body):
            if isinstance(piece, MultipartSegment):
                found.append((str(piece.name), b""))
            elif piece is not None:
                found[-1] = (found[-1][0], found[-1][1] + bytes(piece))
    return found


STYLES = [
    'Content-Disposition: form-data; name="{}"',
    "content-disposition:form-data;name={}",
    'CONTENT-DISPOSITION: form-data; name = "{}"; other=1',
    'Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="{}"',
    'Content-Disposition: form-data; name="{}"\r\nX-Length: 4',
]
# What a file may hold, all of it meant to be taken for something else.
BAIT = [
    b"--b\r\n",
    b"\r\n--b",
    b"--b--",
    b"\r\n\r\n",
    b'Content-Disposition: form-data; name="response_format"',
    b"text",
    b"\n",
    b"\r",
    b"x",
]


@given(
    style=st.sampled_from(STYLES),
    before=st.lists(st.tuples(st.sampled_from(["file", "model", "x"]), st.lists(st.sampled_from(BAIT))), max_size=3),
    behind=st.lists(st.tuples(st.sampled_from(["file", "prompt"]), st.lists(st.sampled_from(BAIT))), max_size=3),
)
def test_the_field_says_what_is_wanted_and_all_else_is_as_it_was(
    style: str, before: list[tuple[str, list[bytes]]], behind: list[tuple[str, list[bytes]]]
) -> None:
    """Guarantee: as the parser reads the form that came, so is the form that goes, but for the one value."""
    around = [[part(name, b"".join(pieces)) for name, pieces in side] for side in (before, behind)]
    body = form(*around[0], part("response_format", b"text", style), *around[1])
    try:
        parts = read(body)
    except Exception:  # noqa: BLE001 - what is no form is refused before it comes here
        return
    if [value for name, value in parts if name == "response_format"] != [b"text"]:
        return
    changed = read(with_values(body, TYPE, CHANGES))
    assert changed == [(name, b"json" if name == "response_format" else value) for name, value in parts]


def test_two_fields_at_once_in_either_order() -> None:
    model, wanted = part("model", b"a"), part("response_format", b"text")
    file = part("file", b"text\r\na", 'Content-Disposition: form-data; name="{}"; filename="a"')
    for parts in ([model, wanted, file], [file, wanted, model]):
        changed = with_values(form(*parts), TYPE, {**CHANGES, "model": ("a", "bee")})
        assert dict(read(changed)) == {"model": b"bee", "response_format": b"json", "file": b"text\r\na"}


@pytest.mark.parametrize(
    "body",
    [
        form(part("response_format", b"text ")),
        form(part("response_format", b"srt")),
        form(part("file", b"text")),
        form(part("response_format", b"text", "X: " + "x" * 5_000 + '\r\nContent-Disposition: form-data; name="{}"')),
        b"",
    ],
)
def test_a_field_that_does_not_say_so_is_refused(body: bytes) -> None:
    with pytest.raises(BodyInvalid, match="response_format"):
        with_values(body, TYPE, CHANGES)


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
    """Guarantee: the time it takes is the time to read the form once. (By the square of it, this would take hours.)"""
    file = bait * (10_000_000 // len(bait))
    body = form(
        part("file", file, 'Content-Disposition: form-data; name="{}"; filename="a"'), part("response_format", b"text")
    )
    assert with_values(body, TYPE, CHANGES).endswith(b"\r\n\r\njson\r\n--b--\r\n")
