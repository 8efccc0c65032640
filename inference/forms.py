"""Multipart forms, changed where a provider is to read something else than the caller wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import multipart

from inference.errors import BodyInvalid

# A part's headers name it and its type; the parser that reads forms first (`inference/wire.py`) bounds their number.
_HEAD_BYTES_MAX: Final = 4_096
_DISPOSITION: Final = b"content-disposition:"


def boundary_of(content_type: bytes) -> str:
    """Return what separates the parts of a form. Errors: BodyInvalid where it is no form, or has none."""
    kind, options = _options(content_type)
    boundary = options.get("boundary", "")
    if kind.lower() != "multipart/form-data" or not boundary:
        raise BodyInvalid("Invalid form: expected multipart/form-data with a boundary.")
    return boundary


def with_values(form: bytes, content_type: bytes, changes: Mapping[str, tuple[str, str]]) -> bytes:
    """Return *form* with other values of some fields: name -> what it says, and what it is to say.

    Only the heads of parts are looked into, each once, whatever the caller makes of the rest.
    Errors: BodyInvalid unless each of the fields is there once, and says that.
    """
    delimiter = b"\r\n--" + boundary_of(content_type).encode("latin-1")
    left = dict(changes)
    pieces: list[bytes] = []
    done = 0
    for name, start in _parts(form, delimiter):
        if name not in left:
            continue
        said, wanted = (text.encode() for text in left[name])
        end = start + len(said)
        if form[start:end] != said or not form.startswith(delimiter, end):
            break
        del left[name]
        pieces += (form[done:start], wanted)
        done = end
    if left:
        name = next(iter(left))
        raise BodyInvalid(f"Invalid form: the {name} part is not in its usual form.", param=name)
    return b"".join((*pieces, form[done:]))


def _parts(form: bytes, delimiter: bytes) -> Iterator[tuple[str, int]]:
    """Yield the name of each part that has one, and where its value begins."""
    line = delimiter + b"\r\n"
    # The first part has no line end before it.
    start = len(line) - 2 if form.startswith(line[2:]) else _behind(line, form, 0)
    while start >= 0:
        end = form.find(b"\r\n\r\n", start, start + _HEAD_BYTES_MAX)
        name = _name(form[start:end]) if end >= 0 else ""
        if name:
            yield name, end + 4
        # The line end that closes the head is no part's.
        start = _behind(line, form, start if end < 0 else end + 4)


def _behind(line: bytes, form: bytes, start: int) -> int:
    found = form.find(line, start)
    return found if found < 0 else found + len(line)


def _name(head: bytes) -> str:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(_DISPOSITION):
            return _options(line[len(_DISPOSITION) :].strip())[1].get("name", "")
    return ""


def _options(header: bytes) -> tuple[str, dict[str, str]]:
    return cast("Any", multipart).parse_options_header(header.decode("latin-1"))
