"""The routes of the data plane: what each carries, which scope it needs, what it is called in telemetry."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from keys.scopes import Scope


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One route. *operation* is its OpenTelemetry GenAI name; *path* is relative to a provider's base URL."""

    path: str
    operation: str
    scope: Scope
    body: Literal["json", "form"] = "json"
    can_stream: bool = False
    has_usage_option: bool = False
    generates_tokens: bool = False


ENDPOINTS: Final = (
    Endpoint(
        path="/chat/completions",
        operation="chat",
        scope="chat:write",
        can_stream=True,
        has_usage_option=True,
        generates_tokens=True,
    ),
    Endpoint(
        path="/completions",
        operation="text_completion",
        scope="chat:write",
        can_stream=True,
        has_usage_option=True,
        generates_tokens=True,
    ),
    Endpoint(path="/embeddings", operation="embeddings", scope="embeddings:write"),
    Endpoint(path="/images/generations", operation="image_generation", scope="images:write", can_stream=True),
    Endpoint(
        path="/audio/transcriptions", operation="transcription", scope="audio:write", body="form", can_stream=True
    ),
)
