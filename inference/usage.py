"""What an answer took: as its provider says, or as can be counted in it."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from metering.normalise import CountedUsage, OpenAIUsage, is_credible


class Reported(msgspec.Struct, frozen=True, gc=False):
    """The part of an answer, or of a chunk, that is about usage."""

    usage: OpenAIUsage | None = None
    service_tier: str | None = None


class _Images(msgspec.Struct, frozen=True, gc=False):
    """An answer with pictures."""

    data: list[msgspec.Raw]


class _Verbose(msgspec.Struct, frozen=True, gc=False):
    """What the verbose form of a transcript says of the recording."""

    duration: float


class _Transcript(msgspec.Struct, frozen=True, gc=False):
    """A transcript in JSON."""

    text: str


_answer: Final = msgspec.json.Decoder(Reported)
_images: Final = msgspec.json.Decoder(_Images)
# OpenAI's verbose form once gave the duration as text.
_verbose: Final = msgspec.json.Decoder(_Verbose, strict=False)
_transcript: Final = msgspec.json.Decoder(_Transcript)
_NOTHING: Final = Reported()
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# Where a cue of SubRip or WebVTT ends; WebVTT may leave the hours out.
_CUE_END: Final = re.compile(rb"-->[ \t]*(?:(\d{1,3}):)?(\d\d):(\d\d)[,.](\d{3})")


def reported_in(body: bytes) -> Reported:
    """Return what an unstreamed answer reports; nothing where it cannot be read, or no model can have used so much."""
    try:
        reported = _answer.decode(body)
    except _UNREADABLE:
        return _NOTHING
    if reported.usage is not None and not is_credible(reported.usage):
        return Reported(service_tier=reported.service_tier)
    return reported


def counted_in(operation: str, body: bytes) -> CountedUsage | None:
    """Return what can be counted in an answer that reports no usage; None where nothing can.

    Pictures are billed by their number, transcripts by the recording's duration, as far as the answer says it.
    """
    try:
        if operation == "image_generation":
            counted = CountedUsage(images=len(_images.decode(body).data))
        elif operation == "transcription":
            counted = CountedUsage(seconds=_verbose.decode(body).duration)
        else:
            return None
    except _UNREADABLE:
        return None
    # No recording takes no time; an answer may well have no pictures.
    is_said = operation == "image_generation" or counted.seconds > 0
    return counted if is_said and is_credible(counted) else None


def last_cue_seconds(body: bytes) -> int | None:
    """Return when the last cue of subtitles ends, rounded up: the recording is at least that long.

    None where there are no cues, or *body* is a transcript in JSON, whose text may hold anything.
    """
    if body.lstrip()[:1] == b"{":
        return None
    ends = [int(h or 0) * 3600 + int(m) * 60 + int(s) + (ms != b"000") for h, m, s, ms in _CUE_END.findall(body)]
    return max(ends, default=None)


def transcript_text(body: bytes) -> bytes | None:
    """Return the text of a transcript in JSON as a provider gives it for text; None for anything else."""
    try:
        return _transcript.decode(body).text.encode() + b"\n"
    except _UNREADABLE:
        return None
