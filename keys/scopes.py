"""What a key may do. Default-deny: a route names the scope it needs, and a test walks the routes.

A key is either for calling models or for administration, as OpenAI's keys are: what an application holds must not read
the organization's books, and what an accountant holds must not spend.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

InferenceScope = Literal["chat:write", "embeddings:write", "images:write", "audio:write", "models:read"]
AdminScope = Literal["usage:read", "billing:manage", "webhooks:manage"]
OperatorScope = Literal["operator:read"]
Scope = InferenceScope | AdminScope | OperatorScope
INFERENCE_SCOPES: Final[tuple[InferenceScope, ...]] = get_args(InferenceScope)
"""What a key may do unless its maker says otherwise."""
ADMIN_SCOPES: Final[tuple[AdminScope, ...]] = get_args(AdminScope)
OPERATOR_SCOPES: Final[tuple[OperatorScope, ...]] = get_args(OperatorScope)
"""What reaches beyond one organization. Only the operator's command line gives them."""
ALL_SCOPES: Final[tuple[Scope, ...]] = (*INFERENCE_SCOPES, *ADMIN_SCOPES, *OPERATOR_SCOPES)
