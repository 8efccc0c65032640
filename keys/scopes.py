"""What a key may do. Default-deny: a route names the scope it needs, and a test walks the routes."""

from __future__ import annotations

from typing import Final, Literal, get_args

Scope = Literal["chat:write", "embeddings:write", "images:write", "audio:write", "models:read"]
ALL_SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
