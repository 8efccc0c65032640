"""What a worker needs of an endpoint to send to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
import structlog

from core.clock import Clock
from core.sealing import SealBroken, Sealer
from webhooks.health import Health
from webhooks.vault import open_headers, secret_place

Fetch = Callable[..., Awaitable[list[Any]]]
# How an endpoint is doing is loaded where it is taken over, and from then on its worker's alone to say.
_LOAD: Final = """
SELECT e.id, e.organization_id, e.url, e.sealed_headers, e.requests_per_second, e.updated_at, e.enabled_at,
  e.failing_since, e.consecutive_failures, e.warned_percent,
  extract(epoch FROM e.resting_until - now())::float8 AS rest_seconds,
  array_agg(s.id ORDER BY s.id DESC) AS secret_ids, array_agg(s.sealed ORDER BY s.id DESC) AS sealed_secrets,
  array_agg(s.not_after ORDER BY s.id DESC) AS ends
FROM webhook_endpoints e JOIN webhook_secrets s ON s.endpoint_id = e.id
WHERE e.id = ANY ($1::text[]) AND e.worker_id = $2 AND e.disabled_at IS NULL AND e.deleted_at IS NULL
GROUP BY e.id
"""
_log = structlog.get_logger(__name__)


class Target(msgspec.Struct, frozen=True):
    """An endpoint as it is sent to."""

    endpoint_id: str
    organization_id: str
    url: str
    headers: tuple[tuple[bytes, bytes], ...]
    secrets: tuple[tuple[bytes, datetime | None], ...]
    """Each with when it ends; the newest first."""
    requests_per_second: int | None
    updated_at: datetime
    enabled_at: datetime

    def __repr__(self) -> str:
        """Keep secrets out of logs and tracebacks."""
        return f"Target({self.endpoint_id!r})"

    def secrets_at(self, now: datetime) -> list[bytes]:
        """Return the secrets that have not ended."""
        return [secret for secret, end in self.secrets if end is None or end > now]


async def load(
    fetch: Fetch, endpoint_ids: list[str], worker_id: str, sealer: Sealer, clock: Clock
) -> tuple[list[tuple[Target, Health]], list[str]]:
    """Return endpoints of the worker's that may be sent to, and the ids of those whose secrets cannot be opened."""
    loaded: list[tuple[Target, Health]] = []
    broken: list[str] = []
    for row in await fetch(_LOAD, endpoint_ids, worker_id):
        try:
            target = _target(row, sealer)
        except SealBroken as error:
            # The operator's to mend, with the key that is missing: nothing is lost meanwhile, nor sent unsigned.
            _log.error("webhooks.secret_unreadable", endpoint_id=row["id"], error=str(error))
            broken.append(row["id"])
            continue
        health = Health(
            failing_since=row["failing_since"],
            consecutive_failures=row["consecutive_failures"],
            warned_percent=row["warned_percent"],
            resting_until=_rest_end(row["rest_seconds"], clock),
        )
        loaded.append((target, health))
    return loaded, broken


def _secrets(row: Any, sealer: Sealer) -> tuple[tuple[bytes, datetime | None], ...]:
    """Return the endpoint's secrets. One that ends and cannot be opened is done without; the present one cannot be."""
    secrets: list[tuple[bytes, datetime | None]] = []
    for secret_id, sealed, end in zip(row["secret_ids"], row["sealed_secrets"], row["ends"], strict=True):
        try:
            secrets.append((sealer.open(sealed, secret_place(row["organization_id"], secret_id)), end))
        except SealBroken as error:
            if end is None:
                raise
            _log.warning("webhooks.older_secret_unreadable", endpoint_id=row["id"], error=str(error))
    return tuple(secrets)


def _rest_end(seconds: float | None, clock: Clock) -> datetime | None:
    """Return when a rest ends by this worker's clock: it is kept by PostgreSQL's, which all workers share."""
    return clock.now() + timedelta(seconds=seconds) if seconds is not None and seconds > 0 else None


def _target(row: Any, sealer: Sealer) -> Target:
    endpoint_id, organization_id = row["id"], row["organization_id"]
    headers = open_headers(sealer, row["sealed_headers"], organization_id=organization_id, endpoint_id=endpoint_id)
    secrets = _secrets(row, sealer)
    return Target(
        endpoint_id,
        organization_id,
        row["url"],
        tuple((name.encode(), value.encode()) for name, value in headers.items()),
        secrets,
        row["requests_per_second"],
        row["updated_at"],
        row["enabled_at"],
    )
