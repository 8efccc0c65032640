"""The usage API's answers, as OpenAI's document has them (UsageResponse and below), and how sums become them."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec

from core.money import usd_text
from metering.summaries import Usage

Result = TypeVar("Result")
ImageSource = Literal["image.generation"]


class UsageBucket(msgspec.Struct, Generic[Result], frozen=True):
    """A stretch of time and what was used in it; no usage, no results."""

    start_time: int
    end_time: int
    results: list[Result]
    object: Literal["bucket"] = "bucket"


class UsagePage(msgspec.Struct, Generic[Result], frozen=True):
    """A page of buckets, oldest first."""

    data: list[UsageBucket[Result]]
    has_more: bool
    next_page: str | None
    object: Literal["page"] = "page"


class _OfProject(msgspec.Struct, frozen=True, kw_only=True):
    project_id: str | None = None


class _OfCaller(_OfProject, frozen=True, kw_only=True):
    user_id: None = None
    """Calls are not attributed to users."""
    api_key_id: str | None = None


class _OfModel(_OfCaller, frozen=True, kw_only=True):
    model: str | None = None
    num_model_requests: int


class CompletionsResult(_OfModel, frozen=True, kw_only=True):
    """Tokens of text generation. `input_tokens` and `output_tokens` are everything, of which the others are parts.

    Which of the cached tokens were text is not recorded: all of them count as text.
    """

    batch: bool | None = None
    service_tier: str | None = None
    input_tokens: int
    input_cached_tokens: int
    input_cache_write_tokens: int
    input_uncached_tokens: int
    input_text_tokens: int
    input_cached_text_tokens: int
    input_audio_tokens: int
    input_cached_audio_tokens: int = 0
    input_image_tokens: int
    input_cached_image_tokens: int = 0
    output_tokens: int
    output_text_tokens: int
    """Reasoning among them."""
    output_audio_tokens: int
    output_image_tokens: int
    object: Literal["organization.usage.completions.result"] = "organization.usage.completions.result"


class EmbeddingsResult(_OfModel, frozen=True, kw_only=True):
    """Tokens of embeddings."""

    input_tokens: int
    object: Literal["organization.usage.embeddings.result"] = "organization.usage.embeddings.result"


class ModerationsResult(_OfModel, frozen=True, kw_only=True):
    """Tokens of moderations."""

    input_tokens: int
    object: Literal["organization.usage.moderations.result"] = "organization.usage.moderations.result"


class ImagesResult(_OfModel, frozen=True, kw_only=True):
    """Pictures that are priced by the piece."""

    images: int
    source: ImageSource | None = None
    size: None = None
    """Sizes are not recorded."""
    object: Literal["organization.usage.images.result"] = "organization.usage.images.result"


class AudioSpeechesResult(_OfModel, frozen=True, kw_only=True):
    """Characters that were spoken."""

    characters: int
    object: Literal["organization.usage.audio_speeches.result"] = "organization.usage.audio_speeches.result"


class AudioTranscriptionsResult(_OfModel, frozen=True, kw_only=True):
    """Seconds that were listened to."""

    seconds: int
    object: Literal["organization.usage.audio_transcriptions.result"] = "organization.usage.audio_transcriptions.result"


class VectorStoresResult(_OfProject, frozen=True, kw_only=True):
    """Bytes that were kept."""

    usage_bytes: int
    object: Literal["organization.usage.vector_stores.result"] = "organization.usage.vector_stores.result"


class CodeInterpreterSessionsResult(_OfProject, frozen=True, kw_only=True):
    """Sessions."""

    num_sessions: int
    object: Literal["organization.usage.code_interpreter_sessions.result"] = (
        "organization.usage.code_interpreter_sessions.result"
    )


class FileSearchCallsResult(_OfCaller, frozen=True, kw_only=True):
    """Calls."""

    num_requests: int
    vector_store_id: str | None = None
    object: Literal["organization.usage.file_searches.result"] = "organization.usage.file_searches.result"


class WebSearchCallsResult(_OfModel, frozen=True, kw_only=True):
    """Calls."""

    num_requests: int
    context_level: str | None = None
    object: Literal["organization.usage.web_searches.result"] = "organization.usage.web_searches.result"


class Amount(msgspec.Struct, frozen=True):
    """An exact amount. *value* is a JSON number: decimal text that never was a binary fraction."""

    value: msgspec.Raw
    currency: Literal["usd"] = "usd"


class CostsResult(_OfProject, frozen=True, kw_only=True):
    """What the organization is charged. A line item is a model."""

    amount: Amount
    line_item: str | None = None
    api_key_id: str | None = None
    quantity: None = None
    """A model's charge is made of several units."""
    quantity_unit: None = None
    object: Literal["organization.costs.result"] = "organization.costs.result"


def completions_result(used: Usage) -> CompletionsResult:
    """Return the tokens of text generation."""
    units = used.units
    return CompletionsResult(
        project_id=used.project_id,
        api_key_id=used.key_id,
        model=used.model,
        batch=used.is_batch,
        service_tier=used.service_tier,
        num_model_requests=used.requests,
        input_tokens=units.all_input_tokens,
        input_cached_tokens=units.cached_input_tokens,
        input_cache_write_tokens=units.cache_write_tokens + units.cache_write_1h_tokens,
        input_uncached_tokens=units.input_tokens + units.input_audio_tokens + units.input_image_tokens,
        input_text_tokens=units.input_tokens,
        input_cached_text_tokens=units.cached_input_tokens,
        input_audio_tokens=units.input_audio_tokens,
        input_image_tokens=units.input_image_tokens,
        output_tokens=units.all_output_tokens,
        output_text_tokens=units.output_tokens + units.reasoning_tokens,
        output_audio_tokens=units.output_audio_tokens,
        output_image_tokens=units.output_image_tokens,
    )


def embeddings_result(used: Usage) -> EmbeddingsResult:
    """Return the tokens of embeddings."""
    return EmbeddingsResult(
        project_id=used.project_id,
        api_key_id=used.key_id,
        model=used.model,
        num_model_requests=used.requests,
        input_tokens=used.units.all_input_tokens,
    )


def images_result(used: Usage, source: ImageSource | None) -> ImagesResult:
    """Return the pictures of one group; *source* is what made them, if they were grouped by it."""
    return ImagesResult(
        project_id=used.project_id,
        api_key_id=used.key_id,
        model=used.model,
        num_model_requests=used.requests,
        images=used.units.images,
        source=source,
    )


def transcriptions_result(used: Usage) -> AudioTranscriptionsResult:
    """Return the seconds of audio of one group."""
    return AudioTranscriptionsResult(
        project_id=used.project_id,
        api_key_id=used.key_id,
        model=used.model,
        num_model_requests=used.requests,
        seconds=used.units.audio_seconds,
    )


def costs_result(used: Usage) -> CostsResult:
    """Return the charge of one group."""
    amount = Amount(msgspec.Raw(usd_text(used.charge_nano_usd).encode()))
    # A credit to an organization is no project's and no key's: OpenAI's form has null there.
    project_id, key_id = used.project_id or None, used.key_id or None
    return CostsResult(project_id=project_id, api_key_id=key_id, line_item=used.model, amount=amount)
