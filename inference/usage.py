"""What a provider says that an answer took."""

from __future__ import annotations

from typing import Final

import msgspec

from metering.normalise import OpenAIUsage, is_credible


class Reported(msgspec.Struct, frozen=True, gc=False):
    """The part of an answer, or of a chunk, that is about usage."""

    usage: OpenAIUsage | None = None
    service_tier: str | None = None


_answer: Final = msgspec.json.Decoder(Reported)
_NOTHING: Final = Reported()


def reported_in(body: bytes) -> Reported:
    """Return what an unstreamed answer reports; nothing where it cannot be read, or no model can have used so much."""
    try:
        reported = _answer.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _NOTHING
    if reported.usage is not None and not is_credible(reported.usage):
        return Reported(service_tier=reported.service_tier)
    return reported
