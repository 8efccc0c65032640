"""Multipart forms. What goes upstream is put together again from what was read here, and never the caller's bytes.

Two parsers may read one form in two ways: names with quotes, heads with two of them, delimiters where a line begins
otherwise, text behind the end. A model that is named where we do not look and a provider does would be neither
permitted nor priced. So names are plain, and parts are divided by a boundary that no caller knows.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, cast
from urllib.parse import unquote

import msgspec
import multipart
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from inference.errors import BodyInvalid

_PARTS_MAX: Final = 64
# RFC 2046, 5.1.1. The last character is no blank.
_BOUNDARY: Final = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
# Every field of OpenAI's forms fits, `timestamp_granularities[]` among them.
_NAME: Final = re.compile(r"[0-9A-Za-z_.\[\]-]{1,100}")
_MEDIA_TYPE: Final = re.compile(r"[ -~]{1,200}")
_EXTENDED_FILENAME: Final = re.compile(r"filename\*\s*=\s*[^;']*'[^;']*'([^;]*)", re.IGNORECASE)
# As browsers write file names (WHATWG HTML, multipart/form-data); a backslash would undo the quote behind it.
_ESCAPES: Final = str.maketrans(
    {**{chr(code): "_" for code in (*range(0x20), 0x7F)}, "\r": "%0D", "\n": "%0A", '"': "%22", "\\": "%5C"}
)


class Part(NamedTuple):
    """One part of a form: its name, what is said of it upstream, and what it says."""

    name: str
    is_file: bool
    head: bytes
    pieces: list[bytes]

    @property
    def value(self) -> bytes:
        """What it says, in one piece."""
        return b"".join(self.pieces)


class Form(msgspec.Struct, frozen=True):
    """A form as it came, and how it is divided when it is sent on."""

    body: bytes
    came_boundary: str
    sent_boundary: str

    def __repr__(self) -> str:
        return f"Form({len(self.body)} bytes)"

    @property
    def media_type(self) -> bytes:
        """The media type of what is sent."""
        return b"multipart/form-data; boundary=" + self.sent_boundary.encode()

    def parts(self) -> Iterator[Part]:
        """Yield the parts. Errors: BodyInvalid for what is no form, or has a head that is not plain."""
        part: Part | None = None
        try:
            with PushMultipartParser(
                self.came_boundary, content_length=len(self.body), max_segment_count=_PARTS_MAX
            ) as parser:
                for event in parser.parse(self.body):
                    if isinstance(event, MultipartSegment):
                        part = _part_of(event)
                    elif event is not None and part is not None:
                        part.pieces.append(bytes(event))
                    elif part is not None:
                        yield part
        except (MultipartError, UnicodeDecodeError):
            raise BodyInvalid("Invalid form: it could not be parsed.") from None

    def written(self, changes: Mapping[str, bytes]) -> bytes:
        """Return the form as it is sent, with other values of some fields. Errors: as `parts`."""
        delimiter = b"--" + self.sent_boundary.encode()
        out: list[bytes] = []
        for part in self.parts():
            out += (delimiter, b"\r\n", part.head)
            out += [changes[part.name]] if part.name in changes else part.pieces
            out.append(b"\r\n")
        out += (delimiter, b"--\r\n")
        return b"".join(out)


def form_of(content_type: bytes, body: bytes) -> Form:
    """Return *body* as a form. Errors: BodyInvalid where its media type is no form's."""
    found: tuple[str, dict[str, str]] = cast("Any", multipart).parse_options_header(content_type.decode("latin-1"))
    boundary = found[1].get("boundary", "")
    if found[0].lower() != "multipart/form-data" or not boundary:
        raise BodyInvalid("Invalid form: expected multipart/form-data with a boundary.")
    if not _BOUNDARY.fullmatch(boundary):
        raise BodyInvalid("Invalid form: its boundary has characters that no boundary may have.")
    return Form(body, boundary, secrets.token_hex(16))


def _part_of(segment: MultipartSegment) -> Part:
    headers = dict(segment.headerlist)
    name, filename = str(segment.name), segment.filename
    if filename is None and (extended := _EXTENDED_FILENAME.search(headers.get("Content-Disposition", ""))):
        filename = unquote(extended[1], errors="replace")
    if not _NAME.fullmatch(name):
        raise BodyInvalid("Invalid form: a field's name has characters that no field has.")
    head = f'Content-Disposition: form-data; name="{name}"'
    if filename is not None:
        head += f'; filename="{filename.translate(_ESCAPES)}"'
    if media_type := headers.get("Content-Type"):
        if not _MEDIA_TYPE.fullmatch(media_type):
            raise BodyInvalid("Invalid form: a part's media type is none.")
        head += f"\r\nContent-Type: {media_type}"
    return Part(name, filename is not None, head.encode() + b"\r\n\r\n", [])
