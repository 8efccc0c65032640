"""OpenAI's usage API: what an organization used and what it is charged, in buckets of time.

Answered from sums; the ledger is not touched. Kinds of usage that this gateway does not serve have empty buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NoReturn, TypeVar

import msgspec
from litestar import Request, get
from litestar.handlers import HTTPRouteHandler

from gateway.routes.query_string import described_by, read_query
from gateway.routes.usage_forms import (
    IMAGE_SOURCE,
    CompletionsQuery,
    CostsQuery,
    FileSearchCallsQuery,
    ImagesQuery,
    ModelUsageQuery,
    ProjectUsageQuery,
    UsageForm,
    WebSearchCallsQuery,
    usage_query,
)
from gateway.routes.usage_results import (
    AudioSpeechesResult,
    AudioTranscriptionsResult,
    CodeInterpreterSessionsResult,
    CompletionsResult,
    CostsResult,
    EmbeddingsResult,
    FileSearchCallsResult,
    ImagesResult,
    ModerationsResult,
    UsageBucket,
    UsagePage,
    VectorStoresResult,
    WebSearchCallsResult,
    completions_result,
    costs_result,
    embeddings_result,
    images_result,
    transcriptions_result,
)
from gateway.runtime import Runtime
from keys.principal import Principal
from metering.summaries import COSTS_LIMITS, USAGE_LIMITS, PageRequest, Usage, next_page, page_range, usage

Asking = Request[Any, Any, Any]
_Form = TypeVar("_Form", bound=msgspec.Struct)
_Result = TypeVar("_Result")
# Last part of a route → the operations that it tells of (`inference.endpoints`); a test sees to it that none is left
# out or told of twice. What is not here is not served, and has empty buckets.
OPERATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "completions": ("chat", "text_completion"),
    "embeddings": ("embeddings",),
    "images": ("image_generation",),
    "audio_transcriptions": ("transcription",),
}


def _route(path: str, form: type[msgspec.Struct], summary: str) -> Callable[[Callable[..., Any]], HTTPRouteHandler]:
    """Declare a route whose query is a *form*."""
    operation_id = f"usage_{path.rpartition('/')[2]}"
    return get(path, summary=summary, operation_id=operation_id, operation_class=described_by(form))


@_route("/v1/organization/usage/completions", CompletionsQuery, "Usage of text generation")
async def completions(request: Asking, principal: Principal, runtime: Runtime) -> UsagePage[CompletionsResult]:
    """Return the tokens of chat and text completions."""
    asked = _asked(request, principal, CompletionsQuery)
    return await _page(runtime, principal, asked, "completions", completions_result)


@_route("/v1/organization/usage/embeddings", ModelUsageQuery, "Usage of embeddings")
async def embeddings(request: Asking, principal: Principal, runtime: Runtime) -> UsagePage[EmbeddingsResult]:
    """Return the tokens of embeddings."""
    asked = _asked(request, principal, ModelUsageQuery)
    return await _page(runtime, principal, asked, "embeddings", embeddings_result)


@_route("/v1/organization/usage/moderations", ModelUsageQuery, "Usage of moderations")
async def moderations(request: Asking, principal: Principal, runtime: Runtime) -> UsagePage[ModerationsResult]:
    """Return empty buckets: moderations are not served yet."""
    asked = _asked(request, principal, ModelUsageQuery)
    return await _page(runtime, principal, asked, "moderations", _never)


@_route("/v1/organization/usage/images", ImagesQuery, "Usage of image generation")
async def images(request: Asking, principal: Principal, runtime: Runtime) -> UsagePage[ImagesResult]:
    """Return how many pictures were made."""
    asked = _asked(request, principal, ImagesQuery)
    source = IMAGE_SOURCE if "source" in asked.group_by else None
    return await _page(runtime, principal, asked, "images", lambda used: images_result(used, source))


@_route("/v1/organization/usage/audio_speeches", ModelUsageQuery, "Usage of speech")
async def audio_speeches(request: Asking, principal: Principal, runtime: Runtime) -> UsagePage[AudioSpeechesResult]:
    """Return empty buckets: speech is not served yet."""
    asked = _asked(request, principal, ModelUsageQuery)
    return await _page(runtime, principal, asked, "audio_speeches", _never)


@_route("/v1/organization/usage/audio_transcriptions", ModelUsageQuery, "Usage of transcription")
async def audio_transcriptions(
    request: Asking, principal: Principal, runtime: Runtime
) -> UsagePage[AudioTranscriptionsResult]:
    """Return the seconds of audio that were transcribed."""
    asked = _asked(request, principal, ModelUsageQuery)
    return await _page(runtime, principal, asked, "audio_transcriptions", transcriptions_result)


@_route("/v1/organization/usage/vector_stores", ProjectUsageQuery, "Usage of vector stores")
async def vector_stores(request: Asking, principal: Principal, runtime: Runtime) -> UsagePage[VectorStoresResult]:
    """Return empty buckets: vector stores are not served yet."""
    asked = _asked(request, principal, ProjectUsageQuery)
    return await _page(runtime, principal, asked, "vector_stores", _never)


@_route("/v1/organization/usage/code_interpreter_sessions", ProjectUsageQuery, "Usage of code interpreters")
async def code_interpreter_sessions(
    request: Asking, principal: Principal, runtime: Runtime
) -> UsagePage[CodeInterpreterSessionsResult]:
    """Return empty buckets: code interpreters are not served yet."""
    asked = _asked(request, principal, ProjectUsageQuery)
    return await _page(runtime, principal, asked, "code_interpreter_sessions", _never)


@_route("/v1/organization/usage/file_search_calls", FileSearchCallsQuery, "Usage of file search")
async def file_search_calls(
    request: Asking, principal: Principal, runtime: Runtime
) -> UsagePage[FileSearchCallsResult]:
    """Return empty buckets: file search is not served yet."""
    asked = _asked(request, principal, FileSearchCallsQuery)
    return await _page(runtime, principal, asked, "file_search_calls", _never)


@_route("/v1/organization/usage/web_search_calls", WebSearchCallsQuery, "Usage of web search")
async def web_search_calls(request: Asking, principal: Principal, runtime: Runtime) -> UsagePage[WebSearchCallsResult]:
    """Return empty buckets: web search is not served yet."""
    asked = _asked(request, principal, WebSearchCallsQuery)
    return await _page(runtime, principal, asked, "web_search_calls", _never)


@_route("/v1/organization/costs", CostsQuery, "Costs")
async def costs(request: Asking, principal: Principal, runtime: Runtime) -> UsagePage[CostsResult]:
    """Return what the organization is charged, by UTC day. A line item is a model."""
    asked = _asked(request, principal, CostsQuery)
    return await _page(runtime, principal, asked, "costs", costs_result)


def _asked(request: Asking, principal: Principal, form: type[_Form]) -> _Form:
    principal.require_scope("usage:read")
    return read_query(request, form)


async def _page(
    runtime: Runtime, principal: Principal, asked: UsageForm, kind: str, result: Callable[[Usage], _Result]
) -> UsagePage[_Result]:
    """Read a page of sums. PostgreSQL down: UsageUnreadable. Errors: those of `Reading.page`; Invalid for the query."""
    wanted = PageRequest(
        start_time=asked.start_time,
        end_time=asked.end_time,
        width=asked.bucket_width,
        limit=asked.limit,
        page=asked.page,
    )
    limits = COSTS_LIMITS if kind == "costs" else USAGE_LIMITS
    page = page_range(wanted, limits, now=datetime.now(UTC))
    query = usage_query(asked, page.buckets, None if kind == "costs" else OPERATIONS.get(kind, ()))
    async with runtime.reading.page(principal.organization_id) as session:
        buckets = await usage(session, query, organization_id=principal.organization_id)
    data = [
        UsageBucket(_seconds(bucket.starts_at), _seconds(bucket.ends_at), [result(used) for used in bucket.groups])
        for bucket in buckets
    ]
    following = next_page(page, buckets)
    return UsagePage(data, following is not None, following)


def _never(used: Usage) -> NoReturn:
    raise AssertionError(f"no operation is told of here: {used}")


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


ROUTES = (
    completions,
    embeddings,
    moderations,
    images,
    audio_speeches,
    audio_transcriptions,
    vector_stores,
    code_interpreter_sessions,
    file_search_calls,
    web_search_calls,
    costs,
)
