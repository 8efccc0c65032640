"""What is kept sealed of an endpoint: its signing secrets, and headers of the customer's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from core.sealing import Sealer

_HEADERS: Final = msgspec.json.Decoder(dict[str, str])


def secret_place(organization_id: str, secret_id: str) -> str:
    """Return where a signing secret is kept: it opens nowhere else."""
    return f"{organization_id}|webhook_secrets|{secret_id}"


def headers_place(organization_id: str, endpoint_id: str) -> str:
    """Return where an endpoint's headers are kept."""
    return f"{organization_id}|webhook_endpoints|{endpoint_id}"


def seal_headers(sealer: Sealer, headers: Mapping[str, str], *, organization_id: str, endpoint_id: str) -> bytes | None:
    """Return *headers* sealed; None of none."""
    if not headers:
        return None
    return sealer.seal(msgspec.json.encode(headers), headers_place(organization_id, endpoint_id))


def open_headers(sealer: Sealer, sealed: bytes | None, *, organization_id: str, endpoint_id: str) -> dict[str, str]:
    """Return an endpoint's headers. Errors: SealBroken."""
    if sealed is None:
        return {}
    return _HEADERS.decode(sealer.open(sealed, headers_place(organization_id, endpoint_id)))
