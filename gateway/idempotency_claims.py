"""Claims and answers of requests with an Idempotency-Key, in PostgreSQL: they outlive the process that made them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import text

from core.database import Database
from core.ids import GatewayId, KeyId

# Whoever inserts the row works on the request. A row that has expired is as good as none.
_CLAIM: Final = text("""
INSERT INTO idempotent_answers AS a
  (key_id, idempotency_key, organization_id, request_digest, request_id, gateway_id, state, expires_at)
VALUES (:key_id, :idempotency_key, :organization_id, :digest, :request_id, :gateway_id, 'running', now() + :kept)
ON CONFLICT (key_id, idempotency_key) DO UPDATE SET
  request_digest = excluded.request_digest, request_id = excluded.request_id, gateway_id = excluded.gateway_id,
  state = 'running', status = NULL, content_type = NULL, body = NULL, claimed_at = now(),
  expires_at = excluded.expires_at
WHERE a.expires_at < now()
RETURNING request_id
""")
# A gateway is dead when neither its lease nor the claim itself is younger than a lease.
_FIND: Final = text("""
SELECT a.request_digest, a.request_id, a.gateway_id, a.state, a.status, a.content_type, a.body,
  greatest(l.seen_at, a.claimed_at) < now() - :lease AS is_abandoned
FROM idempotent_answers a LEFT JOIN gateway_leases l ON l.gateway_id = a.gateway_id
WHERE a.key_id = :key_id AND a.idempotency_key = :idempotency_key
""")
_TAKE_OVER: Final = text("""
UPDATE idempotent_answers SET gateway_id = :gateway_id, claimed_at = now()
WHERE key_id = :key_id AND idempotency_key = :idempotency_key AND state = 'running' AND gateway_id = :other
RETURNING request_id
""")
_COMPLETE: Final = text("""
UPDATE idempotent_answers SET state = :state, status = :status, content_type = :content_type, body = :body
WHERE key_id = :key_id AND idempotency_key = :idempotency_key AND state = 'running' AND gateway_id = :gateway_id
""")
_RELEASE: Final = text("""
DELETE FROM idempotent_answers
WHERE key_id = :key_id AND idempotency_key = :idempotency_key AND state = 'running' AND gateway_id = :gateway_id
""")
_PRUNE: Final = text("""
DELETE FROM idempotent_answers WHERE (key_id, idempotency_key) IN (
  SELECT key_id, idempotency_key FROM idempotent_answers WHERE expires_at < now() LIMIT 1000)
RETURNING 1
""")

State = Literal["running", "done", "too_large"]


class ClaimKey(msgspec.Struct, frozen=True):
    """Whose claim it is, and which: two API keys may use the same Idempotency-Key for different things."""

    key_id: KeyId
    idempotency_key: str

    def named(self, **more: Any) -> dict[str, Any]:
        """Return the parameters of a statement."""
        return {"key_id": self.key_id, "idempotency_key": self.idempotency_key, **more}


class FoundClaim(msgspec.Struct, frozen=True):
    """What is known of an Idempotency-Key that was used before."""

    digest: bytes
    request_id: str
    gateway_id: str
    state: State
    status: int
    content_type: str
    body: bytes
    is_abandoned: bool


class Claims:
    """The claims of one gateway. Every method's errors are those of `core.database.DOWN`."""

    def __init__(self, database: Database, gateway_id: GatewayId, *, kept_seconds: float, lease_seconds: float) -> None:
        self._database = database
        self.gateway_id = gateway_id
        self._kept = timedelta(seconds=kept_seconds)
        self._lease = timedelta(seconds=lease_seconds)

    async def claim(self, key: ClaimKey, digest: bytes, request_id: str, organization_id: str) -> bool:
        """Claim an Idempotency-Key that nobody has used; tell whether that was so."""
        return await self._changes(
            _CLAIM,
            key.named(
                organization_id=organization_id,
                digest=digest,
                request_id=request_id,
                gateway_id=self.gateway_id,
                kept=self._kept,
            ),
        )

    async def find(self, key: ClaimKey) -> FoundClaim | None:
        """Return what is known of a key."""
        async with self._database.transaction() as session:
            row = (await session.execute(_FIND, key.named(lease=self._lease))).one_or_none()
        if row is None:
            return None
        return FoundClaim(
            digest=row.request_digest,
            request_id=row.request_id,
            gateway_id=row.gateway_id,
            state=row.state,
            status=row.status or 0,
            content_type=row.content_type or "",
            body=row.body or b"",
            is_abandoned=row.is_abandoned,
        )

    async def take_over(self, key: ClaimKey, other: str) -> bool:
        """Take the claim of the dead gateway *other*; tell whether nobody was faster."""
        return await self._changes(_TAKE_OVER, key.named(gateway_id=self.gateway_id, other=other))

    async def complete(self, key: ClaimKey, state: State, status: int, content_type: str, body: bytes | None) -> None:
        """Keep the answer, or the note that it was too large to be kept."""
        values = {"state": state, "status": status, "content_type": content_type, "body": body}
        async with self._database.transaction() as session:
            await session.execute(_COMPLETE, key.named(gateway_id=self.gateway_id, **values))

    async def release(self, key: ClaimKey) -> None:
        """Give a claim up: the next request with that key is the first again."""
        async with self._database.transaction() as session:
            await session.execute(_RELEASE, key.named(gateway_id=self.gateway_id))

    async def _changes(self, statement: Any, parameters: dict[str, Any]) -> bool:
        async with self._database.transaction() as session:
            return (await session.execute(statement, parameters)).first() is not None


async def prune(database: Database) -> int:
    """Delete what has expired, a thousand at a time; return how many rows. Errors: those of `core.database.DOWN`."""
    count = 0
    while True:
        async with database.transaction() as session:
            pruned = len((await session.execute(_PRUNE)).all())
        count += pruned
        if pruned < 1000:
            return count
