"""The most that a call can use, from its request alone: what a hard budget sets aside.

No tokenizer is needed for a bound. Tokenizers of language models fall back to bytes, so that a text never has more
tokens than bytes; what JSON adds around a message is more than the marks that a model puts around it. Pictures are the
exception, a few bytes of address being thousands of tokens: each is counted at what the dearest model makes of one.
"""

from __future__ import annotations

import re
from typing import Any, Final, cast

import msgspec

from inference.catalog import Model
from inference.endpoints import Endpoint
from inference.wire import Fields, ParsedRequest
from metering.rating import Ask

# gpt-4o-mini makes 2,833 + 8 x 5,667 tokens of a picture at high detail, more than any other (OpenAI's vision guide).
_IMAGE_TOKENS_MAX: Final = 50_000
# What providers put before a prompt that has tools: some hundred tokens at Anthropic (their tool use guide).
_HIDDEN_TOKENS_MAX: Final = 1_000
_IMAGE: Final = re.compile(rb'"(?:image_url|input_image|image)"\s*:')
# What is read from elsewhere has a size that the request does not say; searches are billed by the query.
_UNBOUNDED: Final = re.compile(
    rb'"(?:file_id|file_url|file_data|video_url|input_file|web_search_options|previous_response_id|plugins'
    rb'|search_parameters)"\s*:'
)
_CALLERS_TOOLS: Final = frozenset({"function", "custom", None})
_OUTPUT_FIELDS: Final = ("max_completion_tokens", "max_tokens")
_anything: Final = msgspec.json.Decoder(Any)


def ask_of(endpoint: Endpoint, request: ParsedRequest, model: Model) -> Ask | None:
    """Return the most that the call can use; None if its request does not bound it."""
    fields = request.fields
    if fields is None or endpoint.operation == "image_generation":
        return None
    body = request.body
    # A name may be spelt in escapes, which the provider reads and a search does not.
    spellings = (body, _unescaped(body)) if b"\\u" in body else (body,)
    if any(map(_UNBOUNDED.search, spellings)) or not _are_functions(fields):
        return None
    images = max(len(_IMAGE.findall(text)) for text in spellings)
    tier = _value(fields, "service_tier")
    return Ask(
        input_tokens_max=len(body) + _HIDDEN_TOKENS_MAX + _IMAGE_TOKENS_MAX * images,
        output_tokens_max=_output_tokens_max(fields, model) if endpoint.generates_tokens else 0,
        # Some providers write caches unasked.
        may_write_cache=True,
        has_audio_input=any(b'"input_audio"' in text for text in spellings),
        may_output_audio="audio" in fields or "modalities" in fields,
        may_output_images="modalities" in fields,
        service_tier=tier if isinstance(tier, str) else None,
    )


def _unescaped(body: bytes) -> bytes:
    """Return *body* with every name and text in its one plain spelling."""
    try:
        return msgspec.json.encode(_anything.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body


def _are_functions(fields: Fields) -> bool:
    """Tell whether all tools are run by the caller: what the provider runs is billed by the use."""
    tools = _value(fields, "tools")
    if tools is None:
        return True
    if not isinstance(tools, list):
        return False
    kinds = [cast("dict[str, Any]", tool).get("type") for tool in cast("list[Any]", tools) if isinstance(tool, dict)]
    return len(kinds) == len(cast("list[Any]", tools)) and all(kind in _CALLERS_TOOLS for kind in kinds)


def _output_tokens_max(fields: Fields, model: Model) -> int:
    # Which of the two counts is the provider's to say; a prediction's rejected tokens come on top (OpenAI's guide).
    allowed = [_whole(fields, name) for name in _OUTPUT_FIELDS if name in fields]
    each = max(allowed) if allowed and min(allowed) > 0 else model.output_tokens_max
    answers = max(_whole(fields, "n"), _whole(fields, "best_of"), 1) * _prompts(fields)
    return each * answers + len(fields.get("prediction", b""))


def _prompts(fields: Fields) -> int:
    """Return how many prompts a legacy completion has: each is answered by itself."""
    prompt = _value(fields, "prompt")
    prompts = cast("list[Any]", prompt) if isinstance(prompt, list) else []
    return 1 if not prompts or isinstance(prompts[0], int) else len(prompts)


def _whole(fields: Fields, name: str) -> int:
    value = _value(fields, name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _value(fields: Fields, name: str) -> Any:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return _anything.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
