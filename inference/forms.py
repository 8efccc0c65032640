"""Multipart forms. What goes upstream is put together again from what was read here, and never the caller's bytes.

Two parsers may read one form in two ways: an odd boundary, a head with two names, text behind the end. A model that is
named where we do not look and a provider does would be neither permitted nor priced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, cast

import multipart
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from inference.errors import BodyInvalid

_PARTS_MAX: Final = 64
# RFC 2046, 5.1.1. The last character is no blank.
_BOUNDARY: Final = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
# RFC 9110, 5.6.2: what stands without quotes.
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f]")


class Part(NamedTuple):
    """One part of a form, as far as anybody needs it. *content_type* is "" where it has none."""

    name: str
    filename: str | None
    content_type: str
    pieces: list[bytes]

    @property
    def value(self) -> bytes:
        """What it says."""
        return b"".join(self.pieces)


def parts_of(content_type: bytes, form: bytes) -> Iterator[Part]:
    """Yield the parts of *form*. Errors: BodyInvalid for what is no form, or cannot be sent on."""
    part: Part | None = None
    try:
        with PushMultipartParser(
            _boundary_of(content_type), content_length=len(form), max_segment_count=_PARTS_MAX
        ) as parser:
            for event in parser.parse(form):
                if isinstance(event, MultipartSegment):
                    types = [value for name, value in event.headerlist if name == "Content-Type"]
                    part = Part(str(event.name), event.filename, types[-1] if types else "", [])
                elif event is not None and part is not None:
                    part.pieces.append(bytes(event))
                elif part is not None:
                    yield part
    except (MultipartError, UnicodeDecodeError):
        raise BodyInvalid("Invalid form: it could not be parsed.") from None


def media_type_of(content_type: bytes) -> bytes:
    """Return a form's media type in its one plain spelling. Errors: BodyInvalid where it is no form's.

    The boundary stays the caller's: no other one is known not to stand in what is sent.
    """
    boundary = _boundary_of(content_type).encode()
    return b"multipart/form-data; boundary=" + (boundary if _TOKEN.fullmatch(boundary) else b'"%b"' % boundary)


def written(content_type: bytes, form: bytes, changes: Mapping[str, bytes]) -> bytes:
    """Return *form* in its one plain spelling, with other values of some fields. Errors: BodyInvalid."""
    delimiter = b"--" + _boundary_of(content_type).encode()
    out: list[bytes] = []
    for part in parts_of(content_type, form):
        out += (delimiter, b"\r\n", _head_of(part))
        out += [changes[part.name]] if part.name in changes else part.pieces
        out.append(b"\r\n")
    out += (delimiter, b"--\r\n")
    return b"".join(out)


def _boundary_of(content_type: bytes) -> str:
    found: tuple[str, dict[str, str]] = cast("Any", multipart).parse_options_header(content_type.decode("latin-1"))
    boundary = found[1].get("boundary", "")
    if found[0].lower() != "multipart/form-data" or not boundary:
        raise BodyInvalid("Invalid form: expected multipart/form-data with a boundary.")
    if not _BOUNDARY.fullmatch(boundary):
        raise BodyInvalid("Invalid form: its boundary has characters that no boundary may have.")
    return boundary


def _head_of(part: Part) -> bytes:
    head = f'Content-Disposition: form-data; name="{_quoted(part.name)}"'
    if part.filename is not None:
        head += f'; filename="{_quoted(part.filename)}"'
    if part.content_type:
        head += f"\r\nContent-Type: {part.content_type}"
    if _CONTROLS.search(head.replace("\r\n", "", 1)):
        raise BodyInvalid("Invalid form: a part's head has control characters.")
    return head.encode() + b"\r\n\r\n"


def _quoted(text: str) -> str:
    """Return *text* as it stands between quotes: as browsers write it (WHATWG HTML, multipart/form-data encoding)."""
    return text.replace('"', "%22")
