"""The usage API's forms: what is asked and what is answered, as OpenAI's document has it (UsageResponse and below)."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

Result = TypeVar("Result")
Texts = tuple[str, ...]
StartTime = Annotated[int, Meta(description="Unix seconds, inclusive; the bucket that holds it is the first one.")]
EndTime = Annotated[int, Meta(description="Unix seconds, exclusive. Default: now.")]
Page = Annotated[str, Meta(description="The `next_page` of the page before.")]
BucketCount = Annotated[int, Meta(description="Buckets: 1d 1-31 (default 7), 1h 1-168 (24), 1m 1-1440 (60).")]
DayCount = Annotated[int, Meta(description="Buckets: 1-180 (default 7).")]


class ProjectUsageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What every route takes."""

    start_time: StartTime
    end_time: EndTime | None = None
    bucket_width: Literal["1m", "1h", "1d"] = "1d"
    project_ids: Texts = ()
    group_by: tuple[Literal["project_id"], ...] = ()
    limit: BucketCount | None = None
    page: Page | None = None


class ModelUsageQuery(ProjectUsageQuery, frozen=True, kw_only=True):
    """Of what a model does for a caller."""

    user_ids: Annotated[Texts, Meta(description="Calls are not attributed to users: any value matches nothing.")] = ()
    api_key_ids: Texts = ()
    models: Texts = ()
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "model"], ...] = ()


class CompletionsQuery(ModelUsageQuery, frozen=True, kw_only=True):
    """Batches have a price of their own."""

    batch: bool | None = None
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "model", "batch", "service_tier"], ...] = ()


class ImagesQuery(ModelUsageQuery, frozen=True, kw_only=True):
    """Sizes are not recorded."""

    sources: tuple[Literal["image.generation", "image.edit", "image.variation"], ...] = ()
    sizes: tuple[Literal["256x256", "512x512", "1024x1024", "1792x1792", "1024x1792"], ...] = ()
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "model", "size", "source"], ...] = ()


class FileSearchCallsQuery(ProjectUsageQuery, frozen=True, kw_only=True):
    """Not served yet."""

    user_ids: Texts = ()
    api_key_ids: Texts = ()
    vector_store_ids: Texts = ()
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "vector_store_id"], ...] = ()


class WebSearchCallsQuery(ModelUsageQuery, frozen=True, kw_only=True):
    """Not served yet."""

    context_levels: tuple[Literal["low", "medium", "high"], ...] = ()
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "model", "context_level"], ...] = ()


class CostsQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Of money."""

    start_time: StartTime
    end_time: EndTime | None = None
    bucket_width: Literal["1d"] = "1d"
    project_ids: Texts = ()
    api_key_ids: Texts = ()
    group_by: tuple[Literal["project_id", "line_item", "api_key_id"], ...] = ()
    limit: DayCount | None = None
    page: Page | None = None


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
    source: Literal["image.generation"] | None = None
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
