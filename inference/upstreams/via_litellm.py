"""Every other provider, through litellm's translation only: no proxy, router, callbacks, cache or telemetry of it.

The only file that imports litellm, and only when a model needs it: the import takes seconds and 200 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, cast

import msgspec

from core.http1.errors import ConnectFailed, FirstByteTimedOut, UpstreamError
from inference.errors import ParameterUnsupported
from inference.upstreams.base import EVENT_STREAM, Answer, GeneratedAnswer, HeldAnswer, UpstreamCall
from inference.wire import JSON

_encode: Final = msgspec.json.Encoder().encode
_FUNCTIONS: Final = {
    "/chat/completions": "acompletion",
    "/completions": "atext_completion",
    "/embeddings": "aembedding",
}
# Part of every call: not a matter of what the provider supports.
_OWN_FIELDS: Final = frozenset({"model", "messages", "prompt", "input", "stream", "stream_options"})
# litellm lists these as supported; they choose where a call goes and what it carries besides.
_NOT_A_CALLERS: Final = frozenset(
    {"extra_headers", "extra_body", "extra_query", "api_base", "base_url", "api_key", "api_version", "timeout"}
    | {"deployment_id", "custom_llm_provider", "max_retries"}
)
_ADDRESS: Final = re.compile(r"\s*(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)


class ViaLitellm:
    """Calls providers whose wire format is not OpenAI's."""

    def __init__(self) -> None:
        self._litellm: Any = None
        self._importing = asyncio.Lock()

    async def open(self, call: UpstreamCall) -> Answer:
        """Translate and send the call. Errors: UpstreamError, ParameterUnsupported."""
        litellm = await self._imported()
        function = _FUNCTIONS.get(call.endpoint.path)
        if function is None:
            raise ParameterUnsupported(call.endpoint.path, call.deployment.model)
        arguments = _arguments(litellm, call)
        await call.permit
        try:
            async with asyncio.timeout(call.deployment.deadlines.first_byte_seconds):
                response = await getattr(litellm, function)(**arguments)
        except TimeoutError:
            raise FirstByteTimedOut("The provider did not begin to answer in time.") from None
        except Exception as error:  # noqa: BLE001 - litellm raises whatever its providers' clients do
            return _failure(error)
        if call.request.is_stream:
            return GeneratedAnswer(200, EVENT_STREAM, _events(response), call.deployment.deadlines)
        return HeldAnswer(200, ((b"content-type", JSON),), _encode(_plain(response)))

    async def close(self) -> None:
        """Close litellm's own clients, if it was ever imported."""
        if self._litellm is not None:
            with contextlib.suppress(Exception):
                await self._litellm.close_litellm_async_clients()

    async def _imported(self) -> Any:
        async with self._importing:
            if self._litellm is None:
                self._litellm = await asyncio.to_thread(_import_litellm)
        return self._litellm


def _import_litellm() -> Any:
    # Its price list comes from its own wheel, not from a server; and it must not read a .env that happens to lie about.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    os.environ.setdefault("LITELLM_MODE", "PRODUCTION")
    try:
        litellm: Any = importlib.import_module("litellm")
    except ImportError as error:
        raise ConnectFailed("litellm is not installed", phase="connect") from error
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.turn_off_message_logging = True
    litellm.drop_params = False
    litellm.modify_params = False
    litellm.callbacks = []
    litellm.success_callback = []
    litellm.failure_callback = []
    return litellm


def _arguments(litellm: Any, call: UpstreamCall) -> dict[str, Any]:
    """Return what litellm is called with. Errors: ParameterUnsupported.

    litellm takes its own settings (`api_base`, `mock_response`, `fallbacks` …) as arguments beside OpenAI's, so that a
    caller's field that is not known to be OpenAI's must not get there.
    """
    provider, deployment = call.deployment.provider, call.deployment
    settings = provider.settings
    body = call.request.decoded()
    kind = settings.litellm_provider or provider.name
    _refuse_unsupported(litellm, body, kind, call)
    _refuse_addresses(body.get("messages"), deployment.model)
    body["model"] = f"{kind}/{deployment.model}"
    if call.request.is_stream and call.endpoint.has_usage_option:
        body["stream_options"] = {"include_usage": True}
    return body | {
        "api_key": provider.api_key,
        "base_url": settings.base_url,
        "extra_headers": dict(settings.headers) or None,
        "timeout": deployment.deadlines.total_seconds,
        "max_retries": 0,
        "num_retries": 0,
        # Calls with tools would otherwise import litellm's proxy to look for tools of its own.
        "_skip_mcp_handler": True,
        **settings.options,
    }


def _refuse_unsupported(litellm: Any, body: Mapping[str, Any], provider: str, call: UpstreamCall) -> None:
    """Refuse by name what this provider is not known to take: dropped silently, it would change the answer."""
    model = call.deployment.model
    if call.endpoint.path == "/chat/completions":
        listed: list[str] = litellm.get_supported_openai_params(model=model, custom_llm_provider=provider) or []
        supported = set(listed) - _NOT_A_CALLERS
    elif call.endpoint.path == "/embeddings":
        supported = {"dimensions", "encoding_format", "user"}
    else:
        supported = {"max_tokens", "temperature", "top_p", "n", "stop", "presence_penalty", "frequency_penalty", "user"}
    for name in body:
        if name not in supported and name not in _OWN_FIELDS:
            raise ParameterUnsupported(name, model)


def _refuse_addresses(messages: Any, model: str) -> None:
    """Refuse pictures and files by address: for some providers litellm would fetch them itself, from anywhere.

    What stands in the message (`data:` addresses) is passed on.
    """
    for message in cast("list[Any]", messages) if isinstance(messages, list) else ():
        content = cast("dict[str, Any]", message).get("content") if isinstance(message, dict) else None
        for part in cast("list[Any]", content) if isinstance(content, list) else ():
            if isinstance(part, dict) and cast("dict[str, Any]", part).get("type") != "text" and _has_address(part):
                raise ParameterUnsupported("messages: a picture or file by address (send it as a data: address)", model)


def _has_address(value: Any) -> bool:
    if isinstance(value, str):
        return _ADDRESS.match(value) is not None
    if isinstance(value, dict):
        return any(_has_address(item) for item in cast("dict[str, Any]", value).values())
    return isinstance(value, list) and any(_has_address(item) for item in cast("list[Any]", value))


async def _events(chunks: Any) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            for plain in _as_openai_sends(_plain(chunk)):
                yield b"data: " + _encode(plain) + b"\n\n"
    except UpstreamError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        answer = _failure(error)
        yield b"data: " + answer.body + b"\n\n"
        return
    yield b"data: [DONE]\n\n"


def _as_openai_sends(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a chunk as OpenAI has it: null usage beside choices, and the counts in a chunk of their own."""
    usage = chunk.pop("usage", None)
    choices = [choice for choice in chunk.get("choices") or () if choice.get("finish_reason") or _says(choice)]
    chunks = [chunk | {"choices": choices, "usage": None}] if choices else []
    if usage is not None:
        chunks.append(chunk | {"choices": [], "usage": usage})
    return chunks


def _says(choice: dict[str, Any]) -> bool:
    delta: dict[str, Any] = choice.get("delta") or {}
    return "text" in choice or any(value is not None for value in delta.values())


def _plain(response: Any) -> dict[str, Any]:
    """Return a litellm object as OpenAI would have sent it: without litellm's own fields."""
    plain: dict[str, Any] = response.model_dump(exclude_none=False, exclude_unset=False)
    for choice in plain.get("choices") or ():
        message, delta = choice.get("message"), choice.get("delta")
        if isinstance(message, dict):
            _drop_empty(cast("dict[str, Any]", message), _REQUIRED)
        if isinstance(delta, dict):
            # Only the first delta has a role, and with it all three names.
            part = cast("dict[str, Any]", delta)
            _drop_empty(part, _REQUIRED if part.get("role") else frozenset())
    usage = plain.get("usage")
    if isinstance(usage, dict):
        plain["usage"] = {name: value for name, value in cast("dict[str, Any]", usage).items() if name in _USAGE_FIELDS}
    return {name: value for name, value in plain.items() if name in _PUBLIC or value is not None}


_PUBLIC: Final = frozenset({"id", "object", "created", "model", "choices", "usage", "data"})
_USAGE_FIELDS: Final = frozenset(
    {
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "prompt_tokens_details",
        "completion_tokens_details",
        # Anthropic's, priced apart.
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
    }
)
_REQUIRED: Final = frozenset({"role", "content", "refusal"})


def _drop_empty(part: dict[str, Any], required: frozenset[str]) -> None:
    for name in [name for name, value in part.items() if value is None and name not in required]:
        del part[name]


def _failure(error: Exception) -> HeldAnswer:
    """Return litellm's exception as the answer that OpenAI would give. Errors: ConnectFailed when it is none."""
    status = getattr(error, "status_code", None)
    if not isinstance(status, int) or not 400 <= status < 600:
        raise ConnectFailed(f"litellm: {type(error).__name__}", phase="connect") from error
    # The message may hold the provider's whole answer; only errors that are about the request are the caller's to read.
    message = str(getattr(error, "message", error)).replace("litellm.", "") if status in {400, 404, 422} else "failed"
    detail = {
        "message": message,
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None) and str(getattr(error, "code", None)),
    }
    if status == 429:
        detail |= {
            "message": "The model's provider is at its rate limit.",
            "type": "requests",
            "code": "rate_limit_exceeded",
        }
    headers = [(b"content-type", JSON)]
    response_headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    if response_headers.get("retry-after"):
        headers.append((b"retry-after", str(response_headers["retry-after"]).encode("latin-1", "replace")))
    return HeldAnswer(status, headers, _encode({"error": detail}))
