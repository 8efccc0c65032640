"""What providers report, turned into disjoint `Units`: one normaliser for each shape of usage.

In OpenAI's shape, which most providers copy, the whole is reported and parts of it beside it: cached tokens are in
`prompt_tokens`. In Anthropic's the parts stand alone. Counting a part twice is the commonest billing error of gateways
(BerriAI/litellm#6215, #14849, #37407), so that here every token of a provider's count ends up in one dimension:

- `all_input_tokens + all_output_tokens` is the provider's total, where its numbers agree with each other;
- where a part exceeds its whole, the part is cut, and the dimensions sum to the provider's prompt and completion.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import Final, TypeAlias

import msgspec

from core.money import NANO_USD_PER_USD, NanoUsd
from metering.usage import Units

# The largest context windows hold ten million tokens. A larger count is a provider's mistake, and settled as it
# stands it would put a tenant's buckets into debt for days.
COUNT_MAX: Final = 10_000_000
# docs.x.ai/developers/cost-tracking: 1 USD = 10^10 ticks.
_TICKS_PER_NANO_USD: Final = 10
# No call costs a million dollars; what claims to is not believed.
_REPORTED_MAX: Final = 1_000_000 * NANO_USD_PER_USD
_NOT_SAID: Final = msgspec.Raw()


class _Part(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A part of a usage: plain fields, no cycles, none required, unknown ones ignored."""


class CacheCreation(_Part, frozen=True, kw_only=True, gc=False):
    """Anthropic's split of what was written to the cache, by how long it is kept."""

    ephemeral_5m_input_tokens: int | None = None
    ephemeral_1h_input_tokens: int | None = None


class CachedDetails(_Part, frozen=True, kw_only=True, gc=False):
    """What of the cached tokens was no text. OpenAI counts them also among the tokens of their kind."""

    audio_tokens: int | None = None
    image_tokens: int | None = None


class InputDetails(_Part, frozen=True, kw_only=True, gc=False):
    """Parts of the prompt's tokens. Cache writes have two names: OpenAI's, and litellm's for Anthropic's."""

    cached_tokens: int | None = None
    cached_tokens_details: CachedDetails | None = None
    audio_tokens: int | None = None
    image_tokens: int | None = None
    cache_write_tokens: int | None = None
    cache_creation_tokens: int | None = None
    cache_creation_token_details: CacheCreation | None = None
    tool_use_tokens: int | None = None
    """litellm, of Gemini: counted in the total, and in the prompt only where Google bills them."""


class OutputDetails(_Part, frozen=True, kw_only=True, gc=False):
    """Parts of the answer's tokens. Predictions, accepted or rejected, are priced as what they are: output."""

    reasoning_tokens: int | None = None
    thinking_tokens: int | None = None
    audio_tokens: int | None = None
    image_tokens: int | None = None


class CostDetails(_Part, frozen=True, kw_only=True, gc=False):
    """OpenRouter's: what the provider behind it took."""

    upstream_inference_cost: msgspec.Raw = msgspec.Raw()


class OpenAIUsage(_Part, frozen=True, kw_only=True, gc=False):
    """Usage in OpenAI's shape: chat, responses, embeddings, images, transcriptions, and what others add to it."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: InputDetails | None = None
    completion_tokens_details: OutputDetails | None = None
    # Responses, images and transcriptions.
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: InputDetails | None = None
    output_tokens_details: OutputDetails | None = None
    input_token_details: InputDetails | None = None
    # Transcriptions billed by time: OpenAI's, Mistral's.
    seconds: float | None = None
    prompt_audio_seconds: float | None = None
    # DeepSeek; Moonshot; Anthropic through litellm. All within `prompt_tokens`.
    prompt_cache_hit_tokens: int | None = None
    cached_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_creation: CacheCreation | None = None
    # What the provider says that it cost: OpenRouter's in USD (Perplexity's is an object); xAI's.
    cost: msgspec.Raw = _NOT_SAID
    cost_details: CostDetails | None = None
    is_byok: bool | None = None
    cost_in_usd_ticks: int | None = None

    def counts(self) -> tuple[int, int]:
        """Return tokens that went in, and tokens that came out."""
        return self.prompt_tokens or self.input_tokens or 0, self.completion_tokens or self.output_tokens or 0


class CountedUsage(_Part, frozen=True, kw_only=True, gc=False):
    """What can be counted in an answer whose provider reports no usage."""

    images: int = 0
    seconds: float = 0.0

    def counts(self) -> tuple[int, int]:
        """Return tokens in and out: none."""
        return 0, 0


class AnthropicUsage(_Part, frozen=True, kw_only=True, gc=False):
    """Usage of Anthropic's Messages API. `input_tokens` holds neither what was read from nor written to the cache."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation: CacheCreation | None = None
    output_tokens_details: OutputDetails | None = None
    iterations: tuple[AnthropicUsage, ...] | None = None
    """With compaction, each sampling of the call: the counts beside them leave the compactions out
    (platform.claude.com, "Compaction at a token threshold")."""


class ModalityCount(_Part, frozen=True, kw_only=True, gc=False, rename="camel"):
    """Gemini's tokens of one kind: TEXT, AUDIO, IMAGE, VIDEO, DOCUMENT."""

    modality: str | None = None
    token_count: int | None = None


class GeminiUsage(_Part, frozen=True, kw_only=True, gc=False, rename="camel"):
    """Gemini's `usageMetadata`. Cached tokens are in the prompt; thoughts are not in the candidates."""

    prompt_token_count: int | None = None
    cached_content_token_count: int | None = None
    candidates_token_count: int | None = None
    thoughts_token_count: int | None = None
    tool_use_prompt_token_count: int | None = None
    total_token_count: int | None = None
    prompt_tokens_details: tuple[ModalityCount, ...] | None = None
    cache_tokens_details: tuple[ModalityCount, ...] | None = None
    candidates_tokens_details: tuple[ModalityCount, ...] | None = None


Usage: TypeAlias = OpenAIUsage | CountedUsage | AnthropicUsage | GeminiUsage


def units_of(usage: Usage) -> Units:
    """Return *usage* in disjoint dimensions. Seconds of audio are rounded up. Ask `is_credible` first."""
    if isinstance(usage, OpenAIUsage):
        return _of_openai(usage)
    if isinstance(usage, CountedUsage):
        return Units(images=usage.images, audio_seconds=math.ceil(usage.seconds))
    return _of_anthropic(usage) if isinstance(usage, AnthropicUsage) else _of_gemini(usage)


def is_credible(usage: Usage) -> bool:
    """Tell whether a model can have used that much. What is not credible counts as not reported."""
    if isinstance(usage, OpenAIUsage):
        prompt, completion, total = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
        is_plain = usage.input_tokens is None and usage.output_tokens is None and usage.seconds is None
        if prompt and completion and total and is_plain and usage.prompt_audio_seconds is None:
            # By far the commonest case, and this is the hot path.
            return 0 < prompt <= COUNT_MAX and 0 < completion <= COUNT_MAX and 0 < total <= COUNT_MAX
        counts = (usage.prompt_tokens, usage.completion_tokens, usage.input_tokens, usage.output_tokens)
        rest = (usage.total_tokens, usage.seconds, usage.prompt_audio_seconds)
    elif isinstance(usage, CountedUsage):
        counts, rest = (usage.images,), (usage.seconds,)
    elif isinstance(usage, AnthropicUsage):
        counts = (usage.input_tokens, usage.output_tokens, usage.cache_creation_input_tokens)
        rest = (usage.cache_read_input_tokens, _written(usage.cache_creation))
        if not all(map(is_credible, usage.iterations or ())):
            return False
    else:
        counts = (usage.prompt_token_count, usage.candidates_token_count, usage.thoughts_token_count)
        rest = (usage.tool_use_prompt_token_count, usage.total_token_count)
    return all(count is None or 0 <= count <= COUNT_MAX for count in counts + rest)


def says_nothing(usage: OpenAIUsage) -> bool:
    """Tell whether a provider has reported no count at all; a count of 0 is one."""
    return (
        usage.prompt_tokens is None
        and usage.completion_tokens is None
        and usage.total_tokens is None
        and usage.input_tokens is None
        and usage.output_tokens is None
        and usage.seconds is None
        and usage.prompt_audio_seconds is None
    )


def reported_cost(usage: OpenAIUsage) -> NanoUsd | None:
    """Return what the provider says that the call cost, rounded up to nano-USD; None where it does not say.

    OpenRouter's `cost` is its own fee alone where the operator brought a provider's key along: what that provider takes
    is then beside it, and is added. (Without one it stands there too, and is the same money.)
    """
    if usage.cost_in_usd_ticks is not None:
        ticks = usage.cost_in_usd_ticks
        return None if ticks < 0 else _believable(-(-ticks // _TICKS_PER_NANO_USD))
    if usage.cost is _NOT_SAID:
        return None
    cost = _nano_usd(usage.cost)
    if cost is None or not usage.is_byok or usage.cost_details is None:
        return cost
    return _believable(cost + (_nano_usd(usage.cost_details.upstream_inference_cost) or 0))


def _nano_usd(number: msgspec.Raw) -> NanoUsd | None:
    """Return a JSON number of US dollars. It is read as it was written: no binary fraction comes between."""
    text = bytes(number)
    if not text:
        return None
    try:
        amount = Decimal(text.decode())
    except (InvalidOperation, UnicodeDecodeError):
        return None
    # The comparison comes first: 1e999999999 is a valid number, and as an integer fills the memory.
    if not 0 <= amount <= _REPORTED_MAX // NANO_USD_PER_USD:
        return None
    return NanoUsd(int((amount * NANO_USD_PER_USD).to_integral_value(ROUND_CEILING)))


def _believable(amount: int) -> NanoUsd | None:
    return NanoUsd(amount) if amount <= _REPORTED_MAX else None


class _Whole:
    """A provider's count, from which parts are taken. No part takes more than is left."""

    __slots__ = ("left",)

    def __init__(self, count: int) -> None:
        self.left = count

    def take(self, part: int | None) -> int:
        if not part or part < 0:
            return 0
        taken = min(part, self.left)
        self.left -= taken
        return taken


def _of_openai(usage: OpenAIUsage) -> Units:
    prompt = usage.prompt_tokens or usage.input_tokens or 0
    completion = usage.completion_tokens or usage.output_tokens or 0
    inside = usage.prompt_tokens_details or usage.input_tokens_details or usage.input_token_details
    made = usage.completion_tokens_details or usage.output_tokens_details
    if (
        prompt + completion == usage.total_tokens
        and (inside is None or not (inside.cached_tokens or inside.audio_tokens or inside.cache_write_tokens))
        and (inside is None or (inside.image_tokens is None and inside.cache_creation_tokens is None))
        and (made is None or not (made.reasoning_tokens or made.audio_tokens or made.image_tokens))
        and usage.prompt_cache_hit_tokens is None
        and usage.cache_read_input_tokens is None
        and usage.cache_creation_input_tokens is None
        and usage.cached_tokens is None
        and usage.prompt_audio_seconds is None
    ):
        # By far the commonest case, and this is the hot path.
        return Units(input_tokens=prompt, output_tokens=completion)
    return _of_openai_parts(usage, inside or InputDetails(), made)


def _of_openai_parts(usage: OpenAIUsage, inside: InputDetails, made: OutputDetails | None) -> Units:
    prompt, completion = usage.counts()
    seconds = math.ceil(usage.seconds or usage.prompt_audio_seconds or 0)
    if not prompt and not completion and not seconds:
        # Voyage reports embeddings by their total alone.
        prompt = max(usage.total_tokens or 0, 0)
    whole = _Whole(prompt)
    cached = whole.take(
        inside.cached_tokens or usage.prompt_cache_hit_tokens or usage.cache_read_input_tokens or usage.cached_tokens
    )
    written = inside.cache_write_tokens or inside.cache_creation_tokens or usage.cache_creation_input_tokens
    short, long = _cache_writes(whole, written, inside.cache_creation_token_details or usage.cache_creation)
    of_cached = inside.cached_tokens_details or CachedDetails()
    audio = whole.take((inside.audio_tokens or 0) - (of_cached.audio_tokens or 0))
    image = whole.take((inside.image_tokens or 0) - (of_cached.image_tokens or 0))
    # Only answers of the images endpoint say how much of their input is pictures, and nothing of their output.
    if made is None and usage.input_tokens_details is not None and inside.image_tokens is not None:
        made = OutputDetails(image_tokens=completion)
    made = made or OutputDetails()
    outside = 0
    if usage.completion_tokens is not None or usage.output_tokens is not None:
        excess = (usage.total_tokens or 0) - prompt - completion - (inside.tool_use_tokens or 0)
        outside = 0 if usage.prompt_audio_seconds else _outside_completion(excess, made.reasoning_tokens or 0)
    answer = _Whole(completion + outside)
    return Units(
        input_tokens=whole.left,
        cached_input_tokens=cached,
        cache_write_tokens=short,
        cache_write_1h_tokens=long,
        input_audio_tokens=audio,
        input_image_tokens=image,
        reasoning_tokens=answer.take(max(made.reasoning_tokens or 0, outside)),
        output_audio_tokens=answer.take(made.audio_tokens),
        output_image_tokens=answer.take(made.image_tokens),
        output_tokens=answer.left,
        audio_seconds=seconds,
    )


def _outside_completion(excess: int, reasoning: int) -> int:
    """Return the output tokens that `completion_tokens` leaves out, of those that the total has in *excess*.

    xAI counts reasoning beside the completion. Gemini behind OpenAI's shape does too, and does not name it: what the
    total has in excess there is thoughts, which Google bills as output. (Mistral's excess is audio, billed by seconds.)
    """
    if excess <= 0:
        return 0
    if reasoning > 0:
        return reasoning if excess >= reasoning else 0
    return excess


def _cache_writes(whole: _Whole, written: int | None, split: CacheCreation | None) -> tuple[int, int]:
    """Take what was written to the cache: kept for minutes, kept for an hour. The two sum to *written*."""
    if split is None:
        return whole.take(written), 0
    taken = whole.take(written or _written(split))
    hour = _Whole(taken).take(split.ephemeral_1h_input_tokens)
    return taken - hour, hour


def _written(split: CacheCreation | None) -> int:
    return 0 if split is None else (split.ephemeral_5m_input_tokens or 0) + (split.ephemeral_1h_input_tokens or 0)


def _of_anthropic(usage: AnthropicUsage) -> Units:
    if usage.iterations:
        parts = [msgspec.structs.astuple(_of_anthropic(one)) for one in usage.iterations]
        return Units(*map(sum, zip(*parts, strict=True)))
    written = usage.cache_creation_input_tokens or _written(usage.cache_creation)
    short, long = _cache_writes(_Whole(written), written, usage.cache_creation)
    answer = _Whole(usage.output_tokens or 0)
    made = usage.output_tokens_details
    return Units(
        input_tokens=usage.input_tokens or 0,
        cached_input_tokens=usage.cache_read_input_tokens or 0,
        cache_write_tokens=short,
        cache_write_1h_tokens=long,
        reasoning_tokens=answer.take(made.thinking_tokens if made else None),
        output_tokens=answer.left,
    )


def _of_gemini(usage: GeminiUsage) -> Units:
    prompt = (usage.prompt_token_count or 0) + (usage.tool_use_prompt_token_count or 0)
    candidates, thoughts = usage.candidates_token_count or 0, usage.thoughts_token_count or 0
    # Some models count thoughts among the candidates; the total tells (BerriAI/litellm#10141).
    if thoughts and prompt + candidates == usage.total_token_count:
        candidates -= min(thoughts, candidates)
    whole, answer = _Whole(prompt), _Whole(candidates + thoughts)
    cached = whole.take(usage.cached_content_token_count)
    audio = _modality(usage.prompt_tokens_details, "AUDIO") - _modality(usage.cache_tokens_details, "AUDIO")
    image = _modality(usage.prompt_tokens_details, "IMAGE") - _modality(usage.cache_tokens_details, "IMAGE")
    return Units(
        cached_input_tokens=cached,
        input_audio_tokens=whole.take(audio),
        input_image_tokens=whole.take(image),
        input_tokens=whole.left,
        reasoning_tokens=answer.take(thoughts),
        output_audio_tokens=answer.take(_modality(usage.candidates_tokens_details, "AUDIO")),
        output_image_tokens=answer.take(_modality(usage.candidates_tokens_details, "IMAGE")),
        output_tokens=answer.left,
    )


def _modality(details: tuple[ModalityCount, ...] | None, modality: str) -> int:
    return sum(part.token_count or 0 for part in details or () if part.modality == modality)
