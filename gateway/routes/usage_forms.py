"""What the usage API takes, as OpenAI's document has it. Each list may be empty, which lets everything through."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Texts = tuple[str, ...]
_TIME_MAX = 9_999_999_999
"""In 2286. Milliseconds are larger."""
StartTime = Annotated[int, Meta(ge=0, le=_TIME_MAX, description="Unix seconds, inclusive.")]
EndTime = Annotated[int, Meta(ge=0, le=_TIME_MAX, description="Unix seconds, exclusive. Default: now.")]


class _BucketsQuery(msgspec.Struct, frozen=True, kw_only=True):
    start_time: StartTime
    end_time: EndTime | None = None
    bucket_width: Literal["1m", "1h", "1d"] = "1d"
    project_ids: Texts = ()
    limit: Annotated[int, Meta(description="1d: 1-31, default 7; 1h: 1-168, 24; 1m: 1-1440, 60.")] | None = None
    page: Annotated[str, Meta(description="The next_page of the page before.")] | None = None


class _CallersQuery(_BucketsQuery, frozen=True, kw_only=True):
    api_key_ids: Texts = ()
    user_ids: Annotated[Texts, Meta(description="Calls are not attributed to users: any value matches nothing.")] = ()


class _ModelsQuery(_CallersQuery, frozen=True, kw_only=True):
    models: Texts = ()


class ProjectUsageQuery(_BucketsQuery, frozen=True, kw_only=True):
    """Of what a project keeps or runs."""

    group_by: tuple[Literal["project_id"], ...] = ()


class ModelUsageQuery(_ModelsQuery, frozen=True, kw_only=True):
    """Of what a model does for a caller."""

    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "model"], ...] = ()


class CompletionsQuery(_ModelsQuery, frozen=True, kw_only=True):
    """Of text generation."""

    batch: bool | None = None
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "model", "batch", "service_tier"], ...] = ()


class ImagesQuery(_ModelsQuery, frozen=True, kw_only=True):
    """Of images."""

    sources: tuple[Literal["image.generation", "image.edit", "image.variation"], ...] = ()
    sizes: Annotated[
        tuple[Literal["256x256", "512x512", "1024x1024", "1792x1792", "1024x1792"], ...],
        Meta(description="Sizes are not recorded: any value matches nothing."),
    ] = ()
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "model", "size", "source"], ...] = ()


class FileSearchCallsQuery(_CallersQuery, frozen=True, kw_only=True):
    """Of file search."""

    vector_store_ids: Texts = ()
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "vector_store_id"], ...] = ()


class WebSearchCallsQuery(_ModelsQuery, frozen=True, kw_only=True):
    """Of web search."""

    context_levels: tuple[Literal["low", "medium", "high"], ...] = ()
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "model", "context_level"], ...] = ()


class CostsQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Of money."""

    start_time: StartTime
    end_time: EndTime | None = None
    bucket_width: Literal["1d"] = "1d"
    project_ids: Texts = ()
    api_key_ids: Texts = ()
    limit: Annotated[int, Meta(description="1-180, default 7.")] | None = None
    page: Annotated[str, Meta(description="The next_page of the page before.")] | None = None
    group_by: tuple[Literal["project_id", "line_item", "api_key_id"], ...] = ()
