"""What the usage API takes, as OpenAI's document has it. Each list may be empty, which lets everything through.

`usage_query` tells which sums a form asks for. What is not recorded matches nothing: an answer that ignores a filter
would be taken for filtered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from metering.summary_queries import Buckets, GroupField, UsageQuery

Texts = tuple[str, ...]
_TIME_MAX = 9_999_999_999
"""In 2286. Milliseconds are larger."""
StartTime = Annotated[int, Meta(ge=0, le=_TIME_MAX, description="Unix seconds, inclusive.")]
EndTime = Annotated[int, Meta(ge=0, le=_TIME_MAX, description="Unix seconds, exclusive. Default: now.")]
IMAGE_SOURCE: Final = "image.generation"
"""Where every picture comes from that is recorded."""
# What sums can be told apart by. By anything else (users, sizes) there is one group, whose field is null.
_GROUPS: Final[Mapping[str, GroupField]] = {
    "project_id": "project_id",
    "api_key_id": "key_id",
    "model": "model",
    "line_item": "model",
    "batch": "is_batch",
    "service_tier": "service_tier",
}
Operations = tuple[str, ...] | None
"""Names from `inference.endpoints`; None: all."""


class _BucketsQuery(msgspec.Struct, frozen=True, kw_only=True):
    start_time: StartTime
    end_time: EndTime | None = None
    bucket_width: Literal["1m", "1h", "1d"] = "1d"
    project_ids: Texts = ()
    limit: Annotated[int, Meta(description="1d: 1-31, default 7; 1h: 1-168, 24; 1m: 1-1440, 60.")] | None = None
    page: Annotated[str, Meta(description="The next_page of the page before.")] | None = None

    def filtered(self, buckets: Buckets, operations: Operations) -> UsageQuery:
        """Return which of *operations* is asked for; how it is told apart is not in it."""
        return UsageQuery(buckets=buckets, operations=operations, project_ids=self.project_ids)


class _CallersQuery(_BucketsQuery, frozen=True, kw_only=True):
    api_key_ids: Texts = ()
    user_ids: Annotated[Texts, Meta(description="Calls are not attributed to users: any value matches nothing.")] = ()

    def filtered(self, buckets: Buckets, operations: Operations) -> UsageQuery:
        """Return which of *operations* is asked for: none where users are named."""
        found = super().filtered(buckets, () if self.user_ids else operations)
        return msgspec.structs.replace(found, key_ids=self.api_key_ids)


class _ModelsQuery(_CallersQuery, frozen=True, kw_only=True):
    models: Texts = ()

    def filtered(self, buckets: Buckets, operations: Operations) -> UsageQuery:
        """Return which of *operations* is asked for."""
        return msgspec.structs.replace(super().filtered(buckets, operations), models=self.models)


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

    def filtered(self, buckets: Buckets, operations: Operations) -> UsageQuery:
        """Return which of *operations* is asked for."""
        return msgspec.structs.replace(super().filtered(buckets, operations), is_batch=self.batch)


class ImagesQuery(_ModelsQuery, frozen=True, kw_only=True):
    """Of images."""

    sources: tuple[Literal["image.generation", "image.edit", "image.variation"], ...] = ()
    sizes: Annotated[
        tuple[Literal["256x256", "512x512", "1024x1024", "1792x1792", "1024x1792"], ...],
        Meta(description="Sizes are not recorded: any value matches nothing."),
    ] = ()
    group_by: tuple[Literal["project_id", "user_id", "api_key_id", "model", "size", "source"], ...] = ()

    def filtered(self, buckets: Buckets, operations: Operations) -> UsageQuery:
        """Return which of *operations* is asked for: none where sizes are named, or only sources without pictures."""
        is_nothing = self.sizes or (self.sources and IMAGE_SOURCE not in self.sources)
        return super().filtered(buckets, () if is_nothing else operations)


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

    def filtered(self, buckets: Buckets, operations: Operations) -> UsageQuery:
        """Return which of *operations* is asked for."""
        return UsageQuery(
            buckets=buckets, operations=operations, project_ids=self.project_ids, key_ids=self.api_key_ids
        )


UsageForm = (
    ProjectUsageQuery
    | ModelUsageQuery
    | CompletionsQuery
    | ImagesQuery
    | FileSearchCallsQuery
    | WebSearchCallsQuery
    | CostsQuery
)


def usage_query(asked: UsageForm, buckets: Buckets, operations: Operations) -> UsageQuery:
    """Return the sums that are *asked* for, of some *operations*."""
    groups = dict.fromkeys(_GROUPS[name] for name in asked.group_by if name in _GROUPS)
    return msgspec.structs.replace(asked.filtered(buckets, operations), group_by=tuple(groups))
