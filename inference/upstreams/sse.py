"""Server-sent events on their way through: bytes go on as they came, and only what concerns us is looked at.

Looked at are: the usage of the answer, an error after status 200, and the end. The scan is by whole events, so it
does not matter how the bytes were split (WHATWG HTML, section 9.2: lines end in LF, CR or CRLF, an event ends at an
empty line).
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from inference.usage import TokenUsage, credible

# Two line ends in a row. Atomic, so that one CRLF is never taken for two.
_BOUNDARY: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE: Final = re.compile(rb"\r\n|\n|\r")
_FIELD: Final = re.compile(rb"(?:^|[\r\n])[^:\r\n]")
_NO_USAGE: Final = b',"usage":null'
# A usage chunk is below 1 kB. A larger event cannot be one and is passed on in pieces: memory stays bounded.
_HELD_BYTES_MAX: Final = 256 * 1024


class _Chunk(msgspec.Struct):
    """The part of a streamed chunk that concerns us."""

    usage: TokenUsage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")
    choices: list[msgspec.Raw] | None = None


_chunk: Final = msgspec.json.Decoder(_Chunk)
_EMPTY: Final = {b"null", b"false", b"{}", b'""', b"0", b"[]"}


class SseRelay:
    """Scans one stream. With *hides_usage*, the usage chunk that we asked for is taken out again."""

    __slots__ = ("_held", "_hides_usage", "_inside_large", "error", "events", "is_done", "usage")

    def __init__(self, *, hides_usage: bool) -> None:
        self._hides_usage = hides_usage
        self._held = b""
        # Inside an event that is too large to be held back.
        self._inside_large = False
        self.usage: TokenUsage | None = None
        self.error: bytes | None = None
        self.is_done = False
        self.events = 0

    def feed(self, data: bytes) -> bytes:
        """Take what arrived; return what may go on now: whole events, with the hidden one left out."""
        if self._held:
            data = self._held + data
        end = _end_of_last_event(data)
        if end == 0:
            return self._hold(data)
        whole = data if end == len(data) else data[:end]
        self._held = b"" if end == len(data) else data[end:]
        if self._inside_large:
            # The tail of a large event, perhaps with further events behind it: nothing in it is ours to hide.
            self._inside_large = False
            first = _BOUNDARY.search(whole)
            cut = first.end() if first else len(whole)
            return whole[:cut] + self._scan(whole[cut:])
        return self._scan(whole)

    def finish(self) -> bytes:
        """Return what is left when the upstream has ended: an event that was never terminated, as it is."""
        rest, self._held = self._held, b""
        return self._scan(rest) if rest and not self._inside_large else rest

    def _hold(self, data: bytes) -> bytes:
        if len(data) <= _HELD_BYTES_MAX and not self._inside_large:
            self._held = data
            return b""
        # Keep the last bytes: the event's end may be split across two reads.
        self._inside_large = True
        self._held = data[-3:]
        return data[:-3]

    def _scan(self, whole: bytes) -> bytes:
        if not whole:
            return whole
        if self._hides_usage:
            whole = whole.replace(_NO_USAGE, b"")
            has_usage = b'"usage"' in whole
        else:
            has_usage = whole.count(b'"usage"') != whole.count(b'"usage":null')
        self.events += whole.count(b"data:")
        has_error = b'"error"' in whole
        if not (has_usage or has_error or b"[DONE]" in whole):
            return whole
        if b"\r" in whole:
            return b"".join([event for event in _events(whole) if not self._is_hidden(event)])
        # Only the events that the marks stand in are looked at; a burst may hold hundreds of others.
        places = _marked(whole, b'"usage"') if has_usage else set[tuple[int, int]]()
        if has_error:
            places |= _marked(whole, b'"error"')
        places |= _marked(whole, b"[DONE]")
        hidden = [place for place in sorted(places) if self._is_hidden(whole[place[0] : place[1]])]
        for start, end in reversed(hidden):
            whole = whole[:start] + whole[end:]
        return whole

    def _is_hidden(self, event: bytes) -> bool:
        payload = _payload(event)
        if payload.startswith(b"[DONE]"):
            self.is_done = True
            return False
        if b'"usage"' not in payload and b'"error"' not in payload:
            return False
        try:
            chunk = _chunk.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        if bytes(chunk.error) not in _EMPTY:
            self.error = bytes(chunk.error)
        if chunk.usage is None:
            return False
        self.usage = credible(chunk.usage)
        return self._hides_usage and chunk.choices == []


def _end_of_last_event(data: bytes) -> int:
    """Return where the last whole event of *data* ends, 0 if there is none."""
    if b"\r" not in data:
        return data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
    # A CR at the very end may be half of a CRLF: wait for the rest.
    limit = len(data) - 1 if data.endswith(b"\r") else len(data)
    end = 0
    for boundary in _BOUNDARY.finditer(data, 0, limit):
        end = boundary.end()
    return end


def _marked(whole: bytes, mark: bytes) -> set[tuple[int, int]]:
    """Return where the events that hold *mark* begin and end. For lines that end in LF."""
    places: set[tuple[int, int]] = set()
    at = whole.find(mark)
    while at >= 0:
        start = whole.rfind(b"\n\n", 0, at)
        end = whole.find(b"\n\n", at)
        end = len(whole) if end < 0 else end + 2
        places.add((0 if start < 0 else start + 2, end))
        at = whole.find(mark, end)
    return places


def _events(whole: bytes) -> list[bytes]:
    events: list[bytes] = []
    start = 0
    for boundary in _BOUNDARY.finditer(whole):
        events.append(whole[start : boundary.end()])
        start = boundary.end()
    if start < len(whole):
        events.append(whole[start:])
    return events


def _payload(event: bytes) -> bytes:
    lines = [line[5:].removeprefix(b" ") for line in _LINE.split(event) if line.startswith(b"data:")]
    return lines[0] if len(lines) == 1 else b"\n".join(lines)


def has_event(data: bytes) -> bool:
    """Tell whether *data* holds anything but comments and blank lines: the model has begun to answer."""
    return _FIELD.search(data) is not None


def first_payload(data: bytes) -> bytes:
    """Return the payload of the first event in *data* that has one."""
    return next((payload for event in _events(data) if (payload := _payload(event))), b"")
