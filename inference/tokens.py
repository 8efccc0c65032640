"""How many tokens a call may take, before anybody has counted.

For reserving; and for billing, marked as estimated, where a provider never says.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

# English and JSON come to about four bytes a token in OpenAI's vocabularies; the settlement corrects the rest.
_BYTES_PER_TOKEN: Final = 4
# Larger bodies are looked into: an inline image of a megabyte is about a thousand tokens, not 250,000.
_LOOK_INTO_BYTES: Final = 32_768
# A picture at high detail of 1024 x 1024 is 765 tokens with gpt-4o; larger ones are scaled (OpenAI's vision guide).
_TOKENS_PER_MEDIUM: Final = 1_500
# 128 kbit/s, what most MP3 files have; speech is often recorded at a half of it, and uncompressed at the double.
_BYTES_PER_SECOND: Final = 16_000
# Reserved when a caller sets no maximum: most answers are shorter, and a full reservation would make limits useless
# (BerriAI/litellm#27509).
_OUTPUT_TOKENS_DEFAULT: Final = 1_024


# What stands inline in a message: pictures, sound and files in base64, under the names that OpenAI gives them.
_MEDIUM: Final = re.compile(rb'"(?:url|file_data|data)"\s*:\s*"[^"]{1000,}"')
_anything: Final = msgspec.json.Decoder(Any)
_OUTPUT_FIELDS: Final = ("max_completion_tokens", "max_tokens")


def estimate_prompt_tokens(fields: dict[str, msgspec.Raw], body_bytes: int) -> int:
    """Return about how many tokens the input is: never zero, and not exact."""
    media = _MEDIUM.findall(fields["messages"]) if body_bytes > _LOOK_INTO_BYTES and "messages" in fields else []
    text_bytes = body_bytes - sum(map(len, media))
    return text_bytes // _BYTES_PER_TOKEN + len(media) * _TOKENS_PER_MEDIUM + 1


def estimate_text_tokens(body: bytes) -> int:
    """Return about how many tokens an answer has whose provider does not say; its JSON counts with it."""
    return len(body) // _BYTES_PER_TOKEN


def estimate_audio_seconds(body_bytes: int) -> int:
    """Return about how long a recording is that nobody has listened to yet: never zero, and not exact."""
    return body_bytes // _BYTES_PER_SECOND + 1


def estimate_output_tokens(fields: dict[str, msgspec.Raw], output_tokens_max: int) -> int:
    """Return how many tokens the answer may have: what the caller allows, bounded by the model. For one choice."""
    wanted = _OUTPUT_TOKENS_DEFAULT
    for name in _OUTPUT_FIELDS:
        if name in fields:
            wanted = _count(fields[name], wanted)
            break
    return min(wanted, output_tokens_max)


def count_choices(fields: dict[str, msgspec.Raw]) -> int:
    """Return how many answers are asked for; 128 is OpenAI's bound."""
    return min(_count(fields["n"], 1), 128) if "n" in fields else 1


def _count(raw: msgspec.Raw, default: int) -> int:
    """Return a positive whole number, or *default* for anything else: the provider judges it, not we."""
    try:
        value = _anything.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return default
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
