"""Server-sent events on their way through: bytes go on as they came, and only what concerns us is looked at.

Looked at are: the usage of the answer, an error after status 200, and the end. The scan is by whole events, so it
does not matter how the bytes were split (WHATWG HTML, section 9.2: lines end in LF, CR or CRLF, an event ends at an
empty line).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from metering.normalise import OpenAIUsage, is_credible, says_nothing

# Two line ends in a row. Atomic, so that one CRLF is never taken for two.
_BOUNDARY: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE: Final = re.compile(rb"\r\n|\n|\r")
_FIELD: Final = re.compile(rb"(?:^|[\r\n])[^:\r\n]")
_NO_USAGE: Final = b',"usage":null'
# A usage chunk is below 1 kB. A larger event is passed on in pieces: memory stays bounded. Pictures come in such, with
# their usage before or behind them.
_HELD_BYTES_MAX: Final = 256 * 1024
_TAIL_BYTES: Final = 8_192


class _Chunk(msgspec.Struct):
    """The part of a streamed chunk that concerns us."""

    usage: OpenAIUsage | None = None
    service_tier: str | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")
    choices: list[msgspec.Raw] | None = None
    type: str | None = None
    """Of the events of pictures and transcripts."""


_chunk: Final = msgspec.json.Decoder(_Chunk)
_usage: Final = msgspec.json.Decoder(OpenAIUsage | None)
_json: Final = json.JSONDecoder()
_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode: Final = msgspec.json.Encoder().encode
# What a model has said, wherever it stands in a chunk; a string ends at a quote that no backslash precedes.
_SAID: Final = re.compile(rb'"(?:content|reasoning_content|reasoning|arguments|refusal|text)":\s?"((?:[^"\\]|\\.)*)"')
# English comes to about four bytes a token in OpenAI's vocabularies.
_BYTES_PER_TOKEN: Final = 4
# How the names of events end that say what an answer took: `image_generation.completed`, `transcript.text.done`.
_LAST_EVENTS: Final = (".completed", ".done")
_LARGE_USAGE: Final = re.compile(rb'"usage"\s{0,9}:\s{0,9}')
_LAST_LARGE: Final = re.compile(rb'"type":\s?"[a-z_.]{1,64}\.(?:completed|done)"')
_EMPTY: Final = {b"null", b"false", b"{}", b'""', b"0", b"[]"}


class SseRelay:
    """Scans one stream. With *hides_usage*, the usage chunk that we asked for is taken out again.

    *cost_of* is asked, when the usage has come, for what to add to it as `cost_usd`; *counts_text* looks closer at what
    is said, so that a stream which is cut off can be billed by it.
    """

    __slots__ = (
        "_cost_of",
        "_counts_text",
        "_has_large_usage",
        "_held",
        "_hides_usage",
        "_inside_large",
        "_is_large_last",
        "_own_end",
        "_said_bytes",
        "_tail",
        "_usage_at",
        "error",
        "events",
        "is_done",
        "service_tier",
        "usage",
    )

    def __init__(
        self, *, hides_usage: bool, counts_text: bool = False, cost_of: Callable[[SseRelay], str] | None = None
    ) -> None:
        self._hides_usage = hides_usage
        self._counts_text = counts_text
        self._cost_of = cost_of
        self._held = b""
        # Inside an event that is too large to be held back.
        self._inside_large = False
        self._is_large_last = self._has_large_usage = False
        self._said_bytes = 0
        self._tail = b""
        self.usage: OpenAIUsage | None = None
        self.service_tier: str | None = None
        self.error: bytes | None = None
        self.is_done = False
        self.events = 0
        # At which event the usage came; -1 where it came beside something else.
        self._usage_at = -1
        self._own_end: int | None = None

    @property
    def observed_tokens(self) -> int:
        """About how many tokens have come: one an event, or more where events are long."""
        return max(self.events, self._said_bytes // _BYTES_PER_TOKEN)

    @property
    def is_usage_last(self) -> bool:
        """Whether the usage is the answer's last word: in an event of its own, with none behind it.

        Some providers say with every chunk how much it is by then (vLLM's `continuous_usage_stats`, Gemini).
        """
        return self._usage_at == self.events

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
            self._end_large(whole[:cut])
            return whole[:cut] + self._scan(whole[cut:])
        return self._scan(whole)

    def finish(self) -> bytes:
        """Return what is left when the upstream has ended: an event that was never terminated, as it is."""
        rest, self._held = self._held, b""
        if self._inside_large:
            self._end_large(rest)
            return rest
        return self._scan(rest) if rest else rest

    def _hold(self, data: bytes) -> bytes:
        if len(data) <= _HELD_BYTES_MAX and not self._inside_large:
            self._held = data
            return b""
        # Keep the last bytes: the event's end may be split across two reads.
        if not self._inside_large:
            self._inside_large = True
            self._is_large_last = self._has_large_usage = False
            self.events += 1
            self._usage_at = -1
            self._look_into_large(data[:_TAIL_BYTES])
        self._held = data[-3:]
        data = data[:-3]
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        return data

    def _end_large(self, rest: bytes) -> None:
        """Note what the tail of a large event says, and whether that is the last word."""
        self._look_into_large((self._tail + rest)[-_TAIL_BYTES:])
        self._tail = b""
        if self._is_large_last and self._has_large_usage:
            self._usage_at = self.events

    def _look_into_large(self, part: bytes) -> None:
        """Note the usage of an event that is never here as a whole: it stands before or behind what makes it large."""
        self._is_large_last |= _LAST_LARGE.search(part) is not None
        places = list(_LARGE_USAGE.finditer(part))
        if not places:
            return
        text = part[places[-1].end() :].decode("latin-1")
        try:
            end = _json.raw_decode(text)[1]
            usage = _usage.decode(text[:end].encode("latin-1"))
        except (ValueError, RecursionError):  # msgspec's errors among them
            return
        if usage is not None and is_credible(usage) and not says_nothing(usage):
            self.usage, self._has_large_usage = usage, True

    def _scan(self, whole: bytes) -> bytes:
        if not whole:
            return whole
        # Every byte of every stream comes by here. (`in` makes and drops an exception before it looks for bytes.)
        if self._hides_usage:
            whole = whole.replace(_NO_USAGE, b"")
            has_usage = whole.find(b'"usage"') >= 0
        else:
            has_usage = whole.count(b'"usage"') != whole.count(b'"usage":null')
        events = whole.count(b"data:")
        self.events += events
        if self._counts_text:
            self._said_bytes += sum(map(len, _SAID.findall(whole)))
        has_error = whole.find(b'"error"') >= 0
        if not (has_usage or has_error):
            is_object = events == 1 and whole.startswith(b"data: {")
            if is_object or whole.find(b"[DONE]") < 0:
                return whole
        if b"\r" in whole:
            return self._scan_one_by_one(whole)
        # Only the events that the marks stand in are looked at; a burst may hold hundreds of others.
        places = _marked(whole, b'"usage"') if has_usage else set[tuple[int, int]]()
        if has_error:
            places |= _marked(whole, b'"error"')
        places |= _marked(whole, b"[DONE]")
        out: list[bytes] = []
        done = 0
        for start, end in sorted(places):
            new = self._look(whole[start:end], end)
            if new is not None:
                out += (whole[done:start], new)
                done = end
        self._place_usage(whole)
        return b"".join((*out, whole[done:])) if out else whole

    def _scan_one_by_one(self, whole: bytes) -> bytes:
        out: list[bytes] = []
        end = 0
        for event in _events(whole):
            end += len(event)
            new = self._look(event, end)
            out.append(event if new is None else new)
        self._place_usage(whole)
        return b"".join(out)

    def _place_usage(self, whole: bytes) -> None:
        """Note behind how many events the usage came that was found in *whole*."""
        if self._own_end is not None:
            self._usage_at = self.events - whole.count(b"data:", self._own_end) if self._own_end >= 0 else -1
            self._own_end = None

    def _look(self, event: bytes, end: int) -> bytes | None:
        """Note what concerns us of *event*, which ends there; return what goes on in its place, None for itself."""
        payload = _payload(event)
        if payload.startswith(b"[DONE]"):
            self.is_done = True
            return None
        if b'"usage"' not in payload and b'"error"' not in payload:
            return None
        try:
            chunk = _chunk.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if bytes(chunk.error) not in _EMPTY:
            self.error = bytes(chunk.error)
        if chunk.usage is None:
            return None
        if not says_nothing(chunk.usage):
            self.usage = chunk.usage if is_credible(chunk.usage) else None
            self.service_tier = chunk.service_tier
            is_own = chunk.choices == [] or (chunk.type or "").endswith(_LAST_EVENTS)
            self._own_end = end if is_own else -1
        if self._hides_usage and chunk.choices == []:
            return b""
        return self._with_cost(payload) if self._cost_of is not None and self.usage is not None else None

    def _with_cost(self, payload: bytes) -> bytes | None:
        assert self._cost_of is not None
        cost = self._cost_of(self)
        if not cost:
            return None
        chunk: dict[str, Any] = _object.decode(payload)
        chunk["usage"] = {**_object.decode(chunk["usage"]), "cost_usd": cost}
        return b"data: %b\n\n" % _encode(chunk)


def _end_of_last_event(data: bytes) -> int:
    """Return where the last whole event of *data* ends, 0 if there is none."""
    if data.endswith(b"\n\n"):
        return len(data)
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
