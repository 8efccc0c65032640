"""How many tokens a call may take, before anybody has counted: for reserving, never for billing."""

from __future__ import annotations

from typing import Any, Final

import msgspec

# English and JSON come to about four bytes a token in OpenAI's vocabularies; the settlement corrects the rest.
_BYTES_PER_TOKEN: Final = 4
# Larger bodies are looked into: an inline image of a megabyte is about a thousand tokens, not 250,000.
_LOOK_INTO_BYTES: Final = 32_768
# A picture at high detail of 1024 x 1024 is 765 tokens with gpt-4o; larger ones are scaled (OpenAI's vision guide).
_TOKENS_PER_MEDIUM: Final = 1_500
# Reserved when a caller sets no maximum: most answers are shorter, and a full reservation would make limits useless
# (BerriAI/litellm#27509).
_OUTPUT_TOKENS_DEFAULT: Final = 1_024


class _Part(msgspec.Struct):
    text: str | None = None


class _Message(msgspec.Struct):
    content: str | list[_Part | str] | None = None


_messages: Final = msgspec.json.Decoder(list[_Message])
_anything: Final = msgspec.json.Decoder(Any)
_OUTPUT_FIELDS: Final = ("max_completion_tokens", "max_tokens")


def estimate_prompt_tokens(fields: dict[str, msgspec.Raw], body_bytes: int) -> int:
    """Return about how many tokens the input is: never zero, and not exact."""
    if body_bytes > _LOOK_INTO_BYTES and "messages" in fields:
        try:
            messages = _messages.decode(fields["messages"])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return body_bytes // _BYTES_PER_TOKEN
        return sum(_message_tokens(message) for message in messages) + 1
    return body_bytes // _BYTES_PER_TOKEN + 1


def estimate_output_tokens(fields: dict[str, msgspec.Raw], output_tokens_max: int) -> int:
    """Return how many tokens the answer may have: what the caller allows, bounded by the model, for each choice."""
    wanted = _OUTPUT_TOKENS_DEFAULT
    for name in _OUTPUT_FIELDS:
        if name in fields:
            wanted = _count(fields[name], wanted)
            break
    choices = _count(fields["n"], 1) if "n" in fields else 1
    return min(wanted, output_tokens_max) * min(choices, 128)


def _message_tokens(message: _Message) -> int:
    content = message.content
    if content is None:
        return 4
    if isinstance(content, str):
        return len(content.encode()) // _BYTES_PER_TOKEN + 4
    texts = [part if isinstance(part, str) else part.text for part in content]
    return 4 + sum(_TOKENS_PER_MEDIUM if text is None else len(text.encode()) // _BYTES_PER_TOKEN + 1 for text in texts)


def _count(raw: msgspec.Raw, default: int) -> int:
    """Return a positive whole number, or *default* for anything else: the provider judges it, not we."""
    try:
        value = _anything.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return default
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
