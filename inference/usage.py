"""What a provider says an answer took. OpenAI's field names; disjoint dimensions are the ledger's business."""

from __future__ import annotations

from typing import Final

import msgspec


class PromptDetails(msgspec.Struct, frozen=True):
    """Parts of the prompt's tokens."""

    cached_tokens: int | None = None
    audio_tokens: int | None = None


class CompletionDetails(msgspec.Struct, frozen=True):
    """Parts of the answer's tokens."""

    reasoning_tokens: int | None = None
    audio_tokens: int | None = None


class TokenUsage(msgspec.Struct, frozen=True):
    """Token counts as reported. Images and transcriptions report `input_tokens` and `output_tokens` instead."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens that went in, and tokens that came out."""
        return self.prompt_tokens or self.input_tokens or 0, self.completion_tokens or self.output_tokens or 0


class _Answer(msgspec.Struct):
    usage: TokenUsage | None = None


_answer: Final = msgspec.json.Decoder(_Answer)
# The largest context windows hold ten million tokens. A larger count is a provider's mistake, and settled as it
# stands it would put a tenant's buckets into debt for days.
_TOKENS_MAX: Final = 10_000_000


def usage_of(body: bytes) -> TokenUsage | None:
    """Return the usage that an unstreamed answer reports, None when it reports none that can be read."""
    try:
        return credible(_answer.decode(body).usage)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def credible(usage: TokenUsage | None) -> TokenUsage | None:
    """Return *usage*, or None if no model can have used that much: it then counts as not reported."""
    if usage is None:
        return None
    for count in (usage.prompt_tokens, usage.completion_tokens, usage.input_tokens, usage.output_tokens):
        if count is not None and not 0 <= count <= _TOKENS_MAX:
            return None
    return usage
